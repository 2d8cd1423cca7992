"""LoRA linear maps of a dual: frozen products by torch, adapters by the Triton kernels of ``products.py``.

Which adapters are worked on together, and in which order the halves come, is decided here. README.md derives it.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from sap_fast.ops._library import architecture
from sap_fast.ops._triton import Config, config, empty, launch, power_of_2, rows_of
from sap_fast.ops.lora_linear.dropout import kept_factor
from sap_fast.ops.lora_linear.products import Plan, Side, down_kernel, marked, outer_kernel, sum_kernel, up_kernel


class _Tiles(NamedTuple):
    """Tells how each kernel is launched, and the largest block of ranks: in ``down`` and ``outer``, and in ``up``."""

    down: Config
    up: Config
    outer: Config
    ranks: int
    ranks_up: int


def _tiles(arch: str, dtype: torch.dtype, adapters: Sequence["_Adapter"]) -> _Tiles:
    """Look up the table of configurations; README.md has the reasons."""
    masked, many = any(one.dropout for one in adapters), len(adapters) > 1
    large = arch in ("sm_90", "sm_100")
    stages = 3 if large else 2
    if dtype == torch.float32:
        return _Tiles(
            down=config(num_warps=8, num_stages=2, BM=16, BK=16 if arch == "sm_100" else 32),
            up=config(num_warps=8, num_stages=1, BM=16 if masked or many else 32, BN=64),
            outer=config(num_warps=8, num_stages=2, BM=32, BN=64 if many else 128),
            ranks=32,
            ranks_up=32,
        )
    return _Tiles(
        down=config(num_warps=8 if masked and many else 4, num_stages=stages, BM=32, BK=64),
        up=config(
            num_warps=4 if arch == "gfx942" else 8, num_stages=1, BM=64 if large else 32, BN=64 if masked else 128
        ),
        outer=config(num_warps=4, num_stages=stages, BM=32, BN=128),
        ranks=32 if many or arch == "sm_100" else 64,
        ranks_up=32,
    )


_SUM = config(num_warps=4, BLOCK=1024)


class _Adapter(NamedTuple):
    """Holds an adapter of one target; in an ordinary pass ``a_dot`` and ``b_dot`` are its own ``a`` and ``b``."""

    target: int
    a: Tensor
    b: Tensor
    a_dot: Tensor
    b_dot: Tensor
    scaling: float
    dropout: float
    salt: int
    first: int
    slot: int


def _adapters(
    a: Sequence[Tensor | None],
    b: Sequence[Tensor | None],
    a_dot: Sequence[Tensor | None],
    b_dot: Sequence[Tensor | None],
    scaling: Sequence[float],
    dropout: Sequence[float],
    salt: Sequence[int],
) -> list[_Adapter]:
    """List the adapters that there are, each with its slot among the columns of t: a tl.dot takes no fewer than 16."""
    found: list[_Adapter] = []
    first = 0
    for i, (a_i, b_i, a_dot_i, b_dot_i) in enumerate(zip(a, b, a_dot, b_dot, strict=True)):
        if a_i is None or b_i is None:
            continue
        slot = power_of_2(a_i.shape[0], 16)
        tangents = (a_i if a_dot_i is None else a_dot_i, b_i if b_dot_i is None else b_dot_i)
        found.append(_Adapter(i, a_i, b_i, *tangents, scaling[i], dropout[i], salt[i], first, slot))
        first += slot
    return found


@functools.cache
def dropout_constants(p: float) -> tuple[int, float]:
    """Find the largest word of the mask that is dropped, and the factor of what is kept, as ``dropout_mask`` does."""
    limit = round(p * 2**32) - 1
    return limit, kept_factor(p) if limit >= 0 else 1.0


def _side(
    adapter: _Adapter,
    z: Tensor,
    m: Tensor,
    m_dot: Tensor,
    block: int,
    *,
    swapped: bool = False,
    masked: bool = False,
    bias: Tensor | None = None,
) -> Side:
    """Describe one matrix ``m [rank, width]`` of an adapter beside a stack.

    Args:
        swapped: whether the stack is one of cotangents, whose value half, the ordinary gradient, comes last.
        masked: whether the stack is x or its cotangent, which dropout acts on.
    """
    limit, kept = dropout_constants(adapter.dropout if masked else 0.0)
    constants = (*m.shape[-2:], adapter.first, adapter.slot, min(block, adapter.slot), limit, kept, adapter.scaling)
    return Side._make(
        (
            *(z[-1] if swapped else z, -z.stride(0) if swapped else z.stride(0), z.stride(1)),
            *(m, *m.stride()[-2:], m_dot, *m_dot.stride()[-2:]),
            *(None if bias is None else rows_of(bias), marked(adapter.salt)),
            *map(tl.constexpr, constants),
        )
    )


def _plan(dtype: torch.dtype, adapters: Sequence[_Adapter], halves: int, widths: Iterable[int], block: int) -> Plan:
    """Collect what the kernels of one pass have in common.

    Numbers of parts and groups depend on the model alone and not on the device, so that sums have one order everywhere.
    """
    widest, most = max(widths), max(adapter.slot for adapter in adapters)
    parts = 1 if widest < 1024 else 2 if widest < 8192 else 4
    groups = 4 if most <= 64 else 2
    columns = sum(adapter.slot for adapter in adapters)
    # tf32 holds all digits of a bfloat16, and more of an adapter's than a bfloat16 would.
    precision = "ieee" if dtype == torch.float32 else "tf32"
    return Plan(*map(tl.constexpr, (columns, halves, parts, triton.cdiv(most, block), groups, precision)))


def forward(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    a: list[Tensor | None],
    b: list[Tensor | None],
    a_dot: list[Tensor | None],
    b_dot: list[Tensor | None],
    seed: Tensor,
    scaling: list[float],
    dropout: list[float],
    salt: list[int],
) -> list[Tensor]:
    """Launch what serves ``sap_fast::lora_linear``."""
    x = rows_of(x)
    halves, rows, d_in = x.shape
    # Both halves at once: the weight is read once.
    flat = x.reshape(halves * rows, d_in)
    ys = [F.linear(flat, weight).view(halves, rows, weight.shape[0]) for weight in weights]
    forward_(ys, x, biases, a, b, a_dot, b_dot, seed, scaling, dropout, salt)
    return ys


def forward_(
    ys: list[Tensor],
    x: Tensor,
    biases: list[Tensor | None],
    a: list[Tensor | None],
    b: list[Tensor | None],
    a_dot: list[Tensor | None],
    b_dot: list[Tensor | None],
    seed: Tensor,
    scaling: list[float],
    dropout: list[float],
    salt: list[int],
) -> None:
    """Launch what serves ``sap_fast::lora_linear_``."""
    x = rows_of(x)
    halves, rows, d_in = x.shape
    for y, bias, a_i in zip(ys, biases, a, strict=True):
        if a_i is None and bias is not None:
            y[0] += bias
    adapters = _adapters(a, b, a_dot, b_dot, scaling, dropout, salt)
    if not adapters:
        return

    tiles = _tiles(str(architecture(x.device)), x.dtype, adapters)
    plan = _plan(x.dtype, adapters, halves, [d_in], tiles.ranks)
    t = empty(x, plan.PARTS.value, halves, rows, plan.R.value, dtype=torch.float32)
    common = (seed, rows, plan)
    launch(
        down_kernel,
        (plan.CHUNKS.value * plan.PARTS.value, triton.cdiv(rows, tiles.down.blocks["BM"]), 1),
        tiles.down,
        *(tuple(_side(one, x, one.a, one.a_dot, tiles.ranks, masked=True) for one in adapters), t),
        *((), t, *common),
        TOGETHER=len(adapters),
        EACH=0,
        PAIR_TOGETHER=halves == 2,
        PAIR_EACH=False,
    )
    outputs = tuple(
        _side(one, ys[one.target], one.b.t(), one.b_dot.t(), tiles.ranks_up, bias=biases[one.target])
        for one in adapters
    )
    launch(
        up_kernel,
        (
            max(triton.cdiv(one.b.shape[0], tiles.up.blocks["BN"]) for one in adapters),
            triton.cdiv(rows, tiles.up.blocks["BM"]),
            len(adapters),
        ),
        tiles.up,
        *((), outputs, t, *common),
        TOGETHER=0,
        EACH=len(adapters),
        DUAL=halves == 2,
    )


def backward(
    dys: list[Tensor],
    x: Tensor,
    weights: list[Tensor],
    a: list[Tensor | None],
    b: list[Tensor | None],
    a_dot: list[Tensor | None],
    b_dot: list[Tensor | None],
    seed: Tensor,
    scaling: list[float],
    dropout: list[float],
    salt: list[int],
    need_dx: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Launch what serves ``sap_fast::lora_linear_backward``."""
    dys = [rows_of(dy) for dy in dys]
    n, rows, _ = dys[0].shape
    d_in = x.shape[2]
    dx = empty(x, n if need_dx else 0, rows, d_in)
    if need_dx:
        flat = dx.view(n * rows, d_in)
        for i, (dy, weight) in enumerate(zip(dys, weights, strict=True)):
            torch.addmm(flat, dy.reshape(n * rows, dy.shape[2]), weight, beta=min(i, 1), out=flat)
    das, dbs = backward_([dx] * need_dx, dys, x, a, b, a_dot, b_dot, seed, scaling, dropout, salt)
    return dx, das, dbs


def backward_(
    products: list[Tensor],
    dys: list[Tensor],
    x: Tensor,
    a: list[Tensor | None],
    b: list[Tensor | None],
    a_dot: list[Tensor | None],
    b_dot: list[Tensor | None],
    seed: Tensor,
    scaling: list[float],
    dropout: list[float],
    salt: list[int],
) -> tuple[list[Tensor], list[Tensor]]:
    """Launch what serves ``sap_fast::lora_linear_backward_``."""
    dys = [rows_of(dy) for dy in dys]
    n, rows, _ = dys[0].shape
    d_in = x.shape[2]
    for product in products[1:]:
        products[0] += product
    das, dbs = ([empty(x, *((0,) if m is None else m.shape), dtype=torch.float32) for m in ms] for ms in (a, b))
    adapters = _adapters(a, b, a_dot, b_dot, scaling, dropout, salt)
    if not adapters:
        return das, dbs

    x = rows_of(x)
    tiles = _tiles(str(architecture(x.device)), x.dtype, adapters)
    plan = _plan(x.dtype, adapters, n + 1, (d_in, *(one.b.shape[0] for one in adapters)), tiles.ranks)
    # Its halves: s A (keep x), then s dy_dot B, then s (dy B + dy_dot B_dot).
    t = empty(x, plan.PARTS.value, n + 1, rows, plan.R.value, dtype=torch.float32)
    dt = t[:, 1:]
    common = (seed, rows, plan)
    launch(
        down_kernel,
        (plan.CHUNKS.value * plan.PARTS.value, triton.cdiv(rows, tiles.down.blocks["BM"]), 1 + len(adapters)),
        tiles.down,
        *(tuple(_side(one, x, one.a, one.a, tiles.ranks, masked=True) for one in adapters), t),
        *(
            tuple(_side(one, dys[one.target], one.b.t(), one.b_dot.t(), tiles.ranks, swapped=True) for one in adapters),
            dt,
        ),
        *common,
        TOGETHER=len(adapters),
        EACH=len(adapters),
        PAIR_TOGETHER=False,
        PAIR_EACH=n == 2,
    )
    if products:
        launch(
            up_kernel,
            (triton.cdiv(d_in, tiles.up.blocks["BN"]), triton.cdiv(rows, tiles.up.blocks["BM"]), 1),
            tiles.up,
            tuple(
                _side(one, products[0], one.a, one.a_dot, tiles.ranks_up, swapped=True, masked=True) for one in adapters
            ),
            *((), dt, *common),
            TOGETHER=len(adapters),
            EACH=0,
            DUAL=n == 2,
        )
    _matrix_gradients(adapters, das, dbs, dys, x, t, seed, plan, tiles)
    return das, dbs


def _matrix_gradients(
    adapters: Sequence[_Adapter],
    das: Sequence[Tensor],
    dbs: Sequence[Tensor],
    dys: Sequence[Tensor],
    x: Tensor,
    t: Tensor,
    seed: Tensor,
    plan: Plan,
    tiles: _Tiles,
) -> None:
    """Compute ``dA = (s dy_dot B)^T (keep x)`` and ``dB = dy_dot^T t``, by blocks of rows added up in order."""
    groups, count = plan.GROUPS.value, len(adapters)
    sums = [das[one.target] for one in adapters] + [dbs[one.target] for one in adapters]
    parts = [empty(x, groups, *whole.shape, dtype=torch.float32) for whole in sums]
    tiles_across = max(triton.cdiv(max(whole.shape), tiles.outer.blocks["BN"]) for whole in sums)
    launch(
        outer_kernel,
        (plan.CHUNKS.value * tiles_across, groups, 1 + count),
        tiles.outer,
        tuple(_side(one, x, m, m, tiles.ranks, masked=True) for one, m in zip(adapters, parts[:count], strict=True)),
        t[:, 1:],
        tuple(
            _side(one, dys[one.target], m.mT, m.mT, tiles.ranks, swapped=True)
            for one, m in zip(adapters, parts[count:], strict=True)
        ),
        *(t, seed, t.shape[2], plan),
        TOGETHER=count,
        EACH=count,
    )
    launch(
        sum_kernel,
        (max(triton.cdiv(whole.numel(), _SUM.blocks["BLOCK"]) for whole in sums), 2 * count),
        _SUM,
        *(tuple(parts), tuple(sums), tuple(tl.constexpr(whole.numel()) for whole in sums)),
        N=2 * count,
        GROUPS=groups,
    )
