"""Tensors kept as one vector."""

import pytest
import torch
from oracle import lora, random_batch, random_pairs, tiny_model
from steps import CONFIG
from torch import Tensor

import sap_fast
from sap_fast.method.flat import Flat


def tensors(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {"a": torch.randn(3, 2).to(dtype), "b": torch.randn(4).to(dtype), "c": torch.randn(1, 5).to(dtype)}


def test_a_flat_is_a_mapping_to_the_same_tensors() -> None:
    x = tensors()
    found = Flat.of(x)
    assert list(found) == list(x)
    assert all(torch.equal(found[name], t) for name, t in x.items())
    assert found.vector.shape == (15,)


def test_arithmetic_is_that_of_each_tensor() -> None:
    x, y, half = tensors(), tensors(), torch.tensor(0.5, dtype=torch.float64)
    a, b = Flat.of(x), Flat.of(y)
    for found, truth in (
        (a + b, {k: x[k] + y[k] for k in x}),
        (a - b, {k: x[k] - y[k] for k in x}),
        (a * half, {k: x[k] / 2 for k in x}),
        (a / half, {k: x[k] * 2 for k in x}),
    ):
        assert all(torch.equal(found[name], t) for name, t in truth.items())
    assert float(a.dot(b)) == pytest.approx(sum(float((x[k] * y[k]).sum()) for k in x), rel=1e-14)
    assert float(a.norm()) == pytest.approx(float(torch.cat([t.flatten() for t in x.values()]).norm()), rel=1e-14)


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
    ids=str,
)
def test_missing_values_are_zero_and_dtypes_wide(dtype: torch.dtype, wide: torch.dtype) -> None:
    like, values = tensors(dtype), tensors(dtype)
    found = Flat.of(like, [values["a"], None, values["c"].mT.contiguous().mT])
    assert found.vector.dtype == wide
    assert torch.equal(found["a"], values["a"].to(wide))
    assert torch.equal(found["b"], torch.zeros(4, dtype=wide))
    assert torch.equal(found["c"], values["c"].to(wide))
    assert float(Flat.of(like, [None] * 3).norm()) == 0
    back = found.copies(like)
    assert all(t.dtype == dtype for t in back.values())
    assert torch.equal(back["a"], values["a"])


def test_other_names_shapes_or_order_are_refused() -> None:
    x = tensors()
    others = {"b": x["b"], "a": x["a"], "c": x["c"]}, {**x, "a": x["a"].mT}, {**x, "d": x["a"]}
    for other in others:
        with pytest.raises(ValueError, match="other names or shapes"):
            Flat.of(x).dot(Flat.of(other))


def test_the_norm_of_a_long_float32_vector_is_exact_to_its_rounding() -> None:
    """A sum of one square after another is wrong by 4e-4 here."""
    x = torch.randn(10_000_000)
    assert float(Flat.of({"x": x}).norm()) == pytest.approx(float(x.double().norm()), rel=1e-6)


def test_gradients_share_no_memory() -> None:
    """A gradient that is kept or saved would otherwise drag all others along."""
    model, batch, pairs = tiny_model(), random_batch(), random_pairs()
    with sap_fast.attach(model, CONFIG) as sap:
        for _ in range(2):  # written, then added to
            sap.step(batch, pairs)
            for p in lora(model).values():
                assert p.grad is not None
                assert p.grad.untyped_storage().nbytes() == p.numel() * p.element_size()
