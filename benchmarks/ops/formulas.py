"""The rules of every dual as one would write them in PyTorch by hand: what fused kernels are measured against.

Each op has a forward, ``rms_norm``, and a backward, ``rms_norm_backward``, which take and return what the raw ops
``sap_fast::rms_norm`` and ``sap_fast::rms_norm_backward`` do: stacks ``[S, ...]`` and cotangents ``[n, ...]`` (see
``sap_fast/dual.py``), of which index -1 is always the ordinary gradient. Element-wise parts are computed in float32,
matrix products in the dtype of their operands. The library's own reference rules have no such formulas: they are
derived, and these are tested against them.

Nothing here looks at a value on the device, so that ``torch.compile`` makes one graph of each.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.ops.padded import padded_dual
from sap_fast.ops._library import compute_dtype
from sap_fast.ops.lora_linear import dropout_mask

Tensors = Sequence[Tensor | None]


def rule(name: str) -> Callable[..., Any]:
    """Return the function of a raw op, such as ``"glu_backward"``."""
    return globals()[name]


# RMSNorm, alone and after residual addition and probe


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """Compute ``y = gain x rstd``, ``rstd = (mean x^2 + eps)^(-1/2)``."""
    wide = x.to(compute_dtype(x))
    gain = offset + weight.to(wide.dtype)
    rstd = torch.rsqrt(wide[0].square().mean(-1, keepdim=True) + eps)
    if len(x) == 1:
        return (gain * wide * rstd).to(x.dtype), rstd[None, :, 0]
    rstd_dot = -(rstd**3) * (wide[0] * wide[1]).mean(-1, keepdim=True)
    y = torch.stack((wide[0] * rstd, wide[1] * rstd + wide[0] * rstd_dot))
    return (gain * y).to(x.dtype), torch.stack((rstd, rstd_dot))[..., 0]


def rms_norm_backward(dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    return _norm_backward(dy, x, rstd, weight, offset).to(dy.dtype)


def _norm_backward(dy: Tensor, h: Tensor, rstd: Tensor, weight: Tensor, offset: float) -> Tensor:
    h, rstd = h.to(compute_dtype(h)), rstd[..., None]
    g = (offset + weight.to(h.dtype)) * dy.to(h.dtype)
    r, g_dot = rstd[0], g[-1]
    h_g_dot = (h[0] * g_dot).mean(-1, keepdim=True)
    dh_dot = r * g_dot - r**3 * h[0] * h_g_dot
    if len(dy) == 1:
        return dh_dot[None]
    r_dot = rstd[1]
    h_g, h_dot_g_dot = (h * g).mean(-1, keepdim=True)
    dh = (
        r * g[0]
        + r_dot * g_dot
        - r**3 * (h[0] * (h_g + h_dot_g_dot) + h[1] * h_g_dot)
        - 3 * r**2 * r_dot * h[0] * h_g_dot
    )
    return torch.stack((dh, dh_dot))


def probe_rms_norm(
    residual: Tensor, update: Tensor, probe: Tensor | None, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``h = residual + update + probe``, then as ``rms_norm``."""
    dtype = compute_dtype(residual)
    h = residual.to(dtype) + update.to(dtype)
    if probe is not None:
        h = h + probe.to(dtype)[:, None]
    h = h.to(residual.dtype)
    return (h, *rms_norm(h, weight, eps, offset))


def probe_rms_norm_backward(
    dh: Tensor | None, dy: Tensor, h: Tensor, rstd: Tensor, weight: Tensor, eps: float, offset: float, capture: bool
) -> tuple[Tensor, Tensor]:
    """Add the cotangents of the norm's input and of the stream; the probe's is its sum over rows."""
    dx = _norm_backward(dy, h, rstd, weight, offset)
    if dh is not None:
        dx = dx + dh
    return dx.to(h.dtype), dx.sum(1) if capture else dx.new_empty(0)


# Gated linear units


def _activation(name: str, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``s(g)`` and its first and second derivative."""
    if name == "silu":
        sigmoid = torch.sigmoid(g)
        slope = sigmoid * (1 - sigmoid)
        return g * sigmoid, sigmoid + g * slope, slope * (2 + g * (1 - 2 * sigmoid))
    if name == "gelu":
        density = torch.exp(-0.5 * g * g) / math.sqrt(2 * math.pi)
        below = 0.5 * (1 + torch.erf(g / math.sqrt(2)))
        return g * below, below + g * density, density * (2 - g * g)
    c, a = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(c * (g + a * g**3))
    inner, inner_slope = c * (1 + 3 * a * g * g), 6 * c * a * g
    slope = (1 - t * t) * inner
    bend = (1 - t * t) * (inner_slope - 2 * t * inner * inner)
    return 0.5 * g * (1 + t), 0.5 * (1 + t + g * slope), slope + 0.5 * g * bend


def glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Compute ``y = s(gate) up``, ``y_dot = s' gate_dot up + s up_dot``."""
    g, u = (x.to(compute_dtype(x)) for x in (gate, up))
    s, s1, _ = _activation(activation, g[0])
    if len(gate) == 1:
        return (s * u).to(gate.dtype)
    return torch.stack((s * u[0], s1 * g[1] * u[0] + s * u[1])).to(gate.dtype)


def glu_backward(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    g, u, d = (x.to(compute_dtype(x)) for x in (gate, up, dy))
    s, s1, s2 = _activation(activation, g[0])
    dgate_dot, dup_dot = d[-1] * s1 * u[0], d[-1] * s
    if len(dy) == 1:
        return dgate_dot[None].to(dy.dtype), dup_dot[None].to(dy.dtype)
    dgate = d[0] * s1 * u[0] + d[1] * (s2 * g[1] * u[0] + s1 * u[1])
    dup = d[0] * s + d[1] * s1 * g[1]
    return torch.stack((dgate, dgate_dot)).to(dy.dtype), torch.stack((dup, dup_dot)).to(dy.dtype)


def glu_backward_(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> None:
    """Write the cotangents into the first n halves of gate and up."""
    dgate, dup = glu_backward(dy, gate, up, activation)
    gate[: len(dy)].copy_(dgate)
    up[: len(dy)].copy_(dup)


# Rotary position embedding: linear, so both halves turn alike


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def rotary_backward(dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _rotate_back(dq, cos, sin), _rotate_back(dk, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned, rest = _wide_channels(x, cos.shape[-1])
    first, second = turned.chunk(2, -1)
    turned = turned * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]
    return torch.cat((turned.to(x.dtype), rest), -1)


def _rotate_back(dy: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned, rest = _wide_channels(dy, cos.shape[-1])
    first, second = (turned * sin[:, None]).chunk(2, -1)
    turned = turned * cos[:, None] + torch.cat((second, -first), -1)
    return torch.cat((turned.to(dy.dtype), rest), -1)


def _wide_channels(x: Tensor, rotary_dim: int) -> tuple[Tensor, Tensor]:
    return x[..., :rotary_dim].to(compute_dtype(x)), x[..., rotary_dim:]


# Rows taken by an index: linear, too


def take_rows(xs: list[Tensor], rows: Tensor) -> list[Tensor]:
    return [x.index_select(1, rows) for x in xs]


def take_rows_backward(dys: list[Tensor], offsets: Tensor, takers: Tensor) -> list[Tensor]:
    """Sum up each row's cotangent over its takers."""
    places = torch.arange(len(takers), device=takers.device)
    row = torch.searchsorted(offsets, places, right=True) - 1
    zeros = [dy.new_zeros((len(dy), len(offsets) - 1, *dy.shape[2:]), dtype=compute_dtype(dy)) for dy in dys]
    sums = [dx.index_add(1, row, dy[:, takers].to(dx.dtype)) for dx, dy in zip(zeros, dys, strict=True)]
    return [dx.to(dy.dtype) for dx, dy in zip(sums, dys, strict=True)]


# Attention, dense: every sequence is padded to the longest, and all T x T scores exist at once


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    seqused: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen: int,
    max_seqlen_k: int,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    """Compute ``P = softmax(c Q K')``, ``O = P V``, and the log-sum-exp of the scores."""
    dtype, storage = compute_dtype(q), q.dtype
    padded, keys = padded_dual(q, k, cu_seqlens, seqused, cu_seqlens_k, max_seqlen, max_seqlen_k)
    group = q.shape[2] // k.shape[2]
    q, k, v = padded.pad(q), keys.pad(k), keys.pad(v)
    scores = (scale * (q[0] @ k[0].mT).to(dtype)).masked_fill(padded.hidden(keys, group, window), float("-inf"))
    lse = scores.logsumexp(-1, keepdim=True)
    p = (scores - lse).exp()
    if len(q) == 1:
        return padded.unpad(p.to(storage) @ v, group), padded.unpad(lse[None], group)[..., 0]
    s_dot = scale * (q[1] @ k[0].mT + q[0] @ k[1].mT).to(dtype)
    mu = (p * s_dot).sum(-1, keepdim=True)
    p, p_dot = p.to(storage), (p * (s_dot - mu)).to(storage)
    o = torch.stack((p @ v[0], p @ v[1] + p_dot @ v[0]))
    return padded.unpad(o, group), padded.unpad(torch.stack((lse, mu)), group)[..., 0]


def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    seqused: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen: int,
    max_seqlen_k: int,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    n, dtype, storage = len(do), compute_dtype(q), q.dtype
    padded, keys = padded_dual(q, k, cu_seqlens, seqused, cu_seqlens_k, max_seqlen, max_seqlen_k)
    group = q.shape[2] // k.shape[2]
    do, q, o = padded.pad(do[-n:]), padded.pad(q[:n]), padded.pad(o[:n])
    k, v = keys.pad(k[:n]), keys.pad(v[:n])
    lse = padded.pad(lse[:n, ..., None])
    scores = scale * (q[0] @ k[0].mT).to(dtype)
    p = (scores - lse[0]).exp().masked_fill(padded.hidden(keys, group, window), 0.0)
    delta_dot = (do[-1] * o[0]).sum(-1, keepdim=True, dtype=dtype)
    ds_dot_wide = (do[-1] @ v[0].mT).to(dtype) - delta_dot  # dP_dot - delta_dot
    ds_dot = (p * ds_dot_wide).to(storage)
    dq_dot, dk_dot, dv_dot = scale * (ds_dot @ k[0]), scale * (ds_dot.mT @ q[0]), p.to(storage).mT @ do[-1]
    if n == 1:
        return padded.unpad(dq_dot[None], group), keys.unpad(dk_dot[None], 1), keys.unpad(dv_dot[None], 1)
    s_dot = scale * (q[1] @ k[0].mT + q[0] @ k[1].mT).to(dtype)
    p_dot = p * (s_dot - lse[1])
    delta = (do * o).sum((0, -1), dtype=dtype)[..., None]
    dp = (do[0] @ v[0].mT + do[1] @ v[1].mT).to(dtype)
    ds = (p_dot * ds_dot_wide + p * (dp - delta)).to(storage)
    p, p_dot = p.to(storage), p_dot.to(storage)
    dq = scale * (ds @ k[0] + ds_dot @ k[1])
    dk = scale * (ds.mT @ q[0] + ds_dot.mT @ q[1])
    dv = p.mT @ do[0] + p_dot.mT @ do[1]
    dq, dk, dv = (torch.stack(dual) for dual in ((dq, dq_dot), (dk, dk_dot), (dv, dv_dot)))
    return padded.unpad(dq, group), keys.unpad(dk, 1), keys.unpad(dv, 1)


# Output head and cross-entropy, all logits at once


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, grads: int) -> tuple[Tensor, Tensor]:
    """Compute ``nll = lse(z) - z[target]``, ``z = W x``; and ``W' (p - e_y)``, of a dual after its tangent."""
    z = F.linear(x, weight).to(compute_dtype(x))
    lse = z[:1].logsumexp(-1)
    p = (z[0] - lse[0, :, None]).exp()
    if len(x) == 2:
        lse = torch.stack((lse[0], (p * z[1]).sum(-1)))
    nll = lse - z.gather(-1, targets.expand(len(z), -1)[..., None])[..., 0]
    if grads == 0:
        return nll, x.new_empty((0, *x.shape[1:]), dtype=z.dtype)
    # p - e_y, without a matrix of one-hot rows.
    off = p.scatter_add(-1, targets[:, None], -torch.ones_like(lse[0])[:, None])
    dz = off[None] if grads == 1 else torch.stack((p * (z[1] - lse[1, :, None]), off))
    return nll, (dz.to(x.dtype) @ weight).to(z.dtype)


def linear_cross_entropy_backward(dnll: Tensor, basis: Tensor, dtype: torch.dtype) -> Tensor:
    """Weight the ordinary gradient of every row's loss, and the tangent of that."""
    dx_dot = dnll[-1, :, None] * basis[-1]
    if len(dnll) == 1:
        return dx_dot[None].to(dtype)
    dx = dnll[0, :, None] * basis[-1] + dnll[-1, :, None] * basis[0]
    return torch.stack((dx, dx_dot)).to(dtype)


# Linear maps with LoRA


def lora_linear(
    x: Tensor,
    weights: list[Tensor],
    biases: Tensors,
    a: Tensors,
    b: Tensors,
    a_dot: Tensors,
    b_dot: Tensors,
    seed: Tensor,
    scaling: list[float],
    dropout: list[float],
    salt: list[int],
) -> list[Tensor]:
    """Compute ``y = W x + bias + s B A x``, ``y_dot = W x_dot + s (B A x_dot + B A_dot x + B_dot A x)``."""
    ys = []
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        y = F.linear(x, weight)
        if bias is not None:
            y = torch.cat((y[:1] + bias, y[1:]))
        if (A := a[i]) is not None and (B := b[i]) is not None:
            wide, A, B = _wide_input(x, seed, salt[i], dropout[i]), *_adapters(x, A, B)
            xa = F.linear(wide, A)  # [S, rows, rank]
            delta = F.linear(xa, B)
            if len(x) == 2:
                A_dot, B_dot = _adapters(x, a_dot[i], b_dot[i])
                delta_dot = delta[1] + F.linear(F.linear(wide[0], A_dot), B) + F.linear(xa[0], B_dot)
                delta = torch.stack((delta[0], delta_dot))
            y = (y + scaling[i] * delta).to(x.dtype)
        ys.append(y)
    return ys


def lora_linear_backward(
    dys: list[Tensor],
    x: Tensor,
    weights: list[Tensor],
    a: Tensors,
    b: Tensors,
    a_dot: Tensors,
    b_dot: Tensors,
    seed: Tensor,
    scaling: list[float],
    dropout: list[float],
    salt: list[int],
    need_dx: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Compute ``dx_dot = W' dy_dot + s A'B' dy_dot`` and its tangent; the adapters' gradients, of dy_dot alone."""
    dtype = compute_dtype(x)
    dx = torch.zeros((len(dys[0]) if need_dx else 0, *x.shape[1:]), dtype=dtype, device=x.device)
    das, dbs = [], []
    for i, (dy, weight) in enumerate(zip(dys, weights, strict=True)):
        if need_dx:
            dx = dx + dy @ weight
        da = db = dx.new_empty(0)
        if (A := a[i]) is not None and (B := b[i]) is not None:
            A, B = _adapters(x, A, B)
            wide, d = _wide_input(x[:1], seed, salt[i], dropout[i])[0], scaling[i] * dy.to(dtype)
            db_x = d @ B  # [n, rows, rank]
            da, db = db_x[-1].mT @ wide, d[-1].mT @ F.linear(wide, A)
            if need_dx:
                through = db_x @ A
                if len(dy) == 2:
                    A_dot, B_dot = _adapters(x, a_dot[i], b_dot[i])
                    through = torch.stack((through[0] + db_x[1] @ A_dot + (d[1] @ B_dot) @ A, through[1]))
                dx = dx + (through * _keep(x, seed, salt[i], dropout[i]) if dropout[i] else through)
        das.append(da)
        dbs.append(db)
    return dx.to(x.dtype), das, dbs


def _adapters(x: Tensor, *matrices: Tensor | None) -> list[Tensor]:
    return [matrix.to(compute_dtype(x)) for matrix in matrices if matrix is not None]


def _keep(x: Tensor, seed: Tensor, salt: int, p: float) -> Tensor:
    return dropout_mask(seed, salt, x.shape[1], x.shape[2], p).to(compute_dtype(x))


def _wide_input(x: Tensor, seed: Tensor, salt: int, p: float) -> Tensor:
    wide = x.to(compute_dtype(x))
    return wide * _keep(x, seed, salt, p) if p else wide
