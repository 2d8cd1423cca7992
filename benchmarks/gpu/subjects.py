"""What is timed on a GPU, by whom it is done, and how each is found right before it is timed.

A :class:`Subject` is an op at a size of a model; ``ops/contenders.py`` says who its contenders are.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from benchmarks.ops.contenders import PASSES, Contender, Recorder, check, contender
from benchmarks.ops.peers import PEERS
from sap_fast.ops._cases import Case, OpCases, Problem, derive, every_op, normal, pose
from sap_fast.ops.take_rows import RowIndex

# The truth of attention is derived for this many tokens at a time: its T x T matrices are float64.
_TOKENS_AT_ONCE = 2048
_EPS, _LORA_RANK, _LORA_SCALING = 1e-5, 8, 2.0


class Widths(NamedTuple):
    """The widths of a model."""

    hidden: int
    inner: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int


MODELS = {
    "llama-2-7b": Widths(4096, 11008, 32000, 32, 32, 128),
    "smollm2-135m": Widths(576, 1536, 49152, 9, 3, 64),
    "tiny": Widths(32, 48, 40, 2, 1, 16),
}


class Subject(NamedTuple):
    """An op at a size: ``rows`` tokens, for attention in sequences of ``length``; else 0."""

    op: str
    model: str
    rows: int
    length: int = 0

    @property
    def shape(self) -> str:
        return f"{self.rows // self.length}x{self.length}" if self.length else str(self.rows)


class Visit(NamedTuple):
    """One timing of one contender; ``order`` tells its visits apart."""

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


ROW_WISE = ("rms_norm", "probe_rms_norm", "glu", "rotary")
# 16k rows, where bandwidth counts, and what a step has: there, tensors fit a GPU's cache, and time is what counts.
MANY, FEW = 16384, (2048, 768)


def subjects(tiny: bool) -> list[Subject]:
    """Whatever carries a target first: time may run out."""
    if tiny:
        return [Subject(op.name, "tiny", 8, 8 if op.name == "attention" else 0) for op in every_op()]
    result = [Subject(op, "llama-2-7b", MANY) for op in ROW_WISE]
    result += [Subject("attention", "llama-2-7b", MANY, length) for length in (128, 256, 2048)]
    result += [Subject(op, "smollm2-135m", MANY) for op in ROW_WISE]
    for rows in FEW:
        for model in ("llama-2-7b", "smollm2-135m"):
            result += [Subject(op, model, rows) for op in (*ROW_WISE, "lora_linear", "linear_cross_entropy")]
    result += [Subject("lora_linear", model, MANY) for model in ("llama-2-7b", "smollm2-135m")]
    result += [Subject("attention", "smollm2-135m", MANY, length) for length in (128, 256, 2048)]
    return result


def visits(tiny: bool) -> list[Visit]:
    """Each subject's contenders in both orders; compilation, which takes longest, after all others."""
    result, compiled = [], []
    for subject in subjects(tiny):
        contenders = ["ours", "eager"]
        if subject.op in PEERS and not tiny:
            contenders.append(PEERS[subject.op][0])
        for pass_ in PASSES:
            both = [*contenders, *reversed(contenders)]
            result += [Visit(subject, pass_, name, 1 + (i >= len(contenders))) for i, name in enumerate(both)]
            if not tiny and _is_compiled(subject):
                compiled.append(Visit(subject, pass_, "compiled", 1))
    return result + compiled


def _is_compiled(subject: Subject) -> bool:
    """Compiled for a shape, a formula takes seconds, attention's much longer: for one shape of each op and model."""
    if subject.op == "attention":
        return subject.model == "llama-2-7b" and subject.length == 2048
    return subject.rows == (FEW[0] if subject.op == "linear_cross_entropy" else MANY)


def op_named(name: str) -> OpCases:
    return next(op for op in every_op() if op.name == name)


def draw(subject: Subject, rng: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Inputs and constants as ``Case.make`` draws them."""
    w, rows, device = MODELS[subject.model], subject.rows, rng.device

    def stack(*shape: int) -> Tensor:
        return normal(rng, 2, rows, *shape)

    match subject.op:
        case "rms_norm":
            return {"x": stack(w.hidden)}, {"weight": normal(rng, w.hidden), "eps": _EPS, "offset": 0.0}
        case "probe_rms_norm":
            v = normal(rng, w.hidden)
            probe = torch.stack((v, torch.zeros_like(v)))
            inputs = {"residual": stack(w.hidden), "update": stack(w.hidden), "probe": probe}
            return inputs, {"weight": normal(rng, w.hidden), "eps": _EPS, "offset": 0.0}
        case "glu":
            return {"gate": stack(w.inner), "up": stack(w.inner)}, {"activation": "silu"}
        case "rotary":
            angles = normal(rng, rows, w.head_dim // 2).repeat(1, 2)
            inputs = {"q": stack(w.heads, w.head_dim), "k": stack(w.kv_heads, w.head_dim)}
            return inputs, {"cos": angles.cos(), "sin": angles.sin()}
        case "attention":
            inputs = {"q": stack(w.heads, w.head_dim)} | {name: stack(w.kv_heads, w.head_dim) for name in "kv"}
            return inputs, _packed(rows, subject.length, w.head_dim, device)
        case "take_rows":
            # Keys and values of sequences whose common prefix is a third of what they have.
            taken = torch.arange(rows + rows // 2, device=device) % rows
            inputs = {name: stack(w.kv_heads, w.head_dim) for name in ("x0", "x1")}
            return inputs, {"index": RowIndex.of(taken, rows)}
        case "linear_cross_entropy":
            weight = normal(rng, w.vocab, w.hidden)
            targets = torch.randint(w.vocab, (rows,), generator=rng, device=device)
            return {"x": stack(w.hidden) * w.hidden**-0.5}, {"weight": weight, "targets": targets}
        case "lora_linear":
            inputs = {"x": stack(w.hidden)}
            constants = {"scaling": _LORA_SCALING, "dropout": 0.0, "seed": None}
            for i, d_out in enumerate((w.heads * w.head_dim, w.kv_heads * w.head_dim, w.kv_heads * w.head_dim)):
                constants |= {f"weight{i}": normal(rng, d_out, w.hidden) * w.hidden**-0.5, f"bias{i}": None}
                inputs[f"a{i}"] = normal(rng, 2, _LORA_RANK, w.hidden) * w.hidden**-0.5
                inputs[f"b{i}"] = normal(rng, 2, d_out, _LORA_RANK) * _LORA_RANK**-0.5
            return inputs, constants
    raise AssertionError(f"{subject.op} has no sizes here")


def _packed(rows: int, length: int, head_dim: int, device: torch.device) -> dict[str, Any]:
    cu_seqlens = torch.arange(0, rows + 1, length, dtype=torch.int32, device=device)
    constants = {"cu_seqlens": cu_seqlens, "max_seqlen": length, "scale": head_dim**-0.5}
    return constants | {"window": None, "seqused": None, "cu_seqlens_k": None, "max_seqlen_k": None}


def posed(subject: Subject, device: str, dtype: torch.dtype) -> Problem:
    """A subject's inputs and cotangents, drawn without running the op: others stand where it falls."""
    op, rng = op_named(subject.op), torch.Generator(device).manual_seed(0)
    with Recorder(_shapes):
        return pose(op, Case(subject.shape, lambda rng: draw(subject, rng)), rng, dtype)


def _shapes(name: str) -> Callable[..., Any]:
    """A raw op that computes nothing: its results have their shapes alone."""

    def rule(*args: Any) -> Any:
        outputs = getattr(torch.ops.sap_fast, name)(*tree_map_only(Tensor, lambda x: x.to("meta"), args))
        device = next(x.device for x in tree_leaves(args) if isinstance(x, Tensor))
        return tree_map_only(Tensor, lambda y: torch.empty_like(y, device=device), outputs)

    return rule


def truth(op: OpCases, problem: Problem) -> dict[str, Tensor]:
    """What is right, derived in float64."""
    if op.name != "attention":
        return derive(op, problem.to(torch.float64))
    c, rows = problem.constants, len(problem.inputs["q"][0])
    step = max(_TOKENS_AT_ONCE // c["max_seqlen"], 1) * c["max_seqlen"]
    parts = []
    for start, stop in itertools.pairwise([*range(0, rows, step), rows]):
        lengths = _packed(stop - start, c["max_seqlen"], 1, c["cu_seqlens"].device) | {"scale": c["scale"]}
        halves = ({name: x[:, start:stop] for name, x in s.items()} for s in (problem.inputs, problem.cotangents))
        inputs, cotangents = halves
        parts.append(derive(op, Problem(inputs, lengths, cotangents).to(torch.float64)))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


class Stage:
    """Holds one subject at a time: its problem, the truth about it, and its contenders."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.subject: Subject | None = None

    def checked(self, visit: Visit) -> Contender:
        """A contender whose results in this pass are right.

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

    def compare(self, entry: Contender, pass_: str) -> None:
        which = tuple(entry.problem.inputs), entry.problem.is_pair
        if which not in self._truths:
            self._truths[which] = truth(op_named(self.subject.op), entry.problem)
        check(op_named(self.subject.op), entry, pass_, self._truths[which], self.dtype)
