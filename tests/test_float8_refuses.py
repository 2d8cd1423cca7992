"""Float8 where it cannot serve: each device, dtype, size and setting is refused by name, before any work."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from oracle import tiny_model
from steps import CONFIG
from test_float8 import wide_model
from torch import Tensor

import sap_fast
from sap_fast import SAPConfig, UnsupportedModelError
from sap_fast.model.read import read_decoder
from sap_fast.ops.lora_linear.float8 import product, refusal_to_write, rounded


def test_a_cpu_has_no_float8() -> None:
    model = wide_model(torch.bfloat16, adapter_dtype=torch.float32)
    with pytest.raises(ValueError, match="float8=True needs an NVIDIA GPU, but the model is on cpu; float8='emulated'"):
        sap_fast.attach(model, SAPConfig(float8=True))
    with sap_fast.attach(model, CONFIG):
        pass  # it was not marked as attached


class Device:
    """Stands for a GPU of some compute capability."""

    def __init__(self, patch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
        from sap_fast.model import float8

        patch.setattr(float8.torch.cuda, "get_device_capability", lambda device: capability)
        patch.setattr(float8.torch.cuda, "get_device_name", lambda device: "Some GPU")
        patch.setattr(type(read_decoder(wide_model())), "device", torch.device("cuda"))


def test_a_device_for_which_torch_has_no_product_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from sap_fast.model import float8

    def missing(*args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("no such kernel\nat all")

    monkeypatch.setattr(float8, "product", missing)
    monkeypatch.setattr(float8.torch.cuda, "get_device_name", lambda device: "Some GPU")
    with pytest.raises(ValueError, match=r"forms no such product on Some GPU \(no such kernel at all\); float8='emul"):
        float8._try(torch.device("cpu"))


@pytest.fixture
def asked_once() -> Iterator[None]:
    """What torch can do is asked once for each device; here it changes from test to test."""
    refusal_to_write.cache_clear()
    yield
    refusal_to_write.cache_clear()


@pytest.mark.usefixtures("asked_once")
@pytest.mark.parametrize("writes", [True, False])
def test_where_torch_does_not_write_products_in_place_they_are_copied(
    monkeypatch: pytest.MonkeyPatch, writes: bool
) -> None:
    """Results are the same, and a warning says why."""
    from sap_fast.model import float8

    given: list[bool] = []

    def scaled_mm(a: Tensor, b: Tensor, *scales: Tensor, out_dtype: Any, use_fast_accum: bool, out: Any = None) -> Any:
        assert not use_fast_accum
        given.append(out is not None)
        if out is not None and not writes:
            raise RuntimeError("out= is not\nto be had")
        result = (a.float() @ b.float() * scales[0] * scales[1]).to(out_dtype)
        return result if out is None else out.copy_(result)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    x, weight = rounded(torch.randn(5, 32)), rounded(torch.randn(16, 32))
    found, expected = torch.empty(5, 16, dtype=torch.bfloat16), torch.empty(5, 16, dtype=torch.bfloat16)
    assert product(x, weight, found, emulated=False) is found
    assert torch.equal(found, product(x, weight, expected, emulated=True))
    assert given == ([True, True] if writes else [True, False])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        float8._try(torch.device("cpu"))
    assert [str(one.message).partition("(")[2].partition(")")[0] for one in told] == (
        [] if writes else ["out= is not to be had"]
    )


@pytest.mark.parametrize("capability", [(8, 0), (8, 9)])
def test_older_gpus_are_refused(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    Device(monkeypatch, capability)
    said = rf"needs compute capability 9\.0 \(Hopper\) or newer, but Some GPU has {capability[0]}\.{capability[1]}"
    with pytest.raises(ValueError, match=said):
        sap_fast.attach(wide_model(torch.bfloat16), SAPConfig(float8=True))


def test_other_dtypes_and_sizes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    Device(monkeypatch, (9, 0))
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.q_proj is torch\.float32, but float8=True"):
        sap_fast.attach(wide_model(), SAPConfig(float8=True))
    # Heads of 6 channels, 2 of them for keys.
    model = tiny_model("qwen3", dtype=torch.bfloat16)
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.q_proj is \(24, 32\): .* multiples of 16"):
        sap_fast.attach(model, SAPConfig(float8=True))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"float8": "e4m3"}, "float8 must be True, False or 'emulated', but is 'e4m3'"),
        ({"float8": 1}, "float8 must be True, False or 'emulated', but is 1"),
        ({"float8": True, "gradient": "finite_difference"}, "float8 belongs to gradient='dual'"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SAPConfig(**settings)
