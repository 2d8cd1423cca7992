"""The backward of attention: one kernel of tiles of queries (dq) and one of tiles of keys (dk, dv or both).

Both recompute the probabilities from ``lse``, and those of a dual from ``mu`` too. ``FULL`` is full mode; without it
the kernels are the ordinary backward, which reads primal halves only.

``b_rate`` is s_dot - mu, that is p_dot / p, and ds has p factored out: ``p (rate (dp_dot - delta_dot) + dp - delta)``.
The products dp are summed onto what precedes them there, so that no tile but p and that sum has to be kept.
"""

import triton
import triton.language as tl

from sap_fast.ops.attention._tiles import (
    add_product,
    clear_rows,
    load_statistic,
    load_tile,
    outer,
    places,
    seen,
    store_statistic,
    store_tile,
)


@triton.jit(do_not_specialize=["rows"])
def delta_kernel(
    do,
    do_half,
    do_row,
    do_head,
    o,
    delta,
    rows,
    FULL: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Compute ``delta_dot = rowsum(do_dot o)``, in full mode before it ``delta = rowsum(do o + do_dot o_dot)``.

    A kernel of its own: four more tiles at the start of ``query_kernel`` would cost it its last registers.
    """
    # [ROWS, 1]: rows and heads in one
    o_row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    o_d = tl.arange(0, BD)[None, :]
    half = rows.to(tl.int64) * HEADS
    m_row = o_row < half
    m = m_row & (o_d < D)
    # [ROWS, BD]
    p_do = do + (o_row // HEADS) * do_row + (o_row % HEADS) * do_head + o_d
    p_o = o + o_row * D + o_d
    b_do_dot = tl.load(p_do + do_half, mask=m, other=0.0).to(tl.float32)
    b_o = tl.load(p_o, mask=m, other=0.0).to(tl.float32)
    b_delta_dot = tl.sum(b_do_dot * b_o, 1)[:, None]
    if FULL:
        b_do = tl.load(p_do, mask=m, other=0.0).to(tl.float32)
        b_o_dot = tl.load(p_o + half * D, mask=m, other=0.0).to(tl.float32)
        tl.store(delta + o_row, tl.sum(b_do * b_o + b_do_dot * b_o_dot, 1)[:, None], mask=m_row)
        tl.store(delta + half + o_row, b_delta_dot, mask=m_row)
    else:
        tl.store(delta + o_row, b_delta_dot, mask=m_row)


@triton.jit(do_not_specialize=["rows", "rows_k"])
def query_kernel(
    do,
    do_half,
    do_row,
    do_head,
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
    lse,
    delta,
    dq,
    cu_seqlens,
    seqused,
    cu_seqlens_k,
    rows,
    rows_k,
    scale,
    FULL: tl.constexpr,
    WINDOW: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Compute ``dq``, a contiguous stack ``[n, ...]``, and a better ``delta``: one program a tile of queries.

    ``do_half`` is 0 in half mode: the one half there is, is the ordinary gradient.
    """
    # Late queries see the most keys: they start first.
    i_q = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    i_head = tl.program_id(1)
    start, length, start_k, _, used, first = places(cu_seqlens, seqused, cu_seqlens_k, rows, rows_k)
    i_q += first
    half = rows.to(tl.int64) * HEADS
    if i_q >= used:
        step = tl.num_programs(0) * BM
        clear_rows(dq, i_head, start, i_q, length, step, HEADS, BM, D, BD)
        if FULL:
            clear_rows(dq + half * D, i_head, start, i_q, length, step, HEADS, BM, D, BD)
        return

    do += i_head.to(tl.int64) * do_head
    q += i_head.to(tl.int64) * q_head
    k += (i_head // GROUP).to(tl.int64) * k_head
    v += (i_head // GROUP).to(tl.int64) * v_head
    # In full mode delta_dot is the second half of a dual, in half mode the only one.
    delta_dot = delta + half if FULL else delta
    # [BM]
    o_q = i_q + tl.arange(0, BM)
    b_lse = load_statistic(lse, i_head, start, i_q, used, HEADS, BM)
    b_delta_dot = load_statistic(delta_dot, i_head, start, i_q, used, HEADS, BM)
    b_rest_dot = tl.zeros([BM], tl.float32)
    # [BM, BD]
    b_q = load_tile(q, q_row, start, i_q, used, BM, D, BD)
    b_do_dot = load_tile(do + do_half, do_row, start, i_q, used, BM, D, BD)
    b_dq_dot = tl.zeros([BM, BD], tl.float32)
    if FULL:
        b_mu = load_statistic(lse + half, i_head, start, i_q, used, HEADS, BM)
        b_delta = load_statistic(delta, i_head, start, i_q, used, HEADS, BM)
        b_rest = tl.zeros([BM], tl.float32)
        b_q_dot = load_tile(q + q_half, q_row, start, i_q, used, BM, D, BD)
        b_do = load_tile(do, do_row, start, i_q, used, BM, D, BD)
        b_dq = tl.zeros([BM, BD], tl.float32)

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
        b_p = tl.exp(b_s - b_lse[:, None])
        if FULL:
            b_k_dot = load_tile(k + k_half, k_row, start_k, i_k, used, BN, D, BD)
            b_v_dot = load_tile(v + v_half, v_row, start_k, i_k, used, BN, D, BD)
            b_rate = scale * outer(b_q_dot, b_k, outer(b_q, b_k_dot)) - b_mu[:, None]
        b_centred = outer(b_do_dot, b_v) - b_delta_dot[:, None]
        b_ds_dot = b_p * b_centred
        b_rest_dot += tl.sum(b_ds_dot, 1)
        if FULL:
            b_sum = outer(b_do_dot, b_v_dot, b_rate * b_centred - b_delta[:, None])
            b_ds = b_p * outer(b_do, b_v, b_sum)
            b_rest += tl.sum(b_ds, 1)
            b_dq = add_product(add_product(b_dq, b_ds, b_k), b_ds_dot, b_k_dot)
        b_dq_dot = add_product(b_dq_dot, b_ds_dot, b_k)

    # A row of ds sums to zero. What it sums to instead is what delta lacks, mostly since o was rounded to its dtype:
    # the kernel of keys, which sums over queries, gets the better delta.
    store_statistic(delta_dot, b_delta_dot + b_rest_dot, i_head, start, i_q, used, HEADS, BM)
    # [BM, 1]; padding within the tile becomes zero
    m_q = (o_q < used)[:, None]
    b_dq_dot = tl.where(m_q, scale * b_dq_dot, 0.0)
    if FULL:
        store_statistic(delta, b_delta + b_rest, i_head, start, i_q, used, HEADS, BM)
        store_tile(dq, tl.where(m_q, scale * b_dq, 0.0), i_head, start, i_q, length, HEADS, BM, D, BD)
        store_tile(dq + half * D, b_dq_dot, i_head, start, i_q, length, HEADS, BM, D, BD)
    else:
        store_tile(dq, b_dq_dot, i_head, start, i_q, length, HEADS, BM, D, BD)


@triton.jit(do_not_specialize=["rows", "rows_k"])
def key_kernel(
    do,
    do_half,
    do_row,
    do_head,
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
    lse,
    delta,
    dk,
    dv,
    cu_seqlens,
    seqused,
    cu_seqlens_k,
    rows,
    rows_k,
    scale,
    DK: tl.constexpr,
    DV: tl.constexpr,
    FULL: tl.constexpr,
    WINDOW: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Compute ``dk``, ``dv`` or both: one program a tile of keys, over all queries that see it in its group's heads.

    Tiles of scores lie transposed, keys down: then p and ds are, as they come, left operands of the products.
    """
    i_k, i_kv = tl.program_id(0) * BN, tl.program_id(1)
    start, _, start_k, length_k, used, first = places(cu_seqlens, seqused, cu_seqlens_k, rows, rows_k)
    KV: tl.constexpr = HEADS // GROUP
    half = rows.to(tl.int64)
    half_k = half if cu_seqlens_k is None else rows_k.to(tl.int64)
    # In full mode delta_dot is the second half of a dual, in half mode the only one.
    delta_dot = delta + half * HEADS if FULL else delta
    if i_k >= used:
        step = tl.num_programs(0) * BN
        if DK:
            clear_rows(dk, i_kv, start_k, i_k, length_k, step, KV, BN, D, BD)
        if DV:
            clear_rows(dv, i_kv, start_k, i_k, length_k, step, KV, BN, D, BD)
        if FULL and DK:
            clear_rows(dk + half_k * (KV * D), i_kv, start_k, i_k, length_k, step, KV, BN, D, BD)
        if FULL and DV:
            clear_rows(dv + half_k * (KV * D), i_kv, start_k, i_k, length_k, step, KV, BN, D, BD)
        return

    k += i_kv.to(tl.int64) * k_head
    v += i_kv.to(tl.int64) * v_head
    # [BN, BD]
    b_k = load_tile(k, k_row, start_k, i_k, used, BN, D, BD)
    if FULL:
        b_k_dot = load_tile(k + k_half, k_row, start_k, i_k, used, BN, D, BD)
    if DK:
        b_v = load_tile(v, v_row, start_k, i_k, used, BN, D, BD)
        b_dk_dot = tl.zeros([BN, BD], tl.float32)
        if FULL:
            b_v_dot = load_tile(v + v_half, v_row, start_k, i_k, used, BN, D, BD)
            b_dk = tl.zeros([BN, BD], tl.float32)
    if DV:
        b_dv_dot = tl.zeros([BN, BD], tl.float32)
        if FULL:
            b_dv = tl.zeros([BN, BD], tl.float32)

    o_k = i_k + tl.arange(0, BN)
    # Queries from `begin` up to `end` see a key of this tile.
    begin = i_k
    if cu_seqlens_k is not None:
        begin = tl.maximum(i_k, first)
    end = used
    if WINDOW:
        end = tl.minimum(used, i_k + BN + WINDOW - 1)
    n = tl.cdiv(end - begin, BM)
    for i in range(0, GROUP * n):
        i_head = i_kv * GROUP + i // n
        i_q = begin + i % n * BM
        p_do = do + i_head.to(tl.int64) * do_head
        p_q = q + i_head.to(tl.int64) * q_head
        # [BM, BD], [BM]
        b_q = load_tile(p_q, q_row, start, i_q, used, BM, D, BD)
        b_do_dot = load_tile(p_do + do_half, do_row, start, i_q, used, BM, D, BD)
        b_lse = load_statistic(lse, i_head, start, i_q, used, HEADS, BM)
        # [BN, BM]
        m = seen((i_q + tl.arange(0, BM))[None, :], o_k[:, None], WINDOW)
        b_s = tl.where(m, scale * outer(b_k, b_q), float("-inf"))
        b_p = tl.exp(b_s - b_lse[None, :])
        if FULL:
            b_q_dot = load_tile(p_q + q_half, q_row, start, i_q, used, BM, D, BD)
            b_do = load_tile(p_do, do_row, start, i_q, used, BM, D, BD)
            b_mu = load_statistic(lse + half * HEADS, i_head, start, i_q, used, HEADS, BM)
            b_rate = scale * outer(b_k_dot, b_q, outer(b_k, b_q_dot)) - b_mu[None, :]
        if DV:
            b_dv_dot = add_product(b_dv_dot, b_p, b_do_dot)
            if FULL:
                b_dv = add_product(add_product(b_dv, b_p, b_do), b_p * b_rate, b_do_dot)
        if DK:
            b_delta_dot = load_statistic(delta_dot, i_head, start, i_q, used, HEADS, BM)
            b_centred = outer(b_v, b_do_dot) - b_delta_dot[None, :]
            b_ds_dot = b_p * b_centred
            b_dk_dot = add_product(b_dk_dot, b_ds_dot, b_q)
            if FULL:
                b_delta = load_statistic(delta, i_head, start, i_q, used, HEADS, BM)
                b_sum = outer(b_v, b_do, b_rate * b_centred - b_delta[None, :])
                b_ds = b_p * outer(b_v_dot, b_do_dot, b_sum)
                b_dk = add_product(add_product(b_dk, b_ds, b_q), b_ds_dot, b_q_dot)

    # [BN, 1]; padding within the tile becomes zero
    m_k = (o_k < used)[:, None]
    if DK:
        b_dk_dot = tl.where(m_k, scale * b_dk_dot, 0.0)
        if FULL:
            store_tile(dk, tl.where(m_k, scale * b_dk, 0.0), i_kv, start_k, i_k, length_k, KV, BN, D, BD)
            store_tile(dk + half_k * (KV * D), b_dk_dot, i_kv, start_k, i_k, length_k, KV, BN, D, BD)
        else:
            store_tile(dk, b_dk_dot, i_kv, start_k, i_k, length_k, KV, BN, D, BD)
    if DV:
        b_dv_dot = tl.where(m_k, b_dv_dot, 0.0)
        if FULL:
            store_tile(dv, tl.where(m_k, b_dv, 0.0), i_kv, start_k, i_k, length_k, KV, BN, D, BD)
            store_tile(dv + half_k * (KV * D), b_dv_dot, i_kv, start_k, i_k, length_k, KV, BN, D, BD)
        else:
            store_tile(dv, b_dv_dot, i_kv, start_k, i_k, length_k, KV, BN, D, BD)
