"""The kernel that rounds rows to float8 rounds as torch's ops do, bit for bit."""

from typing import Any

import pytest
import torch
from triton_kernels import INTERPRETED, needs_kernels

pytestmark = [
    needs_kernels[0],
    pytest.mark.gpu,
    # NumPy, which interprets, remarks on the infinities among the inputs.
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]
DEVICE = "cpu" if INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's own conversion to e4m3 loses the carry of what rounds up to a power of two: torch's instead."""
    if not INTERPRETED:
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    convert = InterpreterBuilder.create_fp_to_fp

    def to_e4m3(self: Any, src: Any, dst_type: Any, *rest: Any) -> Any:
        if dst_type.scalar != tl.float8e4nv:
            return convert(self, src, dst_type, *rest)
        values = torch.from_numpy(src.data).to(torch.float8_e4m3fn)
        return TensorHandle(values.view(torch.uint8).numpy(), tl.float8e4nv)

    monkeypatch.setattr(InterpreterBuilder, "create_fp_to_fp", to_e4m3)


def rows(width: int, dtype: torch.dtype) -> torch.Tensor:
    """Make rows of many magnitudes within a row and from row to row; of zeros; in float32 of subnormal numbers.

    In bfloat16 the interpreter loses those when it widens them.
    """
    x = torch.randn(8, width) * 10.0 ** torch.randint(-30, 30, (8, 1)) * 10.0 ** torch.randint(-4, 1, (8, width))
    x[2] = 0
    x[3, 0], x[4, 0] = 1e38, 0
    x[5] = 1e-40 if dtype == torch.float32 else 1e-37
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("width", [1, 16, 37, 576, 9000])
def test_rounds_as_torch_does(width: int, dtype: torch.dtype) -> None:
    from sap_fast.ops.lora_linear.float8 import rounded as expected
    from sap_fast.ops.lora_linear.float8_kernel import rounded

    x = rows(width, dtype)
    for given in (x, x.t().contiguous().t(), torch.cat((x, x), 1)[:, :width]):
        values, scale = rounded(given.to(DEVICE))
        wanted = expected(given)
        assert torch.equal(scale.cpu(), wanted.scale)
        assert values.is_contiguous()
        assert torch.equal(values.cpu().view(torch.uint8), wanted.values.view(torch.uint8))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_seen(bad: float) -> None:
    from sap_fast.ops.lora_linear.float8_kernel import rounded

    x = torch.randn(3, 40)
    x[1, 7] = bad
    values, scale = rounded(x.to(DEVICE))
    seen = (values.float() * scale).cpu().sum(1).isfinite()
    assert seen.tolist() == [True, False, True]
