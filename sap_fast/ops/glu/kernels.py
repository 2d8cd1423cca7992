"""Gated linear units of a dual in Triton: elementwise, over halves that are flat buffers."""

import triton
import triton.language as tl
from torch import Tensor

from sap_fast.ops._library import architecture
from sap_fast.ops._triton import Config, config, empty, launch


def flat_config(arch: str) -> Config:
    """Look up the configuration of elementwise kernels: 8 elements of each buffer for each thread."""
    return config(num_warps=4, BLOCK=2048 if arch.startswith("gfx") else 1024)


@triton.jit
def activate(g, ACTIVATION: tl.constexpr):
    """Compute ``s(g)`` and its first two derivatives."""
    if ACTIVATION == "silu":
        sigma = tl.sigmoid(g)
        s = g * sigma
        s_1 = sigma * (1 + g * (1 - sigma))
        s_2 = sigma * (1 - sigma) * (2 + g * (1 - 2 * sigma))
    elif ACTIVATION == "gelu":
        cumulative = 0.5 * (1 + tl.erf(g * 0.7071067811865476))
        density = 0.3989422804014327 * tl.exp(-0.5 * g * g)
        s = g * cumulative
        s_1 = cumulative + g * density
        s_2 = density * (2 - g * g)
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        # s = g sigma(2 v), since (1 + tanh v) / 2 = sigma(2 v); w = 2 v and its derivatives.
        w = 1.5957691216057308 * (g + 0.044715 * g * g * g)
        w_1 = 1.5957691216057308 * (1 + 0.134145 * g * g)
        w_2 = 1.5957691216057308 * 0.26829 * g
        sigma = tl.sigmoid(w)
        sigma_1 = sigma * (1 - sigma)
        s = g * sigma
        s_1 = sigma + g * sigma_1 * w_1
        s_2 = sigma_1 * (2 * w_1 + g * (w_2 + (1 - 2 * sigma) * w_1 * w_1))
    return s, s_1, s_2


@triton.jit
def forward_kernel(
    gate, up, y, half, gate_half, up_half, ACTIVATION: tl.constexpr, DUAL: tl.constexpr, BLOCK: tl.constexpr
):
    """Compute ``y = s u``, ``y_dot = s' g_dot u + s u_dot``. A half has ``half`` elements."""
    # [BLOCK]
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < half
    b_g = tl.load(gate + o, mask=m, other=0.0).to(tl.float32)
    b_u = tl.load(up + o, mask=m, other=0.0).to(tl.float32)
    b_s, b_s_1, _ = activate(b_g, ACTIVATION)
    tl.store(y + o, b_s * b_u, mask=m)
    if DUAL:
        b_g_dot = tl.load(gate + gate_half + o, mask=m, other=0.0).to(tl.float32)
        b_u_dot = tl.load(up + up_half + o, mask=m, other=0.0).to(tl.float32)
        tl.store(y + half + o, b_s_1 * b_g_dot * b_u + b_s * b_u_dot, mask=m)


@triton.jit
def backward_kernel(
    dy,
    gate,
    up,
    dgate,
    dup,
    half,
    dy_half,
    gate_half,
    up_half,
    ACTIVATION: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute ``dg_dot = dy_dot s' u``, ``du_dot = dy_dot s``, and with FULL the cotangents of (g, u).

    ``dgate`` and ``dup`` may be ``gate`` and ``up``: every element is read before it is written, by one program.
    """
    # [BLOCK]
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < half
    b_g = tl.load(gate + o, mask=m, other=0.0).to(tl.float32)
    b_u = tl.load(up + o, mask=m, other=0.0).to(tl.float32)
    b_dy_dot = tl.load(dy + dy_half + o, mask=m, other=0.0).to(tl.float32)
    b_s, b_s_1, b_s_2 = activate(b_g, ACTIVATION)
    b_dg_dot, b_du_dot = b_dy_dot * b_s_1 * b_u, b_dy_dot * b_s
    if FULL:
        b_g_dot = tl.load(gate + gate_half + o, mask=m, other=0.0).to(tl.float32)
        b_u_dot = tl.load(up + up_half + o, mask=m, other=0.0).to(tl.float32)
        b_dy = tl.load(dy + o, mask=m, other=0.0).to(tl.float32)
        b_dg = b_dy * b_s_1 * b_u + b_dy_dot * (b_s_2 * b_g_dot * b_u + b_s_1 * b_u_dot)
        b_du = b_dy * b_s + b_dy_dot * b_s_1 * b_g_dot
        tl.store(dgate + o, b_dg, mask=m)
        tl.store(dup + o, b_du, mask=m)
        tl.store(dgate + half + o, b_dg_dot, mask=m)
        tl.store(dup + half + o, b_du_dot, mask=m)
    else:
        tl.store(dgate + o, b_dg_dot, mask=m)
        tl.store(dup + o, b_du_dot, mask=m)


def _flat(x: Tensor) -> Tensor:
    """Return ``x``, or a copy of it, with each half contiguous."""
    return x if x[0].is_contiguous() else x.contiguous()


def forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Launch what serves ``sap_fast::glu``."""
    gate, up = _flat(gate), _flat(up)
    y = empty(gate, *gate.shape)
    chosen, half = flat_config(str(architecture(y.device))), gate[0].numel()
    launch(
        forward_kernel,
        (triton.cdiv(half, chosen.blocks["BLOCK"]),),
        chosen,
        *(gate, up, y, half, gate.stride(0), up.stride(0)),
        ACTIVATION=activation,
        DUAL=len(gate) == 2,
    )
    return y


def _pull_back(dy: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor, activation: str) -> None:
    full = len(dy) == 2
    chosen, half = flat_config(str(architecture(dy.device))), dy[0].numel()
    launch(
        backward_kernel,
        (triton.cdiv(half, chosen.blocks["BLOCK"]),),
        chosen,
        *(dy, gate, up, dgate, dup, half, dy.stride(0) if full else 0, gate.stride(0), up.stride(0)),
        ACTIVATION=activation,
        FULL=full,
    )


def backward(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Launch what serves ``sap_fast::glu_backward``."""
    dgate, dup = empty(gate, *dy.shape), empty(up, *dy.shape)
    _pull_back(_flat(dy), _flat(gate), _flat(up), dgate, dup, activation)
    return dgate, dup


def backward_(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> None:
    """Launch what serves ``sap_fast::glu_backward_``; gate and up are contiguous (see ``may_overwrite``)."""
    _pull_back(_flat(dy), gate, up, gate, up, activation)
