"""Holds what lora_linear is tried on."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sap_fast.ops._cases import FEW, MANY, REAL_MODELS, Case, Dual, OpCases, Size, Sizes, Widths, normal
from sap_fast.ops.lora_linear import LoRATarget, dropout_mask, lora_linear
from sap_fast.ops.lora_linear.reference import primal

_MOST_TARGETS = 3
_ADAPTERS = tuple(f"{matrix}{i}" for i in range(_MOST_TARGETS) for matrix in "ab")


def _case(
    name: str,
    rows: int,
    d_in: int,
    widths: Sequence[int],
    ranks: Sequence[int],
    *,
    bias: bool = False,
    scaling: float = 2.0,
    dropout: float = 0.0,
    purpose: str = "contract",
) -> Case:
    """Describe maps of one input to ``widths``, each with an adapter of its rank; 0 is none.

    Inputs are ``x`` and ``a0, b0, a1, ...``; constants ``weight0``, ``bias0``, ... and the seed.
    """

    def make(rng: torch.Generator) -> tuple[dict, dict]:
        # Wider than 32 bits, like the last salt: of their sum the low word counts.
        seed = torch.tensor(2**40 + 17, dtype=torch.int64, device=rng.device)
        inputs = {"x": normal(rng, 2, rows, d_in)}
        constants = {"scaling": scaling, "dropout": dropout, "seed": seed if dropout else None}
        for i, (d_out, rank) in enumerate(zip(widths, ranks, strict=True)):
            constants[f"weight{i}"] = normal(rng, d_out, d_in) * d_in**-0.5
            constants[f"bias{i}"] = normal(rng, d_out) if bias else None
            if rank:
                inputs[f"a{i}"] = normal(rng, 2, rank, d_in) * d_in**-0.5
                inputs[f"b{i}"] = normal(rng, 2, d_out, rank) * rank**-0.5
        return inputs, constants

    multiplications = sum(d_in * d_out + rank * (d_in + d_out) for d_out, rank in zip(widths, ranks, strict=True))
    return Case(name, make, purpose, flops=2.0 * rows * multiplications)


def _of_model(w: Widths, rows: int, _: int) -> Case:
    """Describe queries, keys and values."""
    keys = w.kv_heads * w.head_dim
    return _case(str(rows), rows, w.hidden, [w.heads * w.head_dim, keys, keys], [8, 8, 8])


def _salt(i: int) -> int:
    return (3, 4, 2**62 + 0xABCDEF)[i]


def _call(duals: dict[str, Dual], c: dict) -> list[Dual]:
    targets = []
    for i in range(_MOST_TARGETS):
        if f"weight{i}" in c:
            (a, a_dot), (b, b_dot) = (duals.get(f"{m}{i}", (None, None)) for m in "ab")
            adapter = (a, b, a_dot, b_dot, c["scaling"], c["dropout"], _salt(i))
            targets.append(LoRATarget(c[f"weight{i}"], c[f"bias{i}"], *adapter))
    return lora_linear(*duals["x"], targets, seed=c["seed"])


def _mask(x: Tensor, seed: Tensor, i: int, p: float) -> Tensor:
    return dropout_mask(seed, _salt(i), x.shape[0], x.shape[1], p).to(x.dtype)


def _primal(xs: dict[str, Tensor], c: dict) -> tuple[Tensor, ...]:
    x, p = xs["x"], c["dropout"]
    ys: list[Tensor] = []
    for i in range(_MOST_TARGETS):
        if f"a{i}" in xs:
            keep = _mask(x, c["seed"], i, p) if p else None
            frozen = c[f"weight{i}"], c[f"bias{i}"]
            ys += primal(x, xs[f"a{i}"], xs[f"b{i}"], *frozen, c["scaling"], keep)
        elif f"weight{i}" in c:
            ys.append(F.linear(x, c[f"weight{i}"], c[f"bias{i}"]))
    return tuple(ys)


CASES = OpCases(
    name="lora_linear",
    outputs=("y0", "y1", "y2"),
    call=_call,
    primal=_primal,
    cases=[
        _case("1x1", 1, 1, [1], [1]),
        _case("no-rows", 0, 6, [5], [2]),
        _case("no-adapter", 5, 7, [3], [0]),
        _case("no-adapter-bias", 5, 7, [3], [0], bias=True),
        _case("adapter", 5, 7, [9], [2]),
        _case("bias", 5, 7, [9], [2], bias=True),
        _case("three-targets", 5, 7, [9, 3, 4], [2, 1, 3], bias=True),
        _case("three-targets-one-adapter", 5, 7, [9, 3, 4], [0, 2, 0]),
        _case("rslora", 5, 7, [9], [4], scaling=16 / 4**0.5),
        _case("dropout", 6, 9, [5, 4, 3], [2, 1, 2], dropout=0.3),
        _case("wide", 33, 64, [65], [8], dropout=0.1),
        # More than one block of rows, of columns in either direction, and of ranks; sums over columns in parts.
        _case("tiles-rows", 130, 3, [2], [1], purpose="tiles"),
        _case("tiles-columns", 3, 70, [66, 5], [40, 3], bias=True, dropout=0.2, purpose="tiles"),
        _case("tiles-parts", 2, 1030, [3], [2], purpose="tiles"),
        _case("smollm2-135m-qkv", 4, 576, [576, 192, 192], [8, 8, 8], dropout=0.1, purpose="compile"),
        _case("llama-3-8b-qkv", 4, 4096, [4096, 1024, 1024], [16, 16, 16], purpose="compile"),
        _case("llama-3-8b-down", 4, 14336, [4096], [64], dropout=0.05, purpose="compile"),
        _case("llama-3-8b-o", 4, 4096, [4096], [8], purpose="compile"),
        _case("gate-up-rank-256", 4, 2048, [5632, 5632], [256, 256], bias=True, purpose="compile"),
        _case("smollm2-135m", 1024, 576, [576, 192, 192], [8, 8, 8], purpose="bench"),
        _case("llama-2-7b", 1024, 4096, [4096, 4096, 4096], [8, 8, 8], purpose="bench"),
    ],
    sizes=Sizes(
        _of_model,
        timed=[Size(model, rows, compiled=rows == MANY) for rows in (*FEW, MANY) for model in REAL_MODELS],
    ),
    typical="dropout",
    # x, then all a, then all b.
    returned=lambda names: sorted(names, key=lambda name: "xab".index(name[0])),
    wide=_ADAPTERS,
    # In a dual the gradient of a and b is that of their tangents; see lora_linear.
    tangent_only=_ADAPTERS,
    any_shape=("seed",),  # a number
)
