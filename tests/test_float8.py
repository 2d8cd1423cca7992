"""float8: what is rounded is off by its rounding, and what must stay exact stays so in every bit."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from oracle import ALL_LINEAR, random_batch, random_pairs, tiny_model
from steps import CONFIG, gap, grads
from torch import Tensor, nn

import sap_fast
from benchmarks.common import solved
from sap_fast import UnsupportedModelError
from sap_fast.batch.rows import pack, pack_pairs
from sap_fast.method.passes import Micro
from sap_fast.method.probe import Probe
from sap_fast.model.float8 import float8_weights
from sap_fast.model.read import read_decoder
from sap_fast.ops import Group, LoRATarget, lora_linear_grouped
from sap_fast.ops.lora_linear.float8 import Float8Weight, product, rounded

EMULATED = CONFIG.replace(float8="emulated")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
HOPPER = torch.cuda.is_available() and not torch.version.hip and torch.cuda.get_device_capability() >= (9, 0)
needs_hopper = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HOPPER, reason="needs an NVIDIA GPU of compute capability 9.0 or newer"),
]


def off(x: Tensor) -> Tensor:
    """Bound how far rounding may move each element: 3 bits of mantissa, down to the least that e4m3 holds.

    Half a unit in the last place is 2^-4 of a normal number and 2^-10 of a subnormal one's unit, which here is the
    row's largest element over 448. The quotient and the scale are rounded to float32 besides.
    """
    scale = x.abs().amax(-1, keepdim=True) / 448
    return torch.maximum(2**-4 * x.abs(), 2**-10 * scale) * (1 + 2**-20)


# Rounding


def test_rounding_is_that_of_e4m3() -> None:
    x = torch.randn(50, 64) * 10.0 ** torch.randint(-9, 9, (50, 1)) * 10.0 ** torch.randint(-4, 1, (50, 64))
    x[3] = 0
    values, scale = rounded(x)
    assert values.dtype == torch.float8_e4m3fn and values.is_contiguous() and scale.shape == (50, 1)
    found = values.float() * scale
    assert (found - x).abs().le(off(x)).all() and found[3].eq(0).all()
    assert (found != x).any()
    # The largest of each row is kept to float32's roundings.
    largest = x.abs().amax(1)
    assert torch.allclose(found.abs().amax(1), largest, rtol=4 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_rounding_widens(dtype: torch.dtype) -> None:
    x = torch.randn(5, 7).to(dtype)
    for found, expected in zip(rounded(x.t()), rounded(x.t().float().contiguous()), strict=True):
        assert torch.equal(found.float(), expected.float())


# Products


def test_torchs_product_is_the_emulated_one(device: str) -> None:
    """Products of e4m3 are exact in float32; sums, and with them roundings to bfloat16, differ."""
    if device == "cuda" and not HOPPER:
        pytest.skip("needs an NVIDIA GPU of compute capability 9.0 or newer")
    x, weight = torch.randn(37, 64, device=device), torch.randn(48, 64, device=device)
    weight[:, ::7] *= 100
    for matrix in (weight, weight.t().contiguous().t()):
        outs = []
        for emulated in (False, True):
            out = torch.empty(2, 37, 48, dtype=torch.bfloat16, device=device)
            product(rounded(x), rounded(matrix), out[1], emulated=emulated)
            outs.append(out[1].float())
        # One unit in the last place of bfloat16; where terms cancel, of what their sum leaves of their size: on a CPU
        # float32's roundings, while Hopper's tensor cores keep 14 bits of the largest term they add to others.
        terms = x.abs() @ matrix.abs().t()
        left = ((outs[0] - outs[1]).abs() - 2**-7 * outs[1].abs()) / terms
        assert float(left.max()) <= (2**-13 if device == "cuda" else 2**-18)


def targets(dtype: torch.dtype, *, float8: bool, pair: bool, device: str = "cpu") -> list[LoRATarget]:
    rng = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng).to(device)

    found = []
    for i, d_out in enumerate((48, 16)):
        weight = normal(d_out, 32).to(dtype)
        a, b, a_dot, b_dot = normal(3, 32), normal(d_out, 3), normal(3, 32), normal(d_out, 3)
        tangents = (a_dot, b_dot) if pair else (None, None)
        held = Float8Weight.of(weight, emulated=device == "cpu") if float8 else None
        found.append(LoRATarget(weight, normal(d_out).to(dtype), a, b, *tangents, 0.5, 0.25 * i, i, held))
    return found


def through(part: Group, dys: list[Tensor], *, full: bool = True) -> dict[str, Tensor]:
    """Compute outputs and gradients of one part alone."""
    x = part.x.detach().requires_grad_(full)
    x_dot = None if part.x_dot is None else part.x_dot.detach().requires_grad_()
    ((*pairs,),) = lora_linear_grouped([part._replace(x=x, x_dot=x_dot)])
    ys = {f"y{i}{'_dot' * k}": y for i, pair in enumerate(pairs) for k, y in enumerate(pair) if y is not None}
    wanted = {name: y for name, y in ys.items() if y.requires_grad}
    leaves = [t for t in (x, x_dot) if t is not None and t.requires_grad]
    own = [dy for name, dy in zip(ys, dys, strict=True) if name in wanted]
    found = torch.autograd.grad(list(wanted.values()), leaves, own)
    names = ["dx"] * full + ["dx_dot"] * (x_dot is not None)
    return {name: y.detach() for name, y in ys.items()} | dict(zip(names, found, strict=True))


def posed(dtype: torch.dtype, *, float8: bool, pair: bool, device: str = "cpu") -> tuple[Group, list[Tensor]]:
    maps = targets(dtype, float8=float8, pair=pair, device=device)
    rng = torch.Generator().manual_seed(2)
    x, x_dot = (torch.randn(5, 32, generator=rng).to(device, dtype) for _ in range(2))
    dys = [torch.randn(5, d, generator=rng).to(device, dtype) for d in (48, 16) for _ in range(1 + pair)]
    return Group(x, x_dot if pair else None, maps, torch.tensor(7, device=device)), dys


def allowed(part: Group, dys: list[Tensor], pair: bool) -> dict[str, Tensor]:
    """Bound how far products of rounded operands are from exact ones: ``|x| dW + dx |W| + dx dW``, summed."""

    def of(x: Tensor, weight: Tensor) -> Tensor:
        x, weight = x.float(), weight.float()
        return x.abs() @ off(weight).t() + off(x) @ (weight.abs() + off(weight)).t()

    weights = [target.weight for target in part.targets]
    x = part.x_dot if pair else part.x
    assert x is not None
    limits = {f"y{i}{'_dot' * pair}": of(x, w) for i, w in enumerate(weights)}
    limits["dx"] = torch.stack([of(dy, w.t()) for dy, w in zip(dys[:: 1 + pair], weights, strict=True)]).sum(0)
    return limits


@DTYPES
@pytest.mark.parametrize("pair", [False, True], ids=["ordinary", "pair"])
def test_products_are_off_by_their_operands_rounding(pair: bool, dtype: torch.dtype) -> None:
    (exact, dys), (quick, _) = (posed(dtype, float8=f, pair=pair) for f in (False, True))
    expected, found = through(exact, dys), through(quick, dys)
    limits = allowed(exact, dys, pair)
    assert found.keys() == expected.keys()
    for name, limit in limits.items():
        difference = (found[name].float() - expected[name].float()).abs()
        # Each output is rounded to storage besides, once as a product and once with its adapter.
        size = found[name].float().abs() + expected[name].float().abs() + limit
        assert (difference <= limit + 2 * torch.finfo(dtype).eps * size).all(), name
        assert difference.max() > 1e-2 * limit.max()  # so it is rounded at all
    for name in found.keys() - limits.keys():
        assert torch.equal(found[name], expected[name]), name


@DTYPES
def test_half_mode_rounds_nothing_backward(dtype: torch.dtype) -> None:
    (exact, dys), (quick, _) = (posed(dtype, float8=f, pair=True) for f in (False, True))
    expected, found = through(exact, dys, full=False), through(quick, dys, full=False)
    assert found.keys() == expected.keys() and "dx_dot" in found and "dx" not in found
    for name in found:
        assert torch.equal(found[name], expected[name]) == (name not in ("y0_dot", "y1_dot")), name


@needs_hopper[0]
@needs_hopper[1]
@pytest.mark.parametrize("pair", [False, True], ids=["ordinary", "pair"])
def test_the_device_agrees_with_the_emulation(pair: bool) -> None:
    """Products of e4m3 are exact in float32, so only the order of sums and the rounding of results differ."""
    found = through(*posed(torch.bfloat16, float8=True, pair=pair, device="cuda"))
    expected = through(*posed(torch.bfloat16, float8=True, pair=pair))
    for name in expected:
        scale = float(expected[name].float().abs().max())
        # A result on the edge between two bfloat16 numbers may fall to either side, in the product and in the sum.
        assert float((found[name].cpu().float() - expected[name].float()).abs().max()) <= 2 * 2**-8 * scale, name


def test_targets_that_make_no_sense_are_refused() -> None:
    part, _ = posed(torch.float32, float8=True, pair=False)
    with pytest.raises(ValueError, match="1 of 2 targets have a weight in float8"):
        lora_linear_grouped([part._replace(targets=[part.targets[0], part.targets[1]._replace(float8=None)])])
    pair, _ = posed(torch.float32, float8=False, pair=True)
    with pytest.raises(ValueError, match=r"groups\[1\] is a dual"):
        lora_linear_grouped([part, pair])
    other, _ = posed(torch.float32, float8=False, pair=False)
    with pytest.raises(ValueError, match=r"groups\[1\] has other weights"):
        lora_linear_grouped([part, other])


# A step


def wide_model(dtype: torch.dtype = torch.float32, **settings: Any) -> nn.Module:
    return tiny_model(targets=ALL_LINEAR, dtype=dtype, **settings)


@DTYPES
@pytest.mark.parametrize("depth", [(1, 2), (3,)])
def test_loss_and_gradient_of_the_dual_pass_stay_exact(dtype: torch.dtype, depth: tuple[int, ...]) -> None:
    """They stay exact in every bit along the same direction; what depends on the tangents does not.

    Products are of half as many rows then. torch's on a CPU add up in the same order at these sizes; larger ones in
    bfloat16 do not always.
    """
    model, batch = wide_model(dtype, adapter_dtype=torch.float32), random_batch()
    decoder = read_decoder(model)
    rounding = replace(decoder, float8=float8_weights(decoder, emulated=True))
    sizes: dict[str, Any] = {"vocab_size": decoder.vocab_size, "device": decoder.device}
    zero = torch.zeros(len(depth), decoder.hidden_size)
    probe = Probe(depth, 0.1 * torch.randn_like(zero), zero, zero)
    rows, contrast = pack(batch, **sizes), pack_pairs(random_pairs(), **sizes)
    with decoder.installed():
        exact, quick = (solved.direction(d, contrast, {}, CONFIG).u for d in (decoder, rounding))
        expected, found = (solved.dual(d, [Micro(rows, None)], probe, exact) for d in (decoder, rounding))
        ordinary = [solved.ordinary(d, [Micro(rows, None)], probe) for d in (decoder, rounding)]
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(found.theta.vector, expected.theta.vector)
    assert torch.equal(found.probe, expected.probe) and torch.equal(found.rms, expected.rms)
    assert torch.equal(ordinary[0].theta.vector, ordinary[1].theta.vector)
    for a, b in ((found.probe_dot.flatten(), expected.probe_dot.flatten()), (quick.vector, exact.vector)):
        # Single products are off by a few percent, at random.
        assert 0 < float((a - b).norm() / b.norm()) < 0.5
        assert float(torch.nn.functional.cosine_similarity(a, b, 0)) > 0.9


@pytest.mark.parametrize("delayed", [False, True])
def test_a_step_leaves_the_gradient_at_its_probe(delayed: bool) -> None:
    """The gradient of the weights is exact, however the probe was found, with the pairs or without."""
    model, batches, pairs = (
        wide_model(torch.float64),
        [random_batch() for _ in range(2)],
        [random_pairs(), random_pairs()],
    )
    decoder = read_decoder(model)
    with sap_fast.attach(model, EMULATED.replace(delayed_direction=delayed)) as sap:
        sap.step(batches[0], pairs[0])
        vectors = sap.probe
        model.zero_grad()
        report = sap.step(batches[1], pairs[1])
    zero = torch.zeros(2, decoder.hidden_size, dtype=torch.float64)
    probe = Probe((1, 2), torch.stack(list(vectors.values())), zero, zero)
    rows = pack(batches[1], vocab_size=decoder.vocab_size, device=decoder.device)
    with decoder.installed():
        expected = solved.ordinary(decoder, [Micro(rows, None)], probe)
    # Sums of a dual pass come in another order than those of an ordinary one.
    assert gap(grads(model), dict(expected.theta)) < 1e-12
    assert float(abs(report.loss - expected.loss)) < 1e-12


def test_pairs_that_run_along_are_rounded_as_by_themselves() -> None:
    model = wide_model(torch.float64)
    batches, pairs = [random_batch() for _ in range(2)], [random_pairs() for _ in range(2)]
    outcomes = []
    for delayed, second in ((True, 1), (False, 0)):
        model.zero_grad()
        with sap_fast.attach(model, EMULATED.replace(delayed_direction=delayed, probe_update="normalised")) as sap:
            sap.step(batches[0], pairs[0])
            # Without an optimizer the direction of pairs[0] is that of the first step.
            sap.step(batches[1], pairs[second])
            outcomes.append((grads(model), sap.probe))
    (gradient, probe), (expected, expected_probe) = outcomes
    assert gap(gradient, expected) < 1e-12
    # A sum in another order may tip a rounding of an element to float8, one of some thousands.
    assert gap(probe, expected_probe) < 1e-2


def test_steps_in_all_schedules_come_near() -> None:
    model, batches, pairs = wide_model(), [random_batch() for _ in range(2)], [random_pairs() for _ in range(2)]
    for settings in (
        {"schedule": "fresh", "restart": "store"},
        {"schedule": "fresh", "restart": "recompute"},
        {"guard": "probe+project"},
        {"tangent_fraction": 0.4},
        {"probe_every": 2},
    ):
        found = []
        for float8 in (False, "emulated"):
            torch.manual_seed(3)
            model.zero_grad()
            config = CONFIG.replace(float8=float8, probe_update="normalised", strength=0.01, **settings)
            with sap_fast.attach(model, config) as sap:
                for batch, pair in zip(batches, pairs, strict=True):
                    sap.step(batch, pair)
                found.append((grads(model), sap.probe))
        assert 0 < gap(found[1][1], found[0][1]) < 0.5, settings
        assert gap(found[1][0], found[0][0]) < 0.1, settings


def test_copies_go_with_the_handle() -> None:
    import gc
    import weakref

    model = wide_model()
    sap = sap_fast.attach(model, EMULATED)
    held = sap.decoder.float8
    assert held is not None and len(held) == 4 * 7
    copy = weakref.ref(next(iter(held.values())).by_rows.values)
    del held
    sap.detach()
    gc.collect()
    assert copy() is None


def test_weights_that_were_written_to_are_refused() -> None:
    model, batch, pairs = wide_model(), random_batch(), random_pairs()
    base: Any = model.get_base_model()
    with sap_fast.attach(model, EMULATED) as sap:
        sap.step(batch, pairs)
        with torch.no_grad():
            base.model.layers[2].mlp.up_proj.base_layer.weight.mul_(2)
        with pytest.raises(UnsupportedModelError, match=r"layers\.2\.up_proj has changed since attach"):
            sap.step(batch, pairs)
