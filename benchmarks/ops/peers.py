"""Single-stream kernels of others, run twice: what a dual costs those who have no kernel for duals.

``PEERS`` lists them by name. A peer that is not installed raises :class:`AbsentError`, with its name.
"""

import inspect
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from sap_fast.ops._cases import Problem

# Of one stream: its inputs by name to its outputs.
Single = Callable[..., Sequence[Tensor]]


class AbsentError(Exception):
    """Raised where a peer is not installed here."""


class Twice:
    """Takes two ordinary passes, on the two halves of a dual's inputs.

    The first is that of ``problem.single()``; the second has the other cotangents. Inputs are copies, since some
    kernels write their results over them. What a kernel then finds in its next round is its own last result: its
    time does not depend on it.
    """

    def __init__(self, problem: Problem, names: Sequence[str], single: Single) -> None:
        self.problem, self.single = problem, single
        self.halves = [{name: problem.inputs[name][i].clone() for name in names} for i in (0, 1)]
        self._backward: list[tuple[Sequence[Tensor], list[Tensor], list[Tensor]]] = []

    @torch.no_grad()
    def forward(self) -> list[Sequence[Tensor]]:
        return [self.single(**half) for half in self.halves]

    def backward(self) -> list[tuple[Tensor, ...]]:
        if not self._backward:
            for half, i in zip(self.halves, (-1, 0), strict=True):
                leaves = [x.clone().requires_grad_() for x in half.values()]
                ys = self.single(**dict(zip(half, leaves, strict=True)))
                dys = [dy[i].clone() for dy in self.problem.cotangents.values()]
                self._backward.append((ys, leaves, dys))
        return [torch.autograd.grad(ys, leaves, dys, retain_graph=True) for ys, leaves, dys in self._backward]

    def forward_results(self, output: list[Sequence[Tensor]]) -> dict[str, Tensor]:
        """Name the first pass's outputs as ``problem.single()``'s are."""
        return dict(zip(self.problem.cotangents, output[0], strict=True))

    def backward_results(self, output: list[tuple[Tensor, ...]]) -> dict[str, Tensor]:
        return {f"d{name}": dx for name, dx in zip(self.halves[0], output[0], strict=True)}


def _liger(module: str, function: str) -> Callable[..., Any]:
    try:
        return getattr(import_module(f"liger_kernel.ops.{module}"), function).apply
    except ImportError as error:
        raise AbsentError(f"liger_kernel is not installed, or has no {function}") from error


def liger_rms_norm(problem: Problem) -> Twice:
    apply, c = _liger("rms_norm", "LigerRMSNormFunction"), problem.constants
    return Twice(problem, ["x"], lambda x: [apply(x, c["weight"], c["eps"], c["offset"])])


def liger_probe_rms_norm(problem: Problem) -> Twice:
    """Add the residual and normalise, which is as much of the op as others have: without the probe."""
    apply, c = _liger("fused_add_rms_norm", "LigerFusedAddRMSNormFunction"), problem.constants
    inputs = {name: problem.inputs[name] for name in ("residual", "update")}

    def single(residual: Tensor, update: Tensor) -> list[Tensor]:
        y, h = apply(update, residual, c["weight"], c["eps"], c["offset"])
        return [h, y]

    return Twice(Problem(inputs, c, problem.cotangents), list(inputs), single)


def liger_glu(problem: Problem) -> Twice:
    apply = _liger("swiglu", "LigerSiLUMulFunction")
    return Twice(problem, ["gate", "up"], lambda gate, up: [apply(gate, up)])


def liger_rotary(problem: Problem) -> Twice:
    """Rotate by Liger: its angles must repeat in the two halves of the channels, as those of models do."""
    apply = _liger("rope", "LigerRopeFunction")
    cos, sin = problem.constants["cos"][None], problem.constants["sin"][None]

    def single(q: Tensor, k: Tensor) -> list[Tensor]:
        # [rows, heads, d] to [1, heads, rows, d] and back.
        q, k = apply(q[None].transpose(1, 2), k[None].transpose(1, 2), cos, sin)[:2]
        return [q.transpose(1, 2)[0], k.transpose(1, 2)[0]]

    return Twice(problem, ["q", "k"], single)


def flash_attention(problem: Problem) -> Twice:
    """Attend by PyTorch's flash attention over packed sequences; where there is none, over equal lengths."""
    c = problem.constants
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return Twice(problem, ["q", "k", "v"], _flash_of_equal_lengths(c["max_seqlen"], c["scale"]))
    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"is_causal": True, "scale": c["scale"], "enable_gqa": True}
    if "window_size" in known:  # later releases have it in place of is_causal
        options["window_size"] = (-1, 0)
    options = {name: value for name, value in options.items() if name in known}
    lengths = c["cu_seqlens"], c["cu_seqlens"], c["max_seqlen"], c["max_seqlen"]
    if c["cu_seqlens_k"] is not None:
        lengths = c["cu_seqlens"], c["cu_seqlens_k"], c["max_seqlen"], c["max_seqlen_k"]
    return Twice(problem, ["q", "k", "v"], lambda q, k, v: [varlen_attn(q, k, v, *lengths, **options)])


def _flash_of_equal_lengths(length: int, scale: float) -> Single:
    def single(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        q, k, v = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] > k.shape[1])
        return [o.transpose(1, 2).flatten(0, 1)]

    return single


# By op: the peer's name and what builds it. An op that is not here has no such kernel.
PEERS: dict[str, tuple[str, Callable[[Problem], Twice]]] = {
    "rms_norm": ("liger", liger_rms_norm),
    "probe_rms_norm": ("liger", liger_probe_rms_norm),
    "glu": ("liger", liger_glu),
    "rotary": ("liger", liger_rotary),
    "attention": ("flash", flash_attention),
}


def installed(package: str) -> str | None:
    """Return the version of an optional package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
