"""The Triton kernels of lora_linear: narrow products of wide stacks with the matrices of adapters.

Every one works on two groups of adapters at once: ``together`` share one wide stack, which is read once for all of
them; ``each`` have one of their own. See README.md for which is which. Nothing here knows whether it serves the
forward or the backward: both are the same three products.
"""

# A tuple that grows while Triton unrolls a loop changes its type.
# mypy: disable-error-code="assignment"

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Side(NamedTuple):
    """Describes a stack ``z [2 or 1, rows, WIDTH]`` and a matrix ``m [RANK, WIDTH]``: A beside x, B^T beside y.

    Attributes:
        z, z_half, z_row: its value half, the distance from there to its tangent half (which may be negative), and
            that of its rows.
        m, m_rank, m_width: the matrix with both strides, and the same of its tangent. In ``outer_kernel`` the result.
        bias: ``[WIDTH]``, added to the value half of a result; or None.
        salt: of its dropout mask; see ``marked``.
        RANK, WIDTH: shape of the matrix.
        FIRST, SLOT: the columns of ``t`` that are its own: from FIRST on, RANK of them, padded with zeros to SLOT.
        BLOCK: how many of them a program holds at once.
        LIMIT: elements whose word of the mask is not larger are dropped; -1 for a side without dropout.
        KEPT, SCALING: the factor of those that are kept, and that of the adapter.
    """

    z: Any
    z_half: Any
    z_row: Any
    m: Any
    m_rank: Any
    m_width: Any
    m_dot: Any
    m_dot_rank: Any
    m_dot_width: Any
    bias: Any
    salt: Any
    RANK: Any
    WIDTH: Any
    FIRST: Any
    SLOT: Any
    BLOCK: Any
    LIMIT: Any
    KEPT: Any
    SCALING: Any


class Plan(NamedTuple):
    """Holds what the kernels of a pass have in common.

    ``t [PARTS, HALVES, rows, R]`` holds, in float32, rows of R columns, a slot for each adapter. Its PARTS come of
    parts of the columns of a wide stack, and whoever reads it adds them up. CHUNKS: blocks of the widest slot;
    GROUPS: blocks of rows that a sum over rows is made of; PRECISION: of products.
    """

    R: Any
    HALVES: Any
    PARTS: Any
    CHUNKS: Any
    GROUPS: Any
    PRECISION: Any


def marked(salt: int) -> int:
    """Return the word of a salt that counts, as an odd number wider than 32 bits.

    Triton compiles a kernel anew for an integer that is 1, divisible by 16 or of another width, and in a tuple of
    arguments that cannot be declined. All marked salts are alike to it.
    """
    return 1 << 40 | (salt * 0x9E3779B9 & 0xFFFFFFFF) << 1 | 1


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def row_words(seed, salt, o_row):
    """Compute the part of ``dropout_mask`` that depends on the row; uint32 wraps as its masking does."""
    key = _mix(tl.load(seed).to(tl.uint32) + (salt >> 1).to(tl.uint32))
    return _mix(o_row.to(tl.uint32) + key)


@triton.jit
def kept(b_words, o_z, LIMIT):
    """Mark the elements of a block that dropout keeps, ``[rows, columns]``."""
    word = _mix(b_words[:, None] ^ (o_z.to(tl.uint32) * 0x9E3779B9)[None, :])
    return word > LIMIT


@triton.jit
def _sum_of_parts(p_t, part, m_t, PARTS: tl.constexpr):
    b_t = tl.load(p_t, mask=m_t, other=0.0)
    for i in tl.static_range(1, PARTS):
        b_t += tl.load(p_t + i * part, mask=m_t, other=0.0)
    return b_t


@triton.jit
def _down(
    sides,
    t,
    seed,
    rows,
    plan,
    BEGIN: tl.constexpr,
    END: tl.constexpr,
    DUAL: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """Compute the down products of sides BEGIN to END, which share the stack of the first of them."""
    chunk, part = tl.program_id(0) % plan.CHUNKS, tl.program_id(0) // plan.CHUNKS
    # [BM]
    o_row = tl.program_id(1).to(tl.int64) * BM + tl.arange(0, BM)
    m_row = o_row < rows
    p_row = sides[BEGIN].z + o_row[:, None] * sides[BEGIN].z_row
    words, b_ts = (), ()
    for i in tl.static_range(BEGIN, END):
        words += (row_words(seed, sides[i].salt, o_row),)
        b_ts += (tl.zeros([BM, sides[i].BLOCK], tl.float32),)
    b_t_dots = b_ts

    BLOCKS: tl.constexpr = (sides[BEGIN].WIDTH + plan.PARTS * BK - 1) // (plan.PARTS * BK)
    for j in range(BLOCKS):
        # [BK]
        o_z = (part * BLOCKS + j) * BK + tl.arange(0, BK)
        m_z = o_z < sides[BEGIN].WIDTH
        # [BM, BK]
        m = m_row[:, None] & m_z[None, :]
        b_z = tl.load(p_row + o_z[None, :], mask=m, other=0.0).to(tl.float32)
        if DUAL:
            b_z_dot = tl.load(p_row + sides[BEGIN].z_half + o_z[None, :], mask=m, other=0.0).to(tl.float32)
        sums, sum_dots = (), ()
        for i in tl.static_range(BEGIN, END):
            # [BK, BLOCK]
            o_r = chunk * sides[i].BLOCK + tl.arange(0, sides[i].BLOCK)
            m_m = m_z[:, None] & (o_r < sides[i].RANK)[None, :]
            p_m = sides[i].m + o_r[None, :] * sides[i].m_rank + o_z[:, None] * sides[i].m_width
            b_m = tl.load(p_m, mask=m_m, other=0.0).to(tl.float32)
            # A mask of zeros and ones: the factor of what is kept waits for the sum, so that operands stay exact.
            b_kept = b_z
            if sides[i].LIMIT >= 0:
                m_kept = kept(words[i - BEGIN], o_z, sides[i].LIMIT)
                b_kept = tl.where(m_kept, b_z, 0.0)
            sums += (tl.dot(b_kept, b_m, b_ts[i - BEGIN], input_precision=plan.PRECISION),)
            if DUAL:
                b_kept_dot = b_z_dot
                if sides[i].LIMIT >= 0:
                    b_kept_dot = tl.where(m_kept, b_z_dot, 0.0)
                p_m_dot = sides[i].m_dot + o_r[None, :] * sides[i].m_dot_rank + o_z[:, None] * sides[i].m_dot_width
                b_m_dot = tl.load(p_m_dot, mask=m_m, other=0.0).to(tl.float32)
                b_t_dot = tl.dot(b_kept_dot, b_m, b_t_dots[i - BEGIN], input_precision=plan.PRECISION)
                sum_dots += (tl.dot(b_kept, b_m_dot, b_t_dot, input_precision=plan.PRECISION),)
            else:
                sum_dots += (b_t_dots[i - BEGIN],)
        b_ts, b_t_dots = sums, sum_dots

    half = rows.to(tl.int64) * plan.R
    for i in tl.static_range(BEGIN, END):
        # [BM, BLOCK]
        o_r = chunk * sides[i].BLOCK + tl.arange(0, sides[i].BLOCK)
        m_t = m_row[:, None] & (o_r < sides[i].SLOT)[None, :]
        p_t = t + half * plan.HALVES * part + o_row[:, None] * plan.R + (o_r + sides[i].FIRST)[None, :]
        factor = sides[i].SCALING * sides[i].KEPT
        tl.store(p_t, b_ts[i - BEGIN] * factor, mask=m_t)
        if DUAL:
            tl.store(p_t + half, b_t_dots[i - BEGIN] * factor, mask=m_t)


@triton.jit(do_not_specialize=["rows"])
def down_kernel(
    together,
    t_together,
    each,
    t_each,
    seed,
    rows,
    plan,
    TOGETHER: tl.constexpr,
    EACH: tl.constexpr,
    PAIR_TOGETHER: tl.constexpr,
    PAIR_EACH: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """Compute ``t = s m (keep z)``, ``t_dot = s (m (keep z_dot) + m_dot (keep z))``.

    One program a block of rows, a part of the columns and a chunk of the ranks.
    """
    if TOGETHER and tl.program_id(2) == 0:
        _down(together, t_together, seed, rows, plan, 0, TOGETHER, PAIR_TOGETHER, BM, BK)
    for i in tl.static_range(EACH):
        if tl.program_id(2) == i + (TOGETHER > 0):
            _down(each, t_each, seed, rows, plan, i, i + 1, PAIR_EACH, BM, BK)


@triton.jit
def _expanded(
    side,
    b_z,
    b_z_dot,
    t,
    rows,
    plan,
    o_row,
    o_z,
    DUAL: tl.constexpr,
):
    """Add ``t m`` and ``t_dot m + t m_dot`` to blocks ``[BM, BN]``."""
    half = rows.to(tl.int64) * plan.R
    for chunk in range(side.SLOT // side.BLOCK):
        # [BM, BLOCK]
        o_r = chunk * side.BLOCK + tl.arange(0, side.BLOCK)
        m_t = (o_row < rows)[:, None]
        p_t = t + o_row[:, None] * plan.R + (o_r + side.FIRST)[None, :]
        b_t = _sum_of_parts(p_t, half * plan.HALVES, m_t, plan.PARTS)
        # [BLOCK, BN]
        m_m = (o_r < side.RANK)[:, None] & (o_z < side.WIDTH)[None, :]
        p_m = side.m + o_r[:, None] * side.m_rank + o_z[None, :] * side.m_width
        b_m = tl.load(p_m, mask=m_m, other=0.0).to(tl.float32)
        b_z = tl.dot(b_t, b_m, b_z, input_precision=plan.PRECISION)
        if DUAL:
            b_t_dot = _sum_of_parts(p_t + half, half * plan.HALVES, m_t, plan.PARTS)
            p_m_dot = side.m_dot + o_r[:, None] * side.m_dot_rank + o_z[None, :] * side.m_dot_width
            b_m_dot = tl.load(p_m_dot, mask=m_m, other=0.0).to(tl.float32)
            b_z_dot = tl.dot(b_t_dot, b_m, b_z_dot, input_precision=plan.PRECISION)
            b_z_dot = tl.dot(b_t, b_m_dot, b_z_dot, input_precision=plan.PRECISION)
    return b_z, b_z_dot


@triton.jit
def _up(
    sides,
    t,
    seed,
    rows,
    plan,
    BEGIN: tl.constexpr,
    END: tl.constexpr,
    DUAL: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Compute the up products of sides BEGIN to END, all added to the stack of the first of them."""
    # [BM], [BN]
    o_row = tl.program_id(1).to(tl.int64) * BM + tl.arange(0, BM)
    o_z = tl.program_id(0) * BN + tl.arange(0, BN)
    m_z = o_z < sides[BEGIN].WIDTH
    # [BM, BN]
    b_z = tl.zeros([BM, BN], tl.float32)
    b_z_dot = b_z
    for i in tl.static_range(BEGIN, END):
        if sides[i].LIMIT >= 0:
            b_one, b_one_dot = tl.zeros([BM, BN], tl.float32), tl.zeros([BM, BN], tl.float32)
            b_one, b_one_dot = _expanded(sides[i], b_one, b_one_dot, t, rows, plan, o_row, o_z, DUAL)
            m_kept = kept(row_words(seed, sides[i].salt, o_row), o_z, sides[i].LIMIT)
            b_z += tl.where(m_kept, b_one * sides[i].KEPT, 0.0)
            if DUAL:
                b_z_dot += tl.where(m_kept, b_one_dot * sides[i].KEPT, 0.0)
        else:
            b_z, b_z_dot = _expanded(sides[i], b_z, b_z_dot, t, rows, plan, o_row, o_z, DUAL)
    if sides[BEGIN].bias is not None:
        b_z += tl.load(sides[BEGIN].bias + o_z, mask=m_z, other=0.0).to(tl.float32)[None, :]

    m = (o_row < rows)[:, None] & m_z[None, :]
    p_z = sides[BEGIN].z + o_row[:, None] * sides[BEGIN].z_row + o_z[None, :]
    tl.store(p_z, tl.load(p_z, mask=m, other=0.0).to(tl.float32) + b_z, mask=m)
    if DUAL:
        p_z += sides[BEGIN].z_half
        tl.store(p_z, tl.load(p_z, mask=m, other=0.0).to(tl.float32) + b_z_dot, mask=m)


@triton.jit(do_not_specialize=["rows"])
def up_kernel(
    together,
    each,
    t,
    seed,
    rows,
    plan,
    TOGETHER: tl.constexpr,
    EACH: tl.constexpr,
    DUAL: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Add ``z += keep (t m)`` and ``z_dot += keep (t_dot m + t m_dot)`` in place; one program a tile of one stack."""
    if TOGETHER and tl.program_id(2) == 0:
        _up(together, t, seed, rows, plan, 0, TOGETHER, DUAL, BM, BN)
    for i in tl.static_range(EACH):
        # The grid is as wide as the widest side.
        if (tl.program_id(2) == i + (TOGETHER > 0)) & (tl.program_id(0) * BN < each[i].WIDTH):
            _up(each, t, seed, rows, plan, i, i + 1, DUAL, BM, BN)


@triton.jit
def _outer(
    sides,
    t,
    seed,
    rows,
    plan,
    BEGIN: tl.constexpr,
    END: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Compute the outer products of sides BEGIN to END, which share the stack of the first of them."""
    chunk, group = tl.program_id(0) % plan.CHUNKS, tl.program_id(1)
    # [BN]
    o_z = tl.program_id(0) // plan.CHUNKS * BN + tl.arange(0, BN)
    m_z = o_z < sides[BEGIN].WIDTH
    part = rows.to(tl.int64) * plan.HALVES * plan.R
    b_ms = ()
    for i in tl.static_range(BEGIN, END):
        b_ms += (tl.zeros([sides[i].BLOCK, BN], tl.float32),)

    blocks = tl.cdiv(rows, plan.GROUPS * BM)
    # The last groups have fewer, down to none.
    for j in range(tl.minimum(blocks, tl.cdiv(rows, BM) - group * blocks)):
        # [BM]
        o_row = (group * blocks + j).to(tl.int64) * BM + tl.arange(0, BM)
        m_row = o_row < rows
        # [BM, BN]
        p_z = sides[BEGIN].z + o_row[:, None] * sides[BEGIN].z_row + o_z[None, :]
        b_z = tl.load(p_z, mask=m_row[:, None] & m_z[None, :], other=0.0).to(tl.float32)
        sums = ()
        for i in tl.static_range(BEGIN, END):
            # [BLOCK, BM]
            o_r = chunk * sides[i].BLOCK + tl.arange(0, sides[i].BLOCK)
            m_t = (o_r < sides[i].SLOT)[:, None] & m_row[None, :]
            p_t = t + o_row[None, :] * plan.R + (o_r + sides[i].FIRST)[:, None]
            b_t = _sum_of_parts(p_t, part, m_t, plan.PARTS)
            b_kept = b_z
            if sides[i].LIMIT >= 0:
                m_kept = kept(row_words(seed, sides[i].salt, o_row), o_z, sides[i].LIMIT)
                b_kept = tl.where(m_kept, b_z, 0.0)
            sums += (tl.dot(b_t, b_kept, b_ms[i - BEGIN], input_precision=plan.PRECISION),)
        b_ms = sums

    for i in tl.static_range(BEGIN, END):
        o_r = chunk * sides[i].BLOCK + tl.arange(0, sides[i].BLOCK)
        m_m = (o_r < sides[i].RANK)[:, None] & m_z[None, :]
        p_m = sides[i].m + group.to(tl.int64) * (sides[i].RANK * sides[i].WIDTH)
        p_m += o_r[:, None] * sides[i].m_rank + o_z[None, :] * sides[i].m_width
        tl.store(p_m, b_ms[i - BEGIN] * sides[i].KEPT, mask=m_m)


@triton.jit(do_not_specialize=["rows"])
def outer_kernel(
    together,
    t_together,
    each,
    t_each,
    seed,
    rows,
    plan,
    TOGETHER: tl.constexpr,
    EACH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Compute ``m = t^T (keep z)``, summed over rows: one program a tile of a matrix and one of GROUPS blocks of rows.

    ``m`` is ``[GROUPS, ...]``, each group in the layout of the gradient that it is a part of.
    """
    if TOGETHER and tl.program_id(2) == 0:
        _outer(together, t_together, seed, rows, plan, 0, TOGETHER, BM, BN)
    for i in tl.static_range(EACH):
        # The grid is as wide as the widest side.
        if (tl.program_id(2) == i + (TOGETHER > 0)) & (tl.program_id(0) // plan.CHUNKS * BN < each[i].WIDTH):
            _outer(each, t_each, seed, rows, plan, i, i + 1, BM, BN)


@triton.jit
def sum_kernel(parts, sums, COUNTS, N: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """Sum ``sums[i] = parts[i].sum(0)`` in fixed order, for tensors of COUNTS elements; one program a block of one."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for i in tl.static_range(N):
        if tl.program_id(1) == i:
            b = _sum_of_parts(parts[i] + o, COUNTS[i], o < COUNTS[i], GROUPS)
            tl.store(sums[i] + o, b, mask=o < COUNTS[i])
