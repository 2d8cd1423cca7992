"""Rotary embedding of query and key duals in Triton: both halves of both tensors in one launch."""

import triton
import triton.language as tl
from torch import Tensor

from sap_fast.ops._library import architecture
from sap_fast.ops._triton import Config, config, empty, launch, power_of_2, rows_of


def rotary_config(arch: str, elements: int) -> Config:
    """Look up the configuration: 16 of the ``elements`` of one rotated half of all heads for each thread."""
    lanes = 64 if arch.startswith("gfx") else 32
    return config(num_warps=power_of_2(elements // (16 * lanes), 1, 8))


@triton.jit
def rotate(
    x,
    y,
    b_cos,
    b_cos_2,
    b_sin,
    b_sin_2,
    x_head,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Turn the heads ``[HEADS, D]`` of one row at ``x`` into ``y``, which is contiguous.

    Channel i turns with channel i + R / 2: ``y_1 = x_1 cos_1 - x_2 sin_1``, ``y_2 = x_2 cos_2 + x_1 sin_2``; the
    transposed map is ``y_1 = x_1 cos_1 + x_2 sin_2``, ``y_2 = x_2 cos_2 - x_1 sin_1``. The angles are ``[1, BLOCK]``.
    """
    # [BLOCK_HEADS, 1], [1, BLOCK]
    o_head = tl.arange(0, BLOCK_HEADS)[:, None]
    o_d = tl.arange(0, BLOCK)[None, :]
    m = (o_head < HEADS) & (o_d < R // 2)
    # [BLOCK_HEADS, BLOCK]
    p_x, p_y = x + o_head * x_head + o_d, y + o_head * D + o_d
    b_1 = tl.load(p_x, mask=m, other=0.0).to(tl.float32)
    b_2 = tl.load(p_x + R // 2, mask=m, other=0.0).to(tl.float32)
    if TRANSPOSED:
        b_y_1, b_y_2 = b_1 * b_cos + b_2 * b_sin_2, b_2 * b_cos_2 - b_1 * b_sin
    else:
        b_y_1, b_y_2 = b_1 * b_cos - b_2 * b_sin, b_2 * b_cos_2 + b_1 * b_sin_2
    tl.store(p_y, b_y_1, mask=m)
    tl.store(p_y + R // 2, b_y_2, mask=m)
    if R < D:
        # [BLOCK_HEADS, BLOCK_REST]: channels that do not turn
        o_rest = R + tl.arange(0, BLOCK_REST)[None, :]
        m_rest = (o_head < HEADS) & (o_rest < D)
        b = tl.load(x + o_head * x_head + o_rest, mask=m_rest, other=0.0)
        tl.store(y + o_head * D + o_rest, b, mask=m_rest)


@triton.jit(do_not_specialize=["rows"])
def rotary_kernel(
    q,
    q_half,
    q_row,
    q_head,
    k,
    k_half,
    k_row,
    k_head,
    cos,
    sin,
    q_out,
    k_out,
    rows,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    DUAL: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_KV_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Rotate one row a program: its angles are read once, for all heads of q and k and for both halves."""
    i_row = tl.program_id(0).to(tl.int64)
    # [1, BLOCK]
    o_d = tl.arange(0, BLOCK)[None, :]
    m_d = o_d < R // 2
    p_cos, p_sin = cos + i_row * R + o_d, sin + i_row * R + o_d
    b_cos = tl.load(p_cos, mask=m_d, other=0.0).to(tl.float32)
    b_cos_2 = tl.load(p_cos + R // 2, mask=m_d, other=0.0).to(tl.float32)
    b_sin = tl.load(p_sin, mask=m_d, other=0.0).to(tl.float32)
    b_sin_2 = tl.load(p_sin + R // 2, mask=m_d, other=0.0).to(tl.float32)

    p_q, p_k = q + i_row * q_row, k + i_row * k_row
    p_q_out, p_k_out = q_out + i_row * (HEADS * D), k_out + i_row * (KV_HEADS * D)
    for i_half in tl.static_range(2 if DUAL else 1):
        half = rows.to(tl.int64) * i_half
        rotate(
            *(p_q + i_half * q_half, p_q_out + half * (HEADS * D), b_cos, b_cos_2, b_sin, b_sin_2, q_head),
            *(HEADS, D, R, TRANSPOSED, BLOCK_HEADS, BLOCK, BLOCK_REST),
        )
        rotate(
            *(p_k + i_half * k_half, p_k_out + half * (KV_HEADS * D), b_cos, b_cos_2, b_sin, b_sin_2, k_head),
            *(KV_HEADS, D, R, TRANSPOSED, BLOCK_KV_HEADS, BLOCK, BLOCK_REST),
        )


def _turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, transposed: bool) -> tuple[Tensor, Tensor]:
    q, k = rows_of(q), rows_of(k)
    halves, rows, heads, d = q.shape
    kv_heads, rotary_dim = k.shape[2], cos.shape[1]
    q_out, k_out = empty(q, *q.shape), empty(k, *k.shape)
    blocks = {
        "BLOCK_HEADS": power_of_2(heads),
        "BLOCK_KV_HEADS": power_of_2(kv_heads),
        "BLOCK": power_of_2(rotary_dim // 2),
        "BLOCK_REST": power_of_2(d - rotary_dim),
    }
    launch(
        rotary_kernel,
        (rows,),
        rotary_config(str(architecture(q.device)), blocks["BLOCK_HEADS"] * blocks["BLOCK"]),
        *(q, *q.stride()[:3], k, *k.stride()[:3], cos.contiguous(), sin.contiguous(), q_out, k_out, rows),
        HEADS=heads,
        KV_HEADS=kv_heads,
        D=d,
        R=rotary_dim,
        DUAL=halves == 2,
        TRANSPOSED=transposed,
        **blocks,
    )
    return q_out, k_out


def forward(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Launch what serves ``sap_fast::rotary``."""
    return _turn(q, k, cos, sin, transposed=False)


def backward(dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Launch what serves ``sap_fast::rotary_backward``: the map is linear, so its backward is its transpose."""
    return _turn(dq, dk, cos, sin, transposed=True)
