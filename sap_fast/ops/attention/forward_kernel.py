"""The forward of attention: one pass over the keys with an online softmax of the dual."""

import triton
import triton.language as tl

from sap_fast.ops.attention._tiles import (
    add_product,
    clear_rows,
    load_tile,
    outer,
    places,
    seen,
    store_statistic,
    store_tile,
)


@triton.jit(do_not_specialize=["rows", "rows_k"])
def forward_kernel(
    q,
    q_half,
    q_row,
    q_head,
    k,
    k_half,
    k_row,
    k_head,
    v,
    v_half,
    v_row,
    v_head,
    o,
    lse,
    cu_seqlens,
    seqused,
    cu_seqlens_k,
    rows,
    rows_k,
    scale,
    DUAL: tl.constexpr,
    WINDOW: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Compute ``o`` and ``lse``, of a dual with ``o_dot`` and ``mu``; contiguous stacks; one program a tile of queries.

    ``b_mu`` is the mean of s_dot over the keys so far, and ``b_o_dot`` is kept centred on it: whenever the mean moves,
    the sum moves with it. So no large common part of s_dot (a bias of the keys gives one) is ever rounded.
    """
    # Late queries see the most keys: they start first.
    i_q = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    i_head = tl.program_id(1)
    start, length, start_k, _, used, first = places(cu_seqlens, seqused, cu_seqlens_k, rows, rows_k)
    i_q += first
    half = rows.to(tl.int64) * HEADS
    # [BM]
    o_q = i_q + tl.arange(0, BM)
    if i_q >= used:
        step = tl.num_programs(0) * BM
        clear_rows(o, i_head, start, i_q, length, step, HEADS, BM, D, BD)
        clear_rows(lse, i_head, start, i_q, length, step, HEADS, BM, 1, 1)
        if DUAL:
            clear_rows(o + half * D, i_head, start, i_q, length, step, HEADS, BM, D, BD)
            clear_rows(lse + half, i_head, start, i_q, length, step, HEADS, BM, 1, 1)
        return

    q += i_head.to(tl.int64) * q_head
    k += (i_head // GROUP).to(tl.int64) * k_head
    v += (i_head // GROUP).to(tl.int64) * v_head
    # [BM, BD]
    b_q = load_tile(q, q_row, start, i_q, used, BM, D, BD)
    b_o = tl.zeros([BM, BD], tl.float32)
    # [BM]; a finite lowest maximum: what no key was seen for stays 0 and does not become NaN
    b_max = tl.full([BM], -1e30, tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    if DUAL:
        b_q_dot = load_tile(q + q_half, q_row, start, i_q, used, BM, D, BD)
        b_o_dot = tl.zeros([BM, BD], tl.float32)
        b_mu = tl.zeros([BM], tl.float32)

    begin = 0
    if WINDOW:
        begin = tl.maximum(i_q - WINDOW + 1, 0) // BN * BN
    for i_k in range(begin, tl.minimum(i_q + BM, used), BN):
        # [BN, BD]
        b_k = load_tile(k, k_row, start_k, i_k, used, BN, D, BD)
        b_v = load_tile(v, v_row, start_k, i_k, used, BN, D, BD)
        # [BM, BN]
        m = seen(o_q[:, None], (i_k + tl.arange(0, BN))[None, :], WINDOW)
        b_s = tl.where(m, scale * outer(b_q, b_k), float("-inf"))
        b_max_before, b_sum_before = b_max, b_sum
        b_max = tl.maximum(b_max, tl.max(b_s, 1))
        b_p = tl.exp(b_s - b_max[:, None])
        b_shrink = tl.exp(b_max_before - b_max)
        b_sum = b_shrink * b_sum + tl.sum(b_p, 1)
        if DUAL:
            b_k_dot = load_tile(k + k_half, k_row, start_k, i_k, used, BN, D, BD)
            b_v_dot = load_tile(v + v_half, v_row, start_k, i_k, used, BN, D, BD)
            b_s_dot = scale * outer(b_q_dot, b_k, outer(b_q, b_k_dot))
            # A sum is at least 1 from the first key seen on: the largest score adds exp(0).
            b_mu_before = b_mu
            b_mu = (b_shrink * b_sum_before * b_mu + tl.sum(b_p * b_s_dot, 1)) / tl.maximum(b_sum, 1.0)
            b_p_dot = b_p * (b_s_dot - b_mu[:, None])
            b_o_dot = b_shrink[:, None] * b_o_dot - (b_shrink * (b_mu - b_mu_before))[:, None] * b_o
            b_o_dot = add_product(add_product(b_o_dot, b_p, b_v_dot), b_p_dot, b_v)
        b_o = add_product(b_shrink[:, None] * b_o, b_p, b_v)

    # [BM]; padding within the tile becomes zero
    m_q = o_q < used
    b_sum = tl.where(m_q, b_sum, float("inf"))
    store_tile(o, b_o / b_sum[:, None], i_head, start, i_q, length, HEADS, BM, D, BD)
    store_statistic(lse, tl.where(m_q, b_max + tl.log(b_sum), 0.0), i_head, start, i_q, length, HEADS, BM)
    if DUAL:
        store_tile(o + half * D, b_o_dot / b_sum[:, None], i_head, start, i_q, length, HEADS, BM, D, BD)
        store_statistic(lse + half, tl.where(m_q, b_mu, 0.0), i_head, start, i_q, length, HEADS, BM)
