"""What the kernels of attention share: whose rows a program works on, how it loads and stores them, which scores count.

A program works on one tile of one head of one sequence; its grid is ``(tiles, heads, sequences + 1)``. The last
index of the third dimension stands for the rows after all sequences, which every output has to cover too.
"""

import triton
import triton.language as tl


@triton.jit
def bounds(cu_seqlens, seqused, rows):
    """Look up this program's sequence: its first row (int64), how many rows it has, and how many of them are real."""
    i_seq = tl.program_id(2)
    is_sequence = i_seq < tl.num_programs(2) - 1
    start = tl.load(cu_seqlens + i_seq)
    length = tl.load(cu_seqlens + i_seq + 1, mask=is_sequence, other=rows) - start
    used = tl.where(is_sequence, length, 0)
    if seqused is not None:
        used = tl.minimum(used, tl.load(seqused + i_seq, mask=is_sequence, other=0))
    return start.to(tl.int64), length, used


@triton.jit
def places(cu_seqlens, seqused, cu_seqlens_k, rows, rows_k):
    """Look up where the queries and the keys of this program's sequence lie.

    Both are counted in places, those of the keys: a query has the place of the last key that it sees, so the real ones
    of both end together. Returns the rows of place 0 (int64) and the number of places of queries, the same of keys, how
    many places are real, and the first with a query.
    """
    start, length, used = bounds(cu_seqlens, seqused, rows)
    start_k, length_k, first = start, length, 0
    if cu_seqlens_k is not None:
        queries = used
        start_k, length_k, used = bounds(cu_seqlens_k, None, rows_k)
        first = used - queries
        start -= first
        length += first
    return start, length, start_k, length_k, used, first


@triton.jit
def load_tile(x, row, start, first, last, ROWS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Load rows ``first`` to ``first + ROWS`` of the sequence that begins in row ``start``; zero from ``last`` on."""
    # Only the scalar is int64: offsets within a tile are small, and as a tensor they would take twice the registers.
    o_row, o_d = tl.arange(0, ROWS)[:, None], tl.arange(0, BD)[None, :]
    m = o_row < last - first
    if BD > D:
        m = m & (o_d < D)
    return tl.load(x + (start + first) * row + (o_row * row + o_d), mask=m, other=0.0)


@triton.jit
def store_tile(
    x, b_x, i_head, start, first, last, HEADS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr
):
    """Store a tile of one head of an output, which is contiguous; rows from ``last`` on are left alone.

    It takes the head, not a pointer to it: that pointer would be kept in registers throughout a loop before the store.
    """
    o_row, o_d = tl.arange(0, ROWS)[:, None], tl.arange(0, BD)[None, :]
    m = o_row < last - first
    if BD > D:
        m = m & (o_d < D)
    tl.store(x + ((start + first) * HEADS + i_head) * D + (o_row * (HEADS * D) + o_d), b_x, mask=m)


@triton.jit
def load_statistic(x, i_head, start, first, last, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """Load ``[ROWS]`` of one head of a contiguous ``[rows, heads]``, zero from row ``last`` on."""
    o_row = tl.arange(0, ROWS)
    return tl.load(x + ((start + first) * HEADS + i_head) + o_row * HEADS, mask=o_row < last - first, other=0.0)


@triton.jit
def store_statistic(x, b_x, i_head, start, first, last, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """Store ``[ROWS]`` of one head of a contiguous ``[rows, heads]``; rows from ``last`` on are left alone."""
    o_row = tl.arange(0, ROWS)
    tl.store(x + ((start + first) * HEADS + i_head) + o_row * HEADS, b_x, mask=o_row < last - first)


@triton.jit
def clear_rows(
    x, i_head, start, first, length, step, HEADS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr
):
    """Zero the tiles of rows ``first``, ``first + step``, ... of a sequence: rows of padding or of no sequence."""
    for i in range(first, length, step):
        store_tile(x, tl.zeros([ROWS, BD], x.dtype.element_ty), i_head, start, i, length, HEADS, ROWS, D, BD)


@triton.jit
def seen(o_query, o_key, WINDOW: tl.constexpr):
    """Mark the keys that a query sees. Rows that are not real need no mask: a real query sees none after itself."""
    m = o_query >= o_key
    if WINDOW:
        m = m & (o_query - o_key < WINDOW)
    return m


@triton.jit
def outer(b_x, b_y, b_sum=None):
    """Add an outer product: ``sum + x y^T``."""
    return tl.dot(b_x, tl.trans(b_y), b_sum, input_precision="ieee")


@triton.jit
def add_product(b_sum, b_x, b_y):
    """Add a product: ``sum + x y``, for x computed in float32 and rounded to the dtype of y."""
    return tl.dot(b_x.to(b_y.dtype), b_y, b_sum, input_precision="ieee")
