"""Who solves an op's problem in a benchmark, and how each is found right before it is timed.

- ``ours``: the raw ops, called as autograd would call them;
- ``reference``: the rules that serve a raw op where it has no kernel;
- ``eager``: the dual's formula in PyTorch (``formulas.py``), and ``compiled``: ``torch.compile`` of it;
- ``liger`` or ``flash``: an ordinary pass's kernel, run twice (``peers.py``).

The inputs of a backward hold what the contender's own forward kept for it.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from benchmarks.ops import formulas
from benchmarks.ops.peers import PEERS
from sap_fast.ops._cases import OpCases, Problem, run, split
from sap_fast.ops._library import reference_rule
from sap_fast.ops._tolerances import OF_NORM

PASSES = ("forward", "backward")


class Recorder(TorchDispatchMode):
    """Notes the raw ops' calls. With ``rule``, ``rule(name)`` is called in place of each."""

    def __init__(self, rule: Callable[[str], Callable[..., Any]] | None = None) -> None:
        super().__init__()
        self.rule = rule
        # (function, arguments, outputs)
        self.calls: list[tuple[Callable[..., Any], tuple, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace != "sap_fast":
            return func(*args, **(kwargs or {}))
        function = func if self.rule is None else self.rule(func._schema.name.partition("::")[2])
        args = tree_map_only(Tensor, torch.detach, args)
        outputs = function(*args)
        self.calls.append((function, args, outputs))
        return outputs


# What takes a raw op's place, by contender; None is what serves it.
RULES: dict[str, Callable[[str], Callable[..., Any]] | None] = {
    "ours": None,
    "reference": reference_rule,
    "eager": formulas.rule,
    "compiled": formulas.rule,
}


class OpContender(NamedTuple):
    """Solves a problem: holds what is timed, and how what it returns is named for comparison."""

    problem: Problem
    functions: dict[str, Callable[[], Any]]
    results: dict[str, Callable[[Any], dict[str, Tensor]]]
    # Of each pass: what has to be read and written at least once. For a peer, that of the dual.
    moved: dict[str, int]


def contender(name: str, op: OpCases, problem: Problem) -> OpContender:
    """Make a contender ready.

    Raises:
        AbsentError: it is not installed.
    """
    if name in ("liger", "flash"):
        twice = PEERS[op.name][1](problem)
        functions = {"forward": twice.forward, "backward": twice.backward}
        results = {"forward": twice.forward_results, "backward": twice.backward_results}
        return OpContender(twice.problem.single(), functions, results, {})
    with Recorder(RULES[name]) as recorder:
        run(op, problem)
    functions, moved = {}, {}
    for pass_, (function, args, outputs) in zip(PASSES, recorder.calls, strict=True):
        if name == "compiled":
            function = torch.compile(function, dynamic=False)
        functions[pass_] = lambda function=function, args=args: function(*args)
        tensors = [x for x in tree_leaves((args, outputs)) if isinstance(x, Tensor)]
        moved[pass_] = sum(x.numel() * x.element_size() for x in tensors)
    results = {
        "forward": lambda output: split(dict(zip(op.outputs, tree_leaves(output), strict=False)), True),
        "backward": lambda output: _gradients(op, problem, output),
    }
    return OpContender(problem, functions, results, moved)


def _gradients(op: OpCases, problem: Problem, output: Any) -> dict[str, Tensor]:
    """Name what a raw backward returns as :func:`derive` does."""
    names = op.returned(list(problem.inputs))
    gradients = dict(zip(names, tree_leaves(output), strict=True))
    result = {f"d{name}_dot": gradients.pop(name) for name in names if name in op.tangent_only}
    return result | {f"d{name}": dx for name, dx in split(gradients, True).items()}


def check(op: OpCases, entry: OpContender, pass_: str, expected: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """See that a contender's results in a pass are right.

    Raises:
        AssertionError: they are not.
    """
    actual = entry.results[pass_](entry.functions[pass_]())
    assert actual.keys() <= expected.keys(), f"{op.name}: {sorted(actual)} are not among {sorted(expected)}"
    for name, result in actual.items():
        scale = float(expected[name].norm())
        error = float((result.to(expected[name].dtype) - expected[name]).norm()) / (scale or 1.0)
        assert error <= OF_NORM[dtype], f"{name} is off by {error:.2g} of its norm"
