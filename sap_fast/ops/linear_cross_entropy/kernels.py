"""Output head and cross-entropy of a dual: torch's matrix product, chunk by chunk, and its row kernels in Triton."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from sap_fast.ops._library import architecture
from sap_fast.ops._triton import Config, config, empty, launch
from sap_fast.ops.linear_cross_entropy.reference import combined

# Logits of one half that exist at once, in elements: 128 MiB in float32, whatever the vocabulary.
_CHUNK = 2**25


def vocab_config(arch: str) -> Config:
    """Look up the configuration of kernels that walk a row of logits: 8 of its elements for each thread."""
    return config(num_warps=4 if arch.startswith("gfx") else 8, BLOCK=2048)


@triton.jit(do_not_specialize=["out_half"])
def statistics_kernel(
    z, targets, nll, lse, z_half, out_half, VOCAB: tl.constexpr, DUAL: tl.constexpr, BLOCK: tl.constexpr
):
    """Compute ``lse = log sum exp z``, ``nll = lse - z_y``, ``lse_dot = sum p z_dot``, ``nll_dot = lse_dot - z_dot_y``.

    One program a row. Each lane keeps a maximum and sums of its own, so that lanes meet only once, at the end.
    """
    i_row = tl.program_id(0).to(tl.int64)
    # [BLOCK]. Not -inf, whose difference from itself is no number; exp(-1e38 - max) is 0 just so.
    b_max = tl.full([BLOCK], -1e38, dtype=tl.float32)
    b_sum = tl.zeros([BLOCK], dtype=tl.float32)
    b_sum_dot = tl.zeros([BLOCK], dtype=tl.float32)
    p_z = z + i_row * VOCAB
    for i in range(0, VOCAB, BLOCK):
        o = i + tl.arange(0, BLOCK)
        m = o < VOCAB
        b_z = tl.load(p_z + o, mask=m, other=-1e38)
        b_new = tl.maximum(b_max, b_z)
        b_old, b_p = tl.exp(b_max - b_new), tl.exp(b_z - b_new)
        b_sum = b_sum * b_old + b_p
        if DUAL:
            b_z_dot = tl.load(p_z + z_half + o, mask=m, other=0.0)
            b_sum_dot = b_sum_dot * b_old + b_p * b_z_dot
        b_max = b_new
    largest = tl.max(b_max, 0)
    b_scale = tl.exp(b_max - largest)
    total = tl.sum(b_sum * b_scale, 0)
    b_lse = largest + tl.log(total)
    # A target outside of the vocabulary would read someone else's memory; as no number it is refused by the step.
    i_target = tl.load(targets + i_row)
    m_target = (i_target >= 0) & (i_target < VOCAB)
    tl.store(lse + i_row, b_lse)
    tl.store(nll + i_row, b_lse - tl.load(p_z + i_target, mask=m_target, other=float("nan")))
    if DUAL:
        b_lse_dot = tl.sum(b_sum_dot * b_scale, 0) / total
        b_target_dot = tl.load(p_z + z_half + i_target, mask=m_target, other=float("nan"))
        tl.store(lse + out_half + i_row, b_lse_dot)
        tl.store(nll + out_half + i_row, b_lse_dot - b_target_dot)


@triton.jit(do_not_specialize=["lse_half"])
def cotangent_kernel(
    z, targets, lse, dz, z_half, lse_half, VOCAB: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr
):
    """Make the cotangents of both halves' logits, where that of nll_dot is 1: ``p - e_y``, by row and block.

    In full mode that is the second half, and the first ``p (z_dot - lse_dot)``.
    """
    i_row = tl.program_id(0).to(tl.int64)
    # [BLOCK]
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m = o < VOCAB
    p_z, p_dz = z + i_row * VOCAB + o, dz + i_row * VOCAB + o
    b_p = tl.exp(tl.load(p_z, mask=m, other=-1e38) - tl.load(lse + i_row))
    b_miss = b_p - tl.where(o == tl.load(targets + i_row), 1.0, 0.0)
    if FULL:
        b_spread = tl.load(p_z + z_half, mask=m, other=0.0) - tl.load(lse + lse_half + i_row)
        tl.store(p_dz, b_p * b_spread, mask=m)
        tl.store(p_dz + z_half, b_miss, mask=m)
    else:
        tl.store(p_dz, b_miss, mask=m)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """Compute ``x W^T`` in float32: in bfloat16, a logit of 20 would be off by 0.06, and a cotangent rounded twice."""
    if x.dtype == torch.float32:
        return x @ weight.T
    if x.is_cuda and not torch.version.hip:
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    return x.float() @ weight.T.float()


def _alike(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in float32 where their dtypes differ: rows and head have one dtype in every model but a mixed one."""
    return (x, weight) if x.dtype == weight.dtype else (x.float(), weight.float())


def _chunks(rows: int, vocab: int) -> Iterator[slice]:
    """Cut rows into slices whose logits exist at once; their number follows from the shape alone."""
    size = max(128, _CHUNK // vocab // 128 * 128)
    return (slice(i, min(i + size, rows)) for i in range(0, rows, size))


def forward(x: Tensor, weight: Tensor, targets: Tensor, grads: int) -> tuple[Tensor, Tensor]:
    """Launch what serves ``sap_fast::linear_cross_entropy``."""
    halves, rows, d = x.shape
    nll, lse = (empty(x, halves, rows, dtype=torch.float32) for _ in range(2))
    basis = empty(x, grads, rows, d, dtype=torch.float32)
    targets, vocab = targets.contiguous(), len(weight)
    chosen = vocab_config(str(architecture(x.device)))
    # Every model's head is contiguous; of another, torch's products would sum in another order.
    x, weight = _alike(x, weight.contiguous())
    for part in _chunks(rows, vocab):
        z = _product(x[:, part].reshape(-1, d), weight)
        count = len(z) // halves
        launch(
            statistics_kernel,
            (count,),
            chosen,
            *(z, targets[part], nll[:, part], lse[:, part], count * vocab, rows),
            VOCAB=vocab,
            DUAL=halves == 2,
        )
        if grads:
            dz = empty(x, grads * count, vocab)
            launch(
                cotangent_kernel,
                (count, triton.cdiv(vocab, chosen.blocks["BLOCK"])),
                chosen,
                *(z, targets[part], lse[:, part], dz, count * vocab, rows),
                VOCAB=vocab,
                FULL=grads == 2,
            )
            basis[:, part] = _product(dz, weight.T).view(grads, count, d)
    return nll, basis


def backward(dnll: Tensor, basis: Tensor, dtype: torch.dtype) -> Tensor:
    """Serve ``sap_fast::linear_cross_entropy_backward``: a product for each element, which PyTorch has."""
    return combined(dnll, basis, dtype)
