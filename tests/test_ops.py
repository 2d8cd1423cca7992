"""One contract over every op and every case in its ``cases.py``; no op has tests of its own rules.

The truth is always the same: the rules that ``torch.func`` derives from the op's primal in float64
(``sap_fast.dual.pushforward`` and ``pullback``). Independent witnesses for those rules, finite
differences and formulas worked out by hand, are at the end.
"""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, is_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from sap_fast.dual import halves, pullback, pushforward, stacked
from sap_fast.ops import (
    LoRATarget,
    attention,
    glu,
    linear_cross_entropy,
    lora_linear,
    probe_rms_norm,
    rms_norm,
    rotary,
)
from sap_fast.ops._cases import (
    Case,
    OpCases,
    Problem,
    derive,
    differentiated,
    every_op,
    paired,
    pose,
    run,
    split,
)
from sap_fast.ops.lora_linear import dropout_mask

DEVICES = ["cpu"]
if torch.cuda.is_available():
    DEVICES.append(pytest.param("cuda", marks=pytest.mark.gpu))
OPS = every_op()
MODES = {"full": lambda pair: pair, "half": Problem.half, "single": Problem.single}

every_case = pytest.mark.parametrize(
    ("op", "case"),
    [
        pytest.param(op, case, id=f"{op.name}-{case.name}")
        for op in OPS
        for case in op.cases
        if not case.bench
    ],
)
every_mode = pytest.mark.parametrize("mode", MODES)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill fresh memory with NaN, so that a result that nothing was stored to cannot look right."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def test_fresh_memory_is_poisoned() -> None:
    assert torch.empty(5).isnan().all()


def rng(device: str, seed: int = 0) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def leaves_of(op: OpCases, problem: Problem) -> dict[str, Tensor]:
    """The halves of the inputs, requiring grad where the op differentiates."""
    wanted = differentiated(op, problem)
    return {
        name: half.detach().requires_grad_(name in wanted)
        for name, half in split(problem.inputs, problem.is_pair).items()
    }


def error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference of two elements; NaN if there is one."""
    assert actual.shape == expected.shape
    return float((actual.double() - expected.double()).abs().max()) if expected.numel() else 0.0


def scales(truth: dict[str, Tensor]) -> dict[str, float]:
    """The largest element of each result, against which its error is measured.

    A result that is zero altogether has no scale: attention over one token, say, has no gradient in
    its query, and what is computed for it is the rounding error of terms that cancel. Its scale is
    that of the largest result beside it.
    """
    largest = {name: float(x.abs().max()) if x.numel() else 0.0 for name, x in truth.items()}
    return {name: scale or max(largest.values()) for name, scale in largest.items()}


def assert_agrees(
    actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12
) -> None:
    """Compare all of ``actual`` with its namesakes in ``expected``, relative to their scales."""
    for name, scale in scales(expected).items():
        if name in actual:
            difference = error(actual[name], expected[name])
            assert difference <= tolerance * scale, (
                f"{name} is off by {difference:.3g}; its largest element is {scale:.3g}, "
                f"of which {tolerance:.1g} is allowed"
            )


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
    pairs = op.call(paired(leaves_of(op, problem.half())), problem.constants)
    for y, y_dot in pairs:
        assert y_dot is not None and y_dot.requires_grad and not y.requires_grad


@every_case
def test_gradcheck(op: OpCases, case: Case, device: str) -> None:
    """Autograd's own check by finite differences, through the public function, in full mode.

    The inputs whose primal half is a constant of a pair (LoRA's a and b) take no part with that
    half: the outputs do depend on it, and by design the op does not say how.
    """
    problem = pose(op, case, rng(device))
    leaves = {name: x.clone() for name, x in split(problem.inputs, True).items()}
    names = differentiated(op, problem)

    def function(*xs: Tensor) -> tuple[Tensor, ...]:
        pairs = paired({**leaves, **dict(zip(names, xs, strict=True))})
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


@pytest.fixture
def formula_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[OpCases, Problem], dict[str, Tensor]]:
    """The yardstick: the rules derived from the primal with every step in the dtype of its inputs.

    A primal widens bfloat16 to float32 (``compute_dtype``), which is what an op should do too;
    undone, it is the formula as anyone would write it in that dtype.
    """

    def naive(op: OpCases, problem: Problem) -> dict[str, Tensor]:
        with monkeypatch.context() as patch:
            for each in OPS:
                reference = importlib.import_module(f"sap_fast.ops.{each.name}.reference")
                patch.setattr(reference, "compute_dtype", lambda x: x.dtype)
            return derive(op, problem)

    return naive


# What an error may be where the yardstick's is nil by luck, in eps times the largest element. Both
# dtypes are computed in float32. There an element takes several roundings of half an eps, in an
# order that is the kernel's own business. Beside a bfloat16 eps those are nothing; what remains is
# one rounding of the result and one of a stored intermediate (the residual stream, W x).
FLOOR = {torch.float32: 4.0, torch.bfloat16: 1.0}


@pytest.mark.parametrize("dtype", FLOOR, ids=str)
@every_case
def test_rounding_error(
    op: OpCases,
    case: Case,
    dtype: torch.dtype,
    device: str,
    formula_in: Callable[[OpCases, Problem], dict[str, Tensor]],
) -> None:
    """The error is at most twice what the same formula makes in the same dtype, plus the floor."""
    problem = pose(op, case, rng(device), dtype)
    truth = derive(op, problem.to(torch.float64))
    yardstick = formula_in(op, problem.to(dtype))
    actual = run(op, problem)
    eps = torch.finfo(dtype).eps
    for name, scale in scales(truth).items():
        allowed = error(yardstick[name], truth[name])
        assert allowed <= 0.1 * scale, f"{name}: no yardstick, itself off by {allowed / scale:.0%}"
        difference = error(actual[name], truth[name])
        assert difference <= 2 * allowed + FLOOR[dtype] * eps * scale, (
            f"{op.name}, {case.name}, {dtype}, {name}: off by {difference:.3g}. The formula in "
            f"this dtype is off by {allowed:.3g}; the largest element is {scale:.3g}"
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
def test_outputs_of_a_pair_share_a_buffer(
    op: OpCases, case: Case, needs_grad: bool, device: str
) -> None:
    """They are the adjacent halves that the next op can read without a copy."""
    problem = pose(op, case, rng(device))
    leaves = leaves_of(op, problem) if needs_grad else split(problem.inputs, True)
    for y, y_dot in op.call(paired(leaves), problem.constants):
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

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func.namespace == "sap_fast":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def raw_calls(op: OpCases, problem: Problem) -> list[tuple[Any, tuple]]:
    """The raw ops behind one forward and backward, with their arguments, which are without grad."""
    with _Recorder() as recorder:
        run(op, problem)
    names = [func.name() for func, _ in recorder.calls]
    assert names == [f"sap_fast::{op.name}", f"sap_fast::{op.name}_backward"]
    return [
        (func, tree_map_only(Tensor, torch.detach, arguments)) for func, arguments in recorder.calls
    ]


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
    problems = [pose(op, case, rng(device)) for case in op.cases if not case.bench]
    problem = max(problems, key=lambda p: len(p.inputs) + sum(map(is_tensor, p.constants.values())))
    for func, arguments in raw_calls(op, MODES[mode](problem)):
        torch.library.opcheck(func, arguments, test_utils="test_aot_dispatch_dynamic")


def test_every_raw_op_belongs_to_an_op_folder() -> None:
    registered = torch._C._dispatch_get_all_op_names()
    registered = {name for name in registered if name.startswith("sap_fast::")}
    assert registered == {f"sap_fast::{op.name}{end}" for op in OPS for end in ("", "_backward")}


@every_case
def test_runs_on_meta(op: OpCases, case: Case) -> None:
    """Shapes without data: nothing in a public function may look at values."""
    problem = pose(op, case, rng("cpu"))
    constants = {
        name: value.to("meta") if is_tensor(value) else value
        for name, value in problem.constants.items()
    }
    leaves = {
        name: x.to("meta").detach().requires_grad_(x.requires_grad)
        for name, x in leaves_of(op, problem).items()
    }
    ys = [y for pair in op.call(paired(leaves), constants) for y in pair if y is not None]
    dys = split(problem.cotangents, True).values()
    assert [(y.shape, y.dtype) for y in ys] == [(dy.shape, dy.dtype) for dy in dys]
    torch.autograd.backward(ys, [dy.to("meta") for dy in dys])
    assert all(x.grad.shape == x.shape for x in leaves.values() if x.requires_grad)


@pytest.mark.parametrize("op", OPS, ids=[op.name for op in OPS])
def test_second_derivatives_are_refused(op: OpCases) -> None:
    problem = pose(op, next(case for case in op.cases if not case.bench), rng("cpu"))
    leaves = leaves_of(op, problem)
    y, y_dot = op.call(paired(leaves), problem.constants)[0]
    x = next(iter(leaves.values()))
    (dx,) = torch.autograd.grad((y * y).sum() + (y_dot * y_dot).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


# What is refused


def t(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    if dtype.is_floating_point:
        return torch.randn(shape, device=device).to(dtype)
    return torch.zeros(shape, dtype=dtype, device=device)


def _norm(x: Tensor, x_dot: Tensor | None = None, weight: Tensor | None = None) -> Any:
    return rms_norm(x, x_dot, t(4) if weight is None else weight, eps=1e-5)


def _probe(*tensors: Tensor | None, weight: Tensor | None = None) -> Any:
    return probe_rms_norm(*tensors, t(4) if weight is None else weight, eps=1e-5)


def _glu(*tensors: Tensor | None, activation: str = "silu") -> Any:
    return glu(*tensors, activation=activation)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None, **options: Any
) -> Any:
    lengths = torch.tensor([0, 3], dtype=torch.int32) if lengths is None else lengths
    return attention(q, None, k, None, v, None, lengths, max_seqlen=3, scale=1.0, **options)


def _lora(x: Tensor, x_dot: Tensor | None = None, **fields: Any) -> Any:
    return lora_linear(x, x_dot, [LoRATarget(**{"weight": t(5, 4), **fields})])


def _adapter(device: str = "cpu") -> dict[str, Tensor]:
    return {"a": t(2, 4, device=device), "b": t(5, 2, device=device)}


q, kv, x = t(3, 4, 6), t(3, 2, 6), t(3, 4)
f16, bf16, f64, i64, i32 = torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32
meta = "meta"
# fmt: off
REFUSED: list[tuple[str, type[Exception], str, Callable[[], Any]]] = [
    ("rms_norm-ndim", ValueError, r"x must have 2 .* \(2, 3, 4\)",
     lambda: _norm(t(2, 3, 4))),
    ("rms_norm-float16", TypeError, "bfloat16.*is torch.float16",
     lambda: _norm(t(3, 4, dtype=f16))),
    ("rms_norm-int", TypeError, "float32.*is torch.int64",
     lambda: _norm(t(3, 4, dtype=i64))),
    ("rms_norm-weight", ValueError, r"weight .* \(4,\).* \(5,\)",
     lambda: _norm(x, weight=t(5))),
    ("rms_norm-device", ValueError, "weight is on cpu.* x on meta",
     lambda: _norm(t(3, 4, device=meta))),
    ("rms_norm-tangent-shape", ValueError, r"x and its .*\(3, 4\).*\(2, 4\)",
     lambda: _norm(x, t(2, 4))),
    ("rms_norm-tangent-dtype", ValueError, "float32.*float64",
     lambda: _norm(x, t(3, 4, dtype=f64))),
    ("rms_norm-tangent-device", ValueError, "cpu.*meta",
     lambda: _norm(x, t(3, 4, device=meta))),
    ("probe-update-shape", ValueError, r"update .*\(3, 4\).*\(2, 4\)",
     lambda: _probe(x, None, t(2, 4), None, None)),
    ("probe-update-dtype", TypeError, "update .*bfloat16.*float32",
     lambda: _probe(x, None, t(3, 4, dtype=bf16), None, None)),
    ("probe-one-tangent", ValueError, "both have a tangent, or neither",
     lambda: _probe(x, x, x, None, None)),
    ("probe-shape", ValueError, r"probe .*\(2, 4\).*\(1, 4\)",
     lambda: _probe(x, x, x, x, t(1, 4))),
    ("probe-shape-ordinary", ValueError, r"probe .*\(1, 4\).*\(4,\)",
     lambda: _probe(x, None, x, None, t(4))),
    ("probe-device", ValueError, "probe is on meta",
     lambda: _probe(x, None, x, None, t(1, 4, device=meta))),
    ("probe-weight", ValueError, r"weight .*\(4,\).*\(3,\)",
     lambda: _probe(x, None, x, None, None, weight=t(3))),
    ("glu-activation", ValueError, "'gelu_tanh', 'silu'.*'relu'",
     lambda: _glu(x, None, x, None, activation="relu")),
    ("glu-shape", ValueError, r"up .*\(3, 4\).*\(3, 5\)",
     lambda: _glu(x, None, t(3, 5), None)),
    ("glu-dtype", TypeError, "up and gate .*bfloat16.*float32",
     lambda: _glu(x, None, t(3, 4, dtype=bf16), None)),
    ("glu-int", TypeError, "gate .*int64",
     lambda: _glu(t(3, 4, dtype=i64), None, x, None)),
    ("glu-one-tangent", ValueError, "both have a tangent, or neither",
     lambda: _glu(x, x, x, None)),
    ("glu-device", ValueError, "up is on meta",
     lambda: _glu(x, None, t(3, 4, device=meta), None)),
    ("rotary-ndim", ValueError, r"q must have 3 .*\(3, 4\)",
     lambda: rotary(x, None, x, None, t(3, 4), t(3, 4))),
    ("rotary-odd", ValueError, "even width .* 6, but has 5",
     lambda: rotary(q, None, kv, None, t(3, 5), t(3, 5))),
    ("rotary-too-wide", ValueError, "at most .* 6, but has 8",
     lambda: rotary(q, None, kv, None, t(3, 8), t(3, 8))),
    ("rotary-rows", ValueError, r"cos .*\(3, 6\).*\(2, 6\)",
     lambda: rotary(q, None, kv, None, t(2, 6), t(3, 6))),
    ("rotary-sin", ValueError, r"sin .*\(3, 6\).*\(3, 4\)",
     lambda: rotary(q, None, kv, None, t(3, 6), t(3, 4))),
    ("rotary-k", ValueError, r"k .*\(3, 2, 6\).*\(2, 2, 6\)",
     lambda: rotary(q, None, t(2, 2, 6), None, t(3, 6), t(3, 6))),
    ("rotary-device", ValueError, "cos is on meta",
     lambda: rotary(q, None, kv, None, t(3, 6, device=meta), t(3, 6))),
    ("rotary-one-tangent", ValueError, "both have a tangent",
     lambda: rotary(q, q, kv, None, t(3, 6), t(3, 6))),
    ("attention-ndim", ValueError, r"q must have 3 .*\(3, 4\)",
     lambda: _attention(x, kv, kv)),
    ("attention-v", ValueError, r"v .*\(3, 2, 6\).*\(3, 1, 6\)",
     lambda: _attention(q, kv, t(3, 1, 6))),
    ("attention-dtype", TypeError, "v and q .*bfloat16.*float32",
     lambda: _attention(q, kv, t(3, 2, 6, dtype=bf16))),
    ("attention-float16", TypeError, "q .*float16",
     lambda: _attention(t(3, 4, 6, dtype=f16), kv, kv)),
    ("attention-heads", ValueError, "multiple .* 4 and 3",
     lambda: _attention(q, t(3, 3, 6), t(3, 3, 6))),
    ("attention-lengths", TypeError, "cu_seqlens .*int32.*int64",
     lambda: _attention(q, kv, kv, t(2, dtype=i64))),
    ("attention-used", ValueError, r"seqused .*\(1,\).*\(2,\)",
     lambda: _attention(q, kv, kv, seqused=t(2, dtype=i32))),
    ("attention-used-dtype", TypeError, "seqused .*int64",
     lambda: _attention(q, kv, kv, seqused=t(1, dtype=i64))),
    ("attention-window", ValueError, "at least 1, or None.*is 0",
     lambda: _attention(q, kv, kv, window=0)),
    ("attention-device", ValueError, "v is on meta",
     lambda: _attention(q, kv, t(3, 2, 6, device=meta))),
    ("lora-weight", ValueError, r"\[d_out, 4\].*\(5, 3\)",
     lambda: _lora(x, weight=t(5, 3))),
    ("lora-dtype", TypeError, "weight and x .*float32.*bfloat16",
     lambda: _lora(t(3, 4, dtype=bf16))),
    ("lora-bias", ValueError, r"bias .*\(5,\).*\(4,\)",
     lambda: _lora(x, bias=t(4))),
    ("lora-only-a", ValueError, "both a and b",
     lambda: _lora(x, a=t(2, 4))),
    ("lora-a", ValueError, r"a .*\(2, 4\).*\(2, 3\)",
     lambda: _lora(x, a=t(2, 3), b=t(5, 2))),
    ("lora-b", ValueError, r"b .*\(5, 2\).*\(5, 3\)",
     lambda: _lora(x, a=t(2, 4), b=t(5, 3))),
    ("lora-pair-without-direction", ValueError, "both with x_dot",
     lambda: _lora(x, x, **_adapter())),
    ("lora-direction-without-pair", ValueError, "neither without",
     lambda: _lora(x, **_adapter(), a_dot=t(2, 4), b_dot=t(5, 2))),
    ("lora-direction-shape", ValueError, r"a_dot .*\(2, 4\).*\(3, 4\)",
     lambda: _lora(x, x, **_adapter(), a_dot=t(3, 4), b_dot=t(5, 2))),
    ("lora-device", ValueError, "a is on meta",
     lambda: _lora(x, **_adapter(meta))),
    ("lora-dropout-one", ValueError, r"\[0, 1\).*1.0",
     lambda: _lora(x, **_adapter(), dropout=1.0)),
    ("lora-dropout-seed", ValueError, "needs a seed: an int64 scalar",
     lambda: _lora(x, **_adapter(), dropout=0.5)),
    ("loss-weight", ValueError, r"weight .*\(9, 4\).*\(9, 5\)",
     lambda: linear_cross_entropy(x, None, t(9, 5), t(3, dtype=i64))),
    ("loss-targets", ValueError, r"targets .*\(3,\).*\(2,\)",
     lambda: linear_cross_entropy(x, None, t(9, 4), t(2, dtype=i64))),
    ("loss-targets-dtype", TypeError, "int64.*int32",
     lambda: linear_cross_entropy(x, None, t(9, 4), t(3, dtype=i32))),
    ("loss-device", ValueError, "weight is on meta",
     lambda: linear_cross_entropy(x, None, t(9, 4, device=meta), t(3, dtype=i64))),
    ("loss-int", TypeError, "x .*int64",
     lambda: linear_cross_entropy(t(3, 4, dtype=i64), None, t(9, 4), t(3, dtype=i64))),
]
# fmt: on


@pytest.mark.parametrize(
    ("exception", "message", "call"), [pytest.param(*rest, id=name) for name, *rest in REFUSED]
)
def test_refuses(exception: type[Exception], message: str, call: Callable[[], Any]) -> None:
    """The message names what was expected, then what came."""
    with pytest.raises(exception, match=message):
        call()


# Dropout


def test_dropout_mask_is_a_function_of_seed_and_salt(device: str) -> None:
    def mask(seed: int, salt: int) -> Tensor:
        return dropout_mask(torch.tensor(seed, device=device), salt, 40, 50, 0.5)

    assert torch.equal(mask(7, 3), mask(7, 3))
    for other in (mask(8, 3), mask(7, 4), mask(7 + 2**31, 3), mask(7, 3 + 2**31)):
        # Independent masks agree in half of their 2000 elements, give or take 22.
        assert 0.4 < float((other == mask(7, 3)).double().mean()) < 0.6


def test_dropout_mask_does_not_depend_on_its_extent(device: str) -> None:
    """Rows are told apart by number alone, whatever batch or chunk they are part of."""
    seed = torch.tensor(7, device=device)
    mask = dropout_mask(seed, 3, 40, 50, 0.5)
    assert torch.equal(dropout_mask(seed, 3, 11, 13, 0.5), mask[:11, :13])


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_dropout_mask_keeps_the_right_share(p: float, device: str) -> None:
    mask = dropout_mask(torch.tensor(2**40 + 1, device=device), 1, 600, 500, p).double()
    kept = mask != 0
    for share, n in ((kept.double().mean(), 300_000), (kept[0].double().mean(), 500)):
        assert abs(float(share) - (1 - p)) < 4 * (p * (1 - p) / n) ** 0.5
    # Neither rows nor columns may stand out: the shares of each scatter as independent draws do.
    for dim, n in ((0, 600), (1, 500)):
        spread = kept.double().mean(dim).std() / (p * (1 - p) / n) ** 0.5
        assert 0.85 < float(spread) < 1.15
    assert torch.equal(mask[kept], torch.full_like(mask[kept], float(torch.tensor(1 / (1 - p)))))
    assert abs(float(mask.mean()) - 1) < 4 * (p / (1 - p) / 300_000) ** 0.5


def test_both_halves_share_the_dropout_mask(device: str) -> None:
    """With W = 0, B A = 1 and the same x in both halves, y_dot can only equal y."""
    n = 16
    x = torch.randn(9, n, device=device)
    one, zero = torch.eye(n, device=device), torch.zeros(n, n, device=device)
    target = LoRATarget(zero, None, one, one, zero, zero, dropout=0.5, salt=2)
    seed = torch.tensor(5, device=device)
    ((y, y_dot),) = lora_linear(x, x, [target], seed=seed)
    assert y_dot is not None and torch.equal(y, y_dot)
    assert torch.equal(y, x * dropout_mask(seed, 2, 9, n, 0.5))


# What an op says beyond its pairs


def test_probe_rms_norm_returns_rstd_without_gradient(device: str) -> None:
    x = torch.randn(5, 8, dtype=torch.float64, device=device, requires_grad=True)
    weight = torch.ones(8, dtype=torch.float64, device=device)
    h, _, _, _, rstd = probe_rms_norm(x, None, x, None, None, weight, eps=1e-5)
    assert not rstd.requires_grad
    assert_agrees({"rstd": rstd}, {"rstd": (h.detach().square().mean(-1) + 1e-5).rsqrt()})


def test_probe_gradients_are_summed_before_they_are_rounded(device: str) -> None:
    """Many rows of equal cotangents, each of which bfloat16 would round the same way."""
    rows, d = 400, 4
    x = torch.zeros(rows, d, dtype=torch.bfloat16, device=device)
    x_dot = torch.zeros_like(x)
    weight = torch.full((d,), 1.0 + 2**-7, dtype=torch.bfloat16, device=device)
    probe = torch.zeros(2, d, device=device).requires_grad_()
    *_, y, y_dot, _ = probe_rms_norm(x, x_dot, x, x_dot, probe, weight, eps=1.0)
    dy = torch.full_like(x, 1.0 + 2**-7)
    torch.autograd.backward([y, y_dot], [dy, dy])
    # At x = 0 with eps = 1 the norm is a product with weight: each row adds (1 + 2^-7)^2.
    assert torch.equal(probe.grad, torch.full_like(probe, rows * (1.0 + 2**-7) ** 2))


def test_attention_leaves_rows_outside_of_sequences_alone(device: str) -> None:
    """Whatever they hold, NaN too, they give zero and disturb nobody."""
    lengths = torch.tensor([0, 5, 8], dtype=torch.int32, device=device)
    used = torch.tensor([3, 3], dtype=torch.int32, device=device)
    inside = torch.tensor([0, 1, 2, 5, 6, 7], device=device)
    clean = [torch.randn(2, 10, 2, 4, device=device) for _ in range(3)]
    dirty = [torch.full_like(x, torch.nan).index_copy(1, inside, x[:, inside]) for x in clean]
    results = []
    for q, k, v in (clean, dirty):
        leaves = [half.detach().requires_grad_() for x in (q, k, v) for half in x]
        o, o_dot = attention(*leaves, lengths, max_seqlen=5, scale=0.5, seqused=used)
        outside = o.detach().clone().index_fill(0, inside, 0)
        assert torch.equal(outside, torch.zeros_like(outside))
        grads = torch.autograd.grad([o, o_dot], leaves, [torch.ones_like(o), torch.ones_like(o)])
        results.append([x[inside] for x in (o, o_dot, *grads)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


# Witnesses for the oracle


def test_oracle_against_finite_differences() -> None:
    """What ``dual.py`` says of the two cotangents, taken literally.

    That of the tangent half is the gradient of L = <f(x), c> and that of the primal half the change
    of this gradient along (x_dot, c_dot), with the cotangents (c_dot, c) of (y, y_dot). Both by
    differences of values of f alone.
    """

    def f(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return ((x.sin() * w).cumsum(0), x.exp().sum() * w)

    generator = rng("cpu")
    shapes = [(3, 4), (3, 4)]
    xs = [torch.randn(2, *s, generator=generator, dtype=f64) for s in shapes]
    dys = [torch.randn(2, *s, generator=generator, dtype=f64) for s in shapes]
    probes = [torch.randn(s, generator=generator, dtype=f64) for s in shapes]

    def moved(step: float, along: float = 0.0) -> list[Tensor]:
        return [x[0] + step * x[1] + along * r for x, r in zip(xs, probes, strict=True)]

    # The error of central differences is of order h^2; that of rounding 1e-16 / h, and 1e-16 / h^2.
    h = 1e-5
    for y, plus, minus in zip(pushforward(f, *xs), f(*moved(h)), f(*moved(-h)), strict=True):
        torch.testing.assert_close(y[1], (plus - minus) / (2 * h), rtol=1e-8, atol=1e-8)

    def scalar(step: float, along: float) -> float:
        cotangents = [dy[1] + step * dy[0] for dy in dys]
        pairs = zip(f(*moved(step, along)), cotangents, strict=True)
        return float(sum((y * c).sum() for y, c in pairs))

    dxs = pullback(f, tuple(xs), tuple(dys))
    gradient = sum(float((dx[1] * r).sum()) for dx, r in zip(dxs, probes, strict=True))
    assert (scalar(0, h) - scalar(0, -h)) / (2 * h) == pytest.approx(gradient, rel=1e-8)
    change = sum(float((dx[0] * r).sum()) for dx, r in zip(dxs, probes, strict=True))
    h = 1e-4
    mixed = scalar(h, h) - scalar(h, -h) - scalar(-h, h) + scalar(-h, -h)
    assert mixed / (4 * h * h) == pytest.approx(change, rel=1e-6)


def test_rms_norm_against_formulas_by_hand() -> None:
    """With rho = (mean x^2 + eps)^(-1/2) and rho_dot its tangent."""
    x, x_dot, dy, dy_dot = torch.randn(4, 7, 12, dtype=f64)
    weight, eps = torch.randn(12, dtype=f64), 1e-5

    def mean(x: Tensor) -> Tensor:
        return x.mean(-1, keepdim=True)

    rho = (mean(x * x) + eps).rsqrt()
    rho_dot = -(rho**3) * mean(x * x_dot)
    g, g_dot = weight * dy, weight * dy_dot
    y_dot = weight * (x_dot * rho + x * rho_dot)
    dx_dot = rho * g_dot - rho**3 * x * mean(x * g_dot)
    dx = (
        rho * g
        - rho**3 * x * mean(x * g)
        + rho_dot * g_dot
        - rho**3 * (x_dot * mean(x * g_dot) + x * mean(x_dot * g_dot))
        - 3 * rho**2 * rho_dot * x * mean(x * g_dot)
    )

    raw = torch.ops.sap_fast
    xs = torch.stack((x, x_dot))
    y, rstd = raw.rms_norm(xs, weight, eps, 0.0)
    dxs = raw.rms_norm_backward(torch.stack((dy, dy_dot)), xs, rstd, weight, eps, 0.0)
    actual = {"y": y[0], "y_dot": y[1], "rstd": rstd, "dx": dxs[0], "dx_dot": dxs[1]}
    by_hand = {"y": weight * x * rho, "y_dot": y_dot, "dx": dx, "dx_dot": dx_dot}
    by_hand["rstd"] = torch.stack((rho, rho_dot))[..., 0]
    assert_agrees(actual, by_hand)


def test_attention_against_formulas_by_hand() -> None:
    """One sequence, one head; P = softmax(c Q K'), mu = rowsum(P S_dot)."""
    t, d = 9, 6
    Q, Q_dot, K, K_dot, V, V_dot, dO, dO_dot = torch.randn(8, t, d, dtype=f64)
    c, mask = d**-0.5, torch.full((t, t), -torch.inf, dtype=f64).triu(1)

    def total(x: Tensor) -> Tensor:
        return x.sum(-1, keepdim=True)

    scores = c * Q @ K.T + mask
    P, S_dot = scores.softmax(-1), c * (Q_dot @ K.T + Q @ K_dot.T)
    mu = total(P * S_dot)
    P_dot = P * (S_dot - mu)
    O, O_dot = P @ V, P @ V_dot + P_dot @ V  # noqa: E741
    dP_dot, dP = dO_dot @ V.T, dO @ V.T + dO_dot @ V_dot.T
    delta_dot, delta = total(dO_dot * O), total(dO * O + dO_dot * O_dot)
    dS_dot = P * (dP_dot - delta_dot)
    dS = P_dot * (dP_dot - delta_dot) + P * (dP - delta)
    by_hand = {
        "o": O,
        "o_dot": O_dot,
        "lse": scores.logsumexp(-1),
        "mu": mu[:, 0],
        "dq": c * (dS @ K + dS_dot @ K_dot),
        "dq_dot": c * dS_dot @ K,
        "dk": c * (dS.T @ Q + dS_dot.T @ Q_dot),
        "dk_dot": c * dS_dot.T @ Q,
        "dv": P.T @ dO + P_dot.T @ dO_dot,
        "dv_dot": P.T @ dO_dot,
    }

    raw = torch.ops.sap_fast
    qkv = [torch.stack(pair)[:, :, None] for pair in ((Q, Q_dot), (K, K_dot), (V, V_dot))]
    constants = torch.tensor([0, t], dtype=torch.int32), None, t, c, 0
    o, lse = raw.attention(*qkv, *constants)
    do = torch.stack((dO, dO_dot))[:, :, None]
    grads = raw.attention_backward(do, *qkv, o, lse, *constants)
    actual = {"o": o[0, :, 0], "o_dot": o[1, :, 0], "lse": lse[0, :, 0], "mu": lse[1, :, 0]}
    for name, grad in zip("qkv", grads, strict=True):
        actual |= {f"d{name}": grad[0, :, 0], f"d{name}_dot": grad[1, :, 0]}
    assert_agrees(actual, by_hand)
