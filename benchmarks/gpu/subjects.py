"""What is timed on a GPU, by whom it is done, and how each is found right before it is timed.

A :class:`Subject` is an op at a size of a model; ``ops/contenders.py`` says who its contenders are.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from benchmarks.ops import formulas
from benchmarks.ops.contenders import PASSES, OpContender, Recorder, check, contender
from benchmarks.ops.peers import PEERS
from sap_fast.ops._cases import MANY, OpCases, Problem, Size, Widths, derive, every_op, pose

MODELS = {
    "llama-2-7b": Widths(4096, 11008, 32000, 32, 32, 128),
    "smollm2-135m": Widths(576, 1536, 49152, 9, 3, 64),
    "tiny": Widths(32, 48, 40, 2, 1, 16),
}


class Subject(NamedTuple):
    """An op at a size: ``rows`` tokens, in sequences of ``length`` if the op knows of sequences; else 0."""

    op: str
    model: str
    rows: int
    length: int = 0

    @staticmethod
    def of(op: OpCases, model: str, rows: int, length: int) -> "Subject":
        """Make a subject in sequences of ``length`` if the op knows of them."""
        return Subject(op.name, model, rows, length if op.sizes.length else 0)

    @property
    def shape(self) -> str:
        return f"{self.rows // self.length}x{self.length}" if self.length else str(self.rows)


class Visit(NamedTuple):
    """Describes one timing of one contender; ``order`` tells its visits apart."""

    subject: Subject
    pass_: str
    contender: str
    order: int

    def __str__(self) -> str:
        s = self.subject
        return " ".join((s.op, s.model, str(s.rows), str(s.length), self.pass_, self.contender, str(self.order)))

    @staticmethod
    def parse(text: str) -> "Visit":
        op, model, rows, length, pass_, contender, order = text.split()
        return Visit(Subject(op, model, int(rows), int(length)), pass_, contender, int(order))


# The ops whose time is held to a copy's: they only read and write rows.
ROW_WISE = tuple(op.name for op in every_op() if any(size.target == "copy" for size in op.sizes.timed))
# The tiny sizes: of all ops, whether or not they are timed at a model's.
TINY_ROWS = 8


def subjects(tiny: bool) -> list[Subject]:
    """List whatever carries a target first, since time may run out; then what a step has; many rows last."""
    if tiny:
        return [Subject.of(op, "tiny", TINY_ROWS, TINY_ROWS) for op in every_op()]
    timed = [(op, size) for op in every_op() for size in op.sizes.timed]

    def place(of: tuple[OpCases, Size]) -> tuple[int, ...]:
        size = of[1]
        target = ("copy", "flash", None).index(size.target)
        return target, size.rows >= MANY, -size.rows, [*MODELS].index(size.model)

    return [Subject(op.name, size.model, size.rows, size.length) for op, size in sorted(timed, key=place)]


def has_formula(op: str) -> bool:
    """Tell whether the op's dual is written by hand in ``formulas.py``: timed, and compiled, beside ours."""
    return hasattr(formulas, op)


def visits(tiny: bool) -> list[Visit]:
    """List each subject's contenders in both orders; compilation, which takes longest, after all others."""
    result, compiled = [], []
    for subject in subjects(tiny):
        contenders = ["ours", "eager"] if has_formula(subject.op) else ["ours"]
        if subject.op in PEERS and not tiny:
            contenders.append(PEERS[subject.op][0])
        for pass_ in PASSES:
            both = [*contenders, *reversed(contenders)]
            result += [Visit(subject, pass_, name, 1 + (i >= len(contenders))) for i, name in enumerate(both)]
            if "eager" in contenders and not tiny and _size(subject).compiled:
                compiled.append(Visit(subject, pass_, "compiled", 1))
    return result + compiled


def _size(subject: Subject) -> Size:
    sizes = op_named(subject.op).sizes.timed
    return next(size for size in sizes if (size.model, size.rows, size.length) == subject[1:])


def op_named(name: str) -> OpCases:
    return next(op for op in every_op() if op.name == name)


def posed(subject: Subject, device: str, dtype: torch.dtype) -> Problem:
    """Draw a subject's inputs and cotangents without running the op: others stand where it falls."""
    op, rng = op_named(subject.op), torch.Generator(device).manual_seed(0)
    with Recorder(_shapes):
        return pose(op, op.sizes.case(MODELS[subject.model], subject.rows, subject.length), rng, dtype)


def _shapes(name: str) -> Callable[..., Any]:
    """Make a rule of a raw op that computes nothing: its results have their shapes alone."""

    def rule(*args: Any) -> Any:
        outputs = getattr(torch.ops.sap_fast, name)(*tree_map_only(Tensor, lambda x: x.to("meta"), args))
        device = next(x.device for x in tree_leaves(args) if isinstance(x, Tensor))
        return tree_map_only(Tensor, lambda y: torch.empty_like(y, device=device), outputs)

    return rule


def truth(op: OpCases, problem: Problem) -> dict[str, Tensor]:
    """Derive what is right, in float64."""
    if op.sizes.parts is None:
        return derive(op, problem.to(torch.float64))
    parts = [derive(op, part.to(torch.float64)) for part in op.sizes.parts(problem)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


class GpuStage:
    """Holds one subject at a time: its problem, the truth about it, and its contenders."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.subject: Subject | None = None

    def checked(self, visit: Visit) -> OpContender:
        """Return a contender whose results in this pass are right.

        Raises:
            AssertionError: they are not.
        """
        if visit.subject != self.subject:
            self.subject = None
            self.problem, self._truths, self._contenders, self._right = None, {}, {}, set()
            if self.device == "cuda":
                torch.cuda.empty_cache()  # the next ones have other shapes
            self.problem = posed(visit.subject, self.device, self.dtype)
            self.subject = visit.subject
        name = visit.contender
        if name not in self._contenders:
            self._contenders[name] = contender(name, op_named(visit.subject.op), self.problem)
        entry = self._contenders[name]
        if (name, visit.pass_) not in self._right:
            self.compare(entry, visit.pass_)
            self._right.add((name, visit.pass_))
        return entry

    def compare(self, entry: OpContender, pass_: str) -> None:
        which = tuple(entry.problem.inputs), entry.problem.is_dual
        if which not in self._truths:
            self._truths[which] = truth(op_named(self.subject.op), entry.problem)
        check(op_named(self.subject.op), entry, pass_, self._truths[which], self.dtype)
