"""One contract over every op and every case in its ``cases.py``; no op has tests of its own rules.

The truth is always the same: the rules that ``torch.func`` derives from the op's primal in float64
(``sap_fast.dual.pushforward`` and ``pullback``). Independent witnesses for those rules are in
``test_rules.py``; what the ops refuse is in ``test_ops_refuse.py``.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from agreement import assert_agrees, error, scales
from conftest import DEVICES
from torch import Tensor, is_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from sap_fast import _C
from sap_fast.dual import halves, stacked
from sap_fast.ops._cases import (
    Case,
    OpCases,
    Problem,
    cases_for,
    derive,
    differentiated,
    duals_of,
    every_op,
    pose,
    run,
    split,
)
from sap_fast.ops._library import raw_ops, references_on_cpu
from sap_fast.ops._tolerances import ROUNDINGS, allowed

pytestmark = pytest.mark.usefixtures("poisoned_memory")
OPS = every_op()
MODES = {"full": lambda pair: pair, "half": Problem.half, "single": Problem.single}


@pytest.fixture(params=["cpu", *(["reference"] if _C.loaded else []), *DEVICES[1:]])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The devices of every test, and a CPU whose C++ kernels, if it has some, step aside for the reference rules."""
    if request.param != "reference":
        yield request.param
        return
    with references_on_cpu():
        yield "cpu"


every_case = pytest.mark.parametrize(
    ("op", "case"),
    [pytest.param(op, case, id=f"{op.name}-{case.name}") for op, case in cases_for("contract", "reference")],
)
every_mode = pytest.mark.parametrize("mode", MODES)


def test_fresh_memory_is_poisoned() -> None:
    assert torch.empty(5).isnan().all()


def rng(device: str, seed: int = 0) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def leaves_of(op: OpCases, problem: Problem) -> dict[str, Tensor]:
    """Return the halves of the inputs, requiring grad where the op differentiates."""
    wanted = differentiated(op, problem)
    return {
        name: half.detach().requires_grad_(name in wanted)
        for name, half in split(problem.inputs, problem.is_dual).items()
    }


# The rules in float64


@every_mode
@every_case
def test_agrees_with_the_oracle(op: OpCases, case: Case, mode: str, device: str) -> None:
    problem = MODES[mode](pose(op, case, rng(device)))
    actual, expected = run(op, problem), derive(op, problem)
    assert actual.keys() == expected.keys()
    assert_agrees(actual, expected)


@every_case
def test_single_mode_is_ordinary_autograd(op: OpCases, case: Case, device: str) -> None:
    problem = pose(op, case, rng(device)).single()
    xs = {name: x[0].requires_grad_() for name, x in problem.inputs.items()}
    ys = op.primal(xs, problem.constants)
    dys = [dy[0] for dy in problem.cotangents.values()]
    dxs = torch.autograd.grad(ys, list(xs.values()), dys)
    expected = {name: y.detach() for name, y in zip(problem.cotangents, ys, strict=True)}
    expected |= {f"d{name}": dx for name, dx in zip(xs, dxs, strict=True)}
    assert_agrees(run(op, problem), expected)


@every_case
def test_half_mode_is_half_of_full_mode(op: OpCases, case: Case, device: str) -> None:
    problem = pose(op, case, rng(device), torch.bfloat16)
    half, full = run(op, problem.half()), run(op, problem)
    assert half.keys() < full.keys()
    # To rounding only: a kernel may sum in another order when it has less to do.
    assert_agrees(half, full, tolerance=torch.finfo(torch.bfloat16).eps)


@every_case
def test_half_mode_has_no_gradient_in_primal_outputs(op: OpCases, case: Case, device: str) -> None:
    problem = pose(op, case, rng(device))
    pairs = op.call(duals_of(leaves_of(op, problem.half())), problem.constants)
    for y, y_dot in pairs:
        assert y_dot is not None and y_dot.requires_grad and not y.requires_grad


@every_case
def test_gradcheck(op: OpCases, case: Case, device: str) -> None:
    """Autograd's own check by finite differences, through the public function, in full mode.

    The inputs whose primal half is a constant of a dual (LoRA's a and b) take no part with that
    half: the outputs do depend on it, and by design the op does not say how.
    """
    problem = pose(op, case, rng(device))
    leaves = {name: x.clone() for name, x in split(problem.inputs, True).items()}
    names = differentiated(op, problem)

    def function(*xs: Tensor) -> tuple[Tensor, ...]:
        pairs = duals_of({**leaves, **dict(zip(names, xs, strict=True))})
        return tuple(y for pair in op.call(pairs, problem.constants) for y in pair)

    # The fast mode projects the Jacobian on random directions, in all outputs and inputs together.
    xs = [leaves[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(function, xs, fast_mode=True)


@every_case
def test_each_input_alone(op: OpCases, case: Case, device: str) -> None:
    problem = pose(op, case, rng(device))
    expected = derive(op, problem)
    for name in differentiated(op, problem):
        assert_agrees(run(op, problem, wanted=[name]), expected)


@every_case
def test_each_output_alone(op: OpCases, case: Case, device: str) -> None:
    problem = pose(op, case, rng(device))
    for used in split(problem.cotangents, True):
        alone = {
            name: torch.stack([dy * (used == k) for k, dy in split({name: stack}, True).items()])
            for name, stack in problem.cotangents.items()
        }
        expected = derive(op, Problem(problem.inputs, problem.constants, alone))
        assert_agrees(run(op, problem, used=[used]), expected)


# The same in the dtypes of training


@pytest.mark.parametrize("dtype", ROUNDINGS, ids=str)
@every_case
def test_rounding_error(
    op: OpCases,
    case: Case,
    dtype: torch.dtype,
    device: str,
    formula_in: Callable[[OpCases, Problem], dict[str, Tensor]],
) -> None:
    """The error is at most what the same formula's in the same dtype allows."""
    problem = pose(op, case, rng(device), dtype)
    truth = derive(op, problem.to(torch.float64))
    yardstick = formula_in(op, problem.to(dtype))
    actual = run(op, problem)
    for name, scale in scales(truth).items():
        usual = error(yardstick[name], truth[name])
        assert usual <= 0.1 * scale, f"{name}: no yardstick, itself off by {usual / scale:.0%}"
        difference = error(actual[name], truth[name])
        assert difference <= allowed(usual, scale, dtype), (
            f"{op.name}, {case.name}, {dtype}, {name}: off by {difference:.3g}. The formula in "
            f"this dtype is off by {usual:.3g}; the largest element is {scale:.3g}"
        )
    # And in the dtype that the primal says: that of the inputs, but for the loss.
    ys = op.primal({name: x[0] for name, x in problem.inputs.items()}, problem.constants)
    for name, y in zip(problem.cotangents, ys, strict=True):
        assert actual[name].dtype == actual[f"{name}_dot"].dtype == y.dtype


# Memory


def _every_other(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, -1)[..., ::2]


def _columns_of_wider(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (1, 2))[..., 1:-2]


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


@every_case
def test_strided_inputs(op: OpCases, case: Case, device: str) -> None:
    """Nothing need be contiguous: neither halves, nor frozen tensors, nor cotangents."""
    pair = pose(op, case, rng(device))
    for problem in (pair, pair.single()):
        contiguous = run(op, problem)
        for layout in (_every_other, _columns_of_wider, _transposed):
            strided = problem.map(lambda name, x: layout(x))  # noqa: B023
            assert_agrees(run(op, strided), contiguous)


@every_case
def test_writes_nothing_it_was_given(op: OpCases, case: Case, device: str) -> None:
    problem = pose(op, case, rng(device))
    copy = problem.map(lambda name, x: x.clone())
    run(op, problem)
    assert_agrees(problem.inputs, copy.inputs, tolerance=0.0)
    assert_agrees(problem.cotangents, copy.cotangents, tolerance=0.0)
    for name, value in copy.constants.items():
        assert not is_tensor(value) or torch.equal(problem.constants[name], value), name


@pytest.mark.parametrize("needs_grad", [True, False], ids=["with-grad", "without-grad"])
@every_case
def test_outputs_of_a_pair_share_a_buffer(op: OpCases, case: Case, needs_grad: bool, device: str) -> None:
    """They are the adjacent halves that the next op can read without a copy."""
    problem = pose(op, case, rng(device))
    leaves = leaves_of(op, problem) if needs_grad else split(problem.inputs, True)
    for y, y_dot in op.call(duals_of(leaves), problem.constants):
        assert y_dot is not None
        assert stacked(y.detach(), y_dot.detach()).data_ptr() == y.data_ptr()


def test_stacked_copies_only_what_is_apart() -> None:
    buffer = torch.randn(2, 3, 4)
    x, x_dot = buffer
    assert stacked(x, x_dot).data_ptr() == buffer.data_ptr()
    assert stacked(x, None).data_ptr() == buffer.data_ptr()
    assert torch.equal(stacked(x, x_dot), buffer)
    apart = {
        "the wrong way round": (x_dot, x),
        "a half twice": (x, x),
        "of two buffers": (x, x_dot.clone()),
        "with a gap": (x[:2], x_dot[:2]),
        "columns": (x[:, :2], x_dot[:, :2]),
    }
    for name, pair in apart.items():
        stack = stacked(*pair)
        assert torch.equal(stack, torch.stack(pair)), name
        assert stack.data_ptr() != pair[0].data_ptr(), name


def test_halves_are_views() -> None:
    stack = torch.randn(2, 3, 4)
    x, x_dot = halves(stack)
    assert x_dot is not None and x.data_ptr() == stack.data_ptr()
    assert torch.equal(x_dot, stack[1]) and x_dot.data_ptr() == stack[1].data_ptr()
    assert halves(stack[:1])[1] is None


# The dispatcher


class _Recorder(TorchDispatchMode):
    """Notes the calls of the library's raw ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "sap_fast":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def raw_calls(op: OpCases, problem: Problem) -> list[tuple[Any, tuple]]:
    """Collect the raw ops behind one forward and backward, with their arguments, which are without grad."""
    with _Recorder() as recorder:
        run(op, problem)
    names = [func.name() for func, _ in recorder.calls]
    assert names == [f"sap_fast::{op.name}", f"sap_fast::{op.name}_backward"]
    return [(func, tree_map_only(Tensor, torch.detach, arguments)) for func, arguments in recorder.calls]


@every_case
def test_opcheck(op: OpCases, case: Case, device: str) -> None:
    """Schema, aliasing and fake implementation of the raw ops, on inputs without grad."""
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for func, arguments in raw_calls(op, pose(op, case, rng(device))):
        torch.library.opcheck(func, arguments, test_utils=checks)


@every_mode
@pytest.mark.parametrize("op", OPS, ids=[op.name for op in OPS])
def test_opcheck_under_compilation(op: OpCases, mode: str, device: str) -> None:
    """The rest of opcheck, which is slow: on the problem with the most tensors, in every mode."""
    problems = [pose(op, case, rng(device)) for case in op.cases if case.purpose == "contract"]
    problem = max(problems, key=lambda p: len(p.inputs) + sum(map(is_tensor, p.constants.values())))
    for func, arguments in raw_calls(op, MODES[mode](problem)):
        torch.library.opcheck(func, arguments, test_utils="test_aot_dispatch_dynamic")


# torch's own tracing of an autograd.Function sets this off.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("op", OPS, ids=[op.name for op in OPS])
def test_compiles_without_a_graph_break(op: OpCases) -> None:
    """Forward and backward of a dual, traced whole; that the kernels of a GPU can be, too, is in test_gpu.py."""
    case = max((case for case in op.cases if case.purpose == "contract"), key=lambda case: len(case.name))
    problem = pose(op, case, rng("cpu"))
    dys = split(problem.cotangents, True)

    def traced(leaves: dict[str, Tensor]) -> list[Tensor]:
        return [y for pair in op.call(duals_of(leaves), problem.constants) for y in pair]

    found = []
    for function in (torch.compile(traced, fullgraph=True, backend="aot_eager"), traced):
        leaves = leaves_of(op, problem)
        ys = function(leaves)
        torch.autograd.backward(ys, list(dys.values()))
        dxs = {f"d{name}": x.grad for name, x in leaves.items() if x.grad is not None}
        found.append(dxs | dict(zip(dys, [y.detach() for y in ys], strict=True)))
    assert_agrees(*found)


def test_every_raw_op_belongs_to_an_op_folder() -> None:
    """A forward and a backward of each; those that work in place have one more underscore."""
    assert {name.removesuffix("_") for name in raw_ops()} == {
        f"{op.name}{end}" for op in OPS for end in ("", "_backward")
    }


@every_case
def test_runs_on_meta(op: OpCases, case: Case) -> None:
    """Shapes without data: nothing in a public function may look at values."""
    problem = pose(op, case, rng("cpu"))
    constants = tree_map_only(Tensor, lambda x: x.to("meta"), problem.constants)
    leaves = {name: x.to("meta").detach().requires_grad_(x.requires_grad) for name, x in leaves_of(op, problem).items()}
    ys = [y for pair in op.call(duals_of(leaves), constants) for y in pair if y is not None]
    dys = split(problem.cotangents, True).values()
    assert [(y.shape, y.dtype) for y in ys] == [(dy.shape, dy.dtype) for dy in dys]
    torch.autograd.backward(ys, [dy.to("meta") for dy in dys])
    assert all(x.grad.shape == x.shape for x in leaves.values() if x.requires_grad)


@pytest.mark.parametrize("op", OPS, ids=[op.name for op in OPS])
def test_second_derivatives_are_refused(op: OpCases) -> None:
    problem = pose(op, next(case for case in op.cases if case.purpose == "contract"), rng("cpu"))
    leaves = leaves_of(op, problem)
    y, y_dot = op.call(duals_of(leaves), problem.constants)[0]
    x = next(iter(leaves.values()))
    (dx,) = torch.autograd.grad((y * y).sum() + (y_dot * y_dot).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()
