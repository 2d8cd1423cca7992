"""lora_linear on several streams at once: what each of them gets is what it gets alone."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import DEVICES
from torch import Tensor

from sap_fast import _C
from sap_fast.ops import Group, LoRATarget, lora_linear, lora_linear_grouped
from sap_fast.ops._library import references_on_cpu

f64 = torch.float64
pytestmark = pytest.mark.usefixtures("poisoned_memory")
# d_out and rank of each target; no adapter where the rank is 0.
WIDTHS = ((9, 2), (3, 0), (4, 3))


@pytest.fixture(params=["cpu", *(["reference"] if _C.loaded else []), *DEVICES[1:]])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The devices of every test, and a CPU whose C++ kernels, if it has some, step aside for the reference rules."""
    if request.param != "reference":
        yield request.param
        return
    with references_on_cpu():
        yield "cpu"


def posed(device: str, rows: tuple[int, ...] = (5, 7, 4), *, pair: bool = True) -> list[Group]:
    """Streams through the same frozen maps, each with adapters, dropout and a seed of its own; the first is a dual."""
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int, grad: bool = True) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=f64).to(device).requires_grad_(grad)

    weights = [normal(d_out, 6, grad=False) for d_out, _ in WIDTHS]
    biases = [normal(d_out, grad=False) if i else None for i, (d_out, _) in enumerate(WIDTHS)]
    parts = []
    for i, count in enumerate(rows):
        paired = pair and i == 0
        targets = []
        for j, (weight, bias, (d_out, rank)) in enumerate(zip(weights, biases, WIDTHS, strict=True)):
            shapes = ((rank, 6), (d_out, rank)) * 2 if rank else ()
            a, b, a_dot, b_dot = (normal(*shape) for shape in shapes) if rank else (None,) * 4
            tangents = (a_dot, b_dot) if paired else (None, None)
            targets.append(LoRATarget(weight, bias, a, b, *tangents, 0.5 + i, 0.3 * (i != 1), j + 1))
        seed = torch.tensor(7 + i, device=device)
        parts.append(Group(normal(count, 6), normal(count, 6) if paired else None, targets, seed))
    return parts


def results(parts: list[Group], of: list[list[Any]]) -> list[Tensor]:
    """Compute the outputs and, at random cotangents, the gradients of everything that requires grad."""
    outputs = [y for pairs in of for pair in pairs for y in pair if y is not None]
    rng = torch.Generator().manual_seed(1)
    dys = [torch.randn(y.shape, generator=rng, dtype=f64).to(y.device) for y in outputs]
    through = [(y, dy) for y, dy in zip(outputs, dys, strict=True) if y.requires_grad]
    given = [t for part in parts for t in (part.x, part.x_dot, *(t for target in part.targets for t in target[2:6]))]
    leaves = [t for t in given if t is not None and t.requires_grad]
    ys, cotangents = zip(*through, strict=True)
    found = torch.autograd.grad(ys, leaves, cotangents, allow_unused=True)
    return [*outputs, *(torch.zeros(()) if grad is None else grad for grad in found)]


def constant_x(part: Group) -> Group:
    return part._replace(x=part.x.detach())


def constant(part: Group) -> Group:
    return part._replace(x=part.x.detach(), x_dot=None if part.x_dot is None else part.x_dot.detach())


# Of float64: products of more rows, and sums of terms formed elsewhere, may add up in another order.
ROUNDING = {"rtol": 1e-12, "atol": 1e-13}
MODES = {
    "full": lambda parts: parts,
    "half": lambda parts: [constant_x(parts[0]), *parts[1:]],
    "first layer": lambda parts: [constant(part) for part in parts],
    "one without dx": lambda parts: [parts[0], constant(parts[1]), parts[2]],
    "pair without dx": lambda parts: [constant(parts[0]), *parts[1:]],
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pair", [False, True])
def test_each_gets_what_it_gets_alone(mode: str, pair: bool, device: str) -> None:
    parts = MODES[mode](posed(device, pair=pair))
    together = results(parts, lora_linear_grouped(parts))
    alone = results(parts, [lora_linear_grouped([part])[0] for part in parts])
    assert len(together) == len(alone) > 12
    for found, expected in zip(together, alone, strict=True):
        # Sums of 6 products, or of some rows, in another order.
        torch.testing.assert_close(found, expected, **ROUNDING)


def test_what_is_not_used_counts_as_zero(device: str) -> None:
    parts = posed(device)
    leaf = parts[1].x
    ys = lora_linear_grouped(parts)
    (found,) = torch.autograd.grad(ys[1][2][0].sum(), leaf)
    (expected,) = torch.autograd.grad(lora_linear_grouped([parts[1]])[0][2][0].sum(), leaf)
    torch.testing.assert_close(found, expected, **ROUNDING)


def constants(part: Group) -> tuple:
    adapters = ([target[j] for target in part.targets] for j in range(2, 6))
    detached = ([t if t is None else t.detach() for t in of] for of in adapters)
    numbers = ([target[j] for target in part.targets] for j in range(6, 9))
    return *detached, part.seed, *numbers


@pytest.mark.parametrize("pair", [False, True])
def test_the_ops_keep_their_schema(pair: bool, device: str) -> None:
    """Fake outputs, aliases and what is written to are as declared; and the whole op is product and rest."""
    part = posed(device, (5,), pair=pair)[0]
    x = part.x.detach()[None] if part.x_dot is None else torch.stack((part.x.detach(), part.x_dot.detach()))
    weights, biases = ([target[j] for target in part.targets] for j in range(2))
    raw = torch.ops.sap_fast
    ys = [x @ weight.t() for weight in weights]
    torch.library.opcheck(raw.lora_linear_.default, ([y.clone() for y in ys], x, biases, *constants(part)))
    raw.lora_linear_(ys, x, biases, *constants(part))
    for found, expected in zip(ys, raw.lora_linear(x, weights, biases, *constants(part)), strict=True):
        torch.testing.assert_close(found, expected, **ROUNDING)
    dys = [torch.randn_like(y) for y in ys]
    products = [dy @ weight for dy, weight in zip(dys, weights, strict=True)]
    rest = dys, x, *constants(part)
    # Not for torch.compile: it takes no op that both writes to an input and returns a list.
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(raw.lora_linear_backward_.default, ([p.clone() for p in products], *rest), test_utils=checks)
    for given in (products, [sum(products)], []):
        given = [product.clone() for product in given]
        das, dbs = raw.lora_linear_backward_(given, *rest)
        dx, *expected = raw.lora_linear_backward(dys, x, weights, *constants(part), bool(given))
        if given:
            torch.testing.assert_close(given[0], dx, **ROUNDING)
        for found, wanted in zip((*das, *dbs), (*expected[0], *expected[1]), strict=True):
            torch.testing.assert_close(found, wanted, **ROUNDING)


@pytest.mark.skipif(not _C.loaded, reason=f"the C++ kernels are not loaded: {_C.status}")
def test_tensors_that_do_not_fit_are_refused() -> None:
    """The C++ kernels are called themselves: they must not write behind a tensor."""
    part = posed("cpu", (5,), pair=False)[0]
    x, biases = part.x.detach()[None], [target.bias for target in part.targets]
    ys = [torch.randn(1, 5, d_out, dtype=f64) for d_out, _ in WIDTHS]
    raw, rest = torch.ops.sap_fast, constants(part)
    for wrong in (ys[0][:, :4], ys[0].float(), ys[0].mT.contiguous().mT, torch.randn(1, 5, 8, dtype=f64)):
        with pytest.raises(RuntimeError, match="must be"):
            raw.lora_linear_([wrong, *ys[1:]], x, biases, *rest)
    product = torch.randn(1, 5, 6, dtype=f64)
    for wrong in (product[:, :4], product.float(), product.mT.contiguous().mT):
        with pytest.raises(RuntimeError, match="product must be"):
            raw.lora_linear_backward_([wrong], ys, x, *rest)
    with pytest.raises(RuntimeError, match="dy must be"):
        raw.lora_linear_backward_([product], [ys[0][:, :4], *ys[1:]], x, *rest)


def test_without_adapters_no_input_is_kept() -> None:
    """The frozen products' backward needs weights alone; q and v's adapters need what they read."""
    x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(6, 8)
    a, b = torch.randn(2, 8, requires_grad=True), torch.randn(6, 2, requires_grad=True)
    kept: list[tuple[int, ...]] = []

    def pack(saved: Tensor) -> Tensor:
        kept.append(tuple(saved.shape))
        return saved

    for target, shapes in ((LoRATarget(weight), set()), (LoRATarget(weight, None, a, b), {(1, 5, 8)})):
        for call in (
            lambda t=target: lora_linear(x, None, [t]),
            lambda t=target: lora_linear_grouped([Group(x, None, [t]), Group(x, None, [t])])[1],
        ):
            kept.clear()
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
                ((y, _),) = call()
            assert {shape for shape in kept if shape[-1:] == (8,) and len(shape) == 3} == shapes
            (dx,) = torch.autograd.grad(y.sum(), [x], retain_graph=True)
            expected = torch.ones(5, 6) @ (weight if not shapes else weight + target.scaling * (b @ a).detach())
            torch.testing.assert_close(dx, expected)
