"""The kernels' dropout draws the mask of ``dropout_mask``, bit for bit."""

import pytest
import torch
from triton_kernels import needs_kernels

from sap_fast.ops.lora_linear.dropout import dropout_mask

pytestmark = needs_kernels


@pytest.mark.parametrize("p", [1e-12, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("salt", [0, 7, 2**62 + 0xABCDEF])
@pytest.mark.parametrize("seed", [0, 2**40 + 17, -5, 2**63 - 1])
def test_mask(seed: int, salt: int, p: float, device: str) -> None:
    from dropout_kernel import mask

    counter = torch.tensor(seed, dtype=torch.int64, device=device)
    assert torch.equal(mask(counter, salt, 130, 67, p), dropout_mask(counter, salt, 130, 67, p))
