"""Holds what attention is tried on."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sap_fast.ops._cases import MANY, Case, OpCases, Problem, Products, Size, Sizes, Widths, normal
from sap_fast.ops.attention import attention
from sap_fast.ops.attention.reference import primal


def _case(
    name: str,
    lengths: Sequence[int],
    *,
    heads: int = 2,
    kv_heads: int = 1,
    head_dim: int = 5,
    used: Sequence[int] | None = None,
    keys: Sequence[int] | None = None,
    rows_after: int = 0,
    longer: int = 0,
    window: int | None = None,
    scale: float | None = None,
    purpose: str = "contract",
) -> Case:
    """Describe packed sequences of these lengths.

    Args:
        used: how many rows of each sequence are real; the rest is padding.
        keys: how many keys each sequence has, where that is not the number of its queries, which ``lengths`` then are.
        rows_after: rows after the last sequence, which belong to none; of keys too.
        longer: by how much ``max_seqlen``, and that of keys, exceeds the longest length.
    """

    def make(rng: torch.Generator) -> tuple[dict, dict]:
        def integers(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=rng.device)

        def starts(lengths: Sequence[int]) -> Tensor:
            return integers(list(itertools.accumulate(lengths, initial=0)))

        rows_k = sum(lengths if keys is None else keys) + rows_after
        inputs = {
            "q": normal(rng, 2, sum(lengths) + rows_after, heads, head_dim),
            "k": normal(rng, 2, rows_k, kv_heads, head_dim),
            "v": normal(rng, 2, rows_k, kv_heads, head_dim),
        }
        constants = {
            "cu_seqlens": starts(lengths),
            "seqused": None if used is None else integers(used),
            "cu_seqlens_k": None if keys is None else starts(keys),
            "max_seqlen": max(lengths, default=0) + longer,
            "max_seqlen_k": None if keys is None else max(keys) + longer,
            "scale": head_dim**-0.5 if scale is None else scale,
            "window": window,
        }
        return inputs, constants

    ends = zip(lengths, lengths if keys is None else keys, strict=True)
    seen = sum(min(t + 1, window or t + 1) for n, n_k in ends for t in range(n_k - n, n_k))
    return Case(name, make, purpose, flops=2.0 * heads * head_dim * seen)


def _primal(xs: dict[str, Tensor], c: dict) -> tuple[Tensor, ...]:
    longest_k = c["max_seqlen"] if c["max_seqlen_k"] is None else c["max_seqlen_k"]
    return primal(xs["q"], xs["k"], xs["v"], **{**c, "window": c["window"] or 0, "max_seqlen_k": longest_k})[:1]


def _of_model(w: Widths, rows: int, length: int) -> Case:
    """Draw as many whole sequences as there are rows for."""
    return _case(
        f"{rows // length}x{length}",
        [length] * (rows // length),
        heads=w.heads,
        kv_heads=w.kv_heads,
        head_dim=w.head_dim,
        rows_after=rows % length,
    )


_TOKENS_AT_ONCE = 2048


def _parts(problem: Problem) -> list[Problem]:
    """Cut a problem of equal sequences into some at a time: the T x T matrices of its truth are float64."""
    c, rows = problem.constants, problem.inputs["q"].shape[1]
    length, starts = c["max_seqlen"], c["cu_seqlens"]
    step = max(_TOKENS_AT_ONCE // length, 1) * length

    def part(start: int, stop: int) -> Problem:
        cu_seqlens = torch.arange(0, stop - start + 1, length, dtype=starts.dtype, device=starts.device)
        inputs, cotangents = (
            {name: x[:, start:stop] for name, x in stacks.items()} for stacks in (problem.inputs, problem.cotangents)
        )
        return Problem(inputs, {**c, "cu_seqlens": cu_seqlens}, cotangents)

    return [part(start, stop) for start, stop in itertools.pairwise([*range(0, rows, step), rows])]


# Sequences that share the rows of a prefix, of which the first has the queries.
_PREFIXED: dict[str, Any] = {"lengths": [85] + [45] * 11, "keys": [85] * 12}
# Lengths that are timed.
_TIMED = (128, 256, 2048)

CASES = OpCases(
    name="attention",
    outputs=("o",),
    call=lambda duals, c: [attention(*duals["q"], *duals["k"], *duals["v"], **c)],
    primal=_primal,
    cases=[
        _case("one-token", [1]),
        _case("no-sequence", []),
        _case("only-empty-sequences", [0, 0]),
        _case("one-sequence", [7]),
        _case("packed", [3, 1, 0, 5, 2]),
        _case("more-than-a-tile", [3, 70], head_dim=16),
        _case("grouped-heads", [4, 3], heads=6, kv_heads=2, head_dim=3),
        _case("all-heads", [4, 3], heads=3, kv_heads=3),
        _case("window", [8, 1, 4], window=3),
        _case("window-of-one", [4, 2], window=1),
        _case("window-wider-than-all", [4, 2], window=10),
        _case("padded-right", [5, 5, 5], used=[3, 0, 5]),
        _case("padded-right-window", [6, 6], used=[5, 2], window=2),
        _case("rows-after-the-last", [4, 2], rows_after=3),
        _case("max-seqlen-larger", [4, 2], longer=3),
        _case("max-seqlen-larger-no-rows", [0], longer=9),
        _case("peaked", [7], scale=8.0),
        _case("queries-at-the-end", [2, 3, 1], keys=[5, 3, 4]),
        _case("as-many-queries-as-keys", [4, 2], keys=[4, 2], rows_after=2),
        _case("keys-without-queries", [2, 0, 3, 0], keys=[4, 3, 3, 0], longer=2),
        _case("no-query-at-all", [0, 0], keys=[3, 2]),
        _case("one-query-many-keys", [1], keys=[9], heads=6, kv_heads=2),
        _case("queries-at-the-end-window", [3, 2, 0], keys=[8, 4, 2], window=3, rows_after=1),
        # Queries and keys of several tiles, of which no length is a multiple, with heads of one group in one program.
        _case("tiles-grouped-padded", [67, 40], used=[67, 5], head_dim=17, rows_after=70, purpose="tiles"),
        # A window that ends within a tile, so that whole tiles are skipped on either side of the band.
        _case("tiles-window", [101], heads=1, window=20, purpose="tiles"),
        # Keys before the queries, as many as are no multiple of a tile: more than one, and a few.
        _case("tiles-at-the-end", [40, 67, 0], keys=[77, 70, 35], head_dim=17, rows_after=70, purpose="tiles"),
        _case("tiles-at-the-end-window", [70], keys=[123], heads=1, window=20, purpose="tiles"),
        *(_case(f"head-dim-{d}", [9, 6], kv_heads=2, head_dim=d, purpose="compile") for d in (64, 96, 128, 256, 32)),
        _case("head-dim-128-grouped", [9, 6], heads=8, kv_heads=2, head_dim=128, purpose="compile"),
        _case("head-dim-128-window", [9, 6], kv_heads=2, head_dim=128, window=4, purpose="compile"),
        # What costs the most registers, in the head dimension of small models.
        _case(
            "head-dim-64-grouped-padded-window",
            [9, 6],
            used=[9, 2],
            heads=9,
            kv_heads=3,
            head_dim=64,
            window=4,
            purpose="compile",
        ),
        _case("head-dim-128-at-the-end", [9, 6], keys=[12, 6], kv_heads=2, head_dim=128, purpose="compile"),
        _case(
            "head-dim-64-grouped-at-the-end-window",
            [9, 6],
            keys=[12, 6],
            heads=9,
            kv_heads=3,
            head_dim=64,
            window=4,
            purpose="compile",
        ),
        _case("smollm2-135m", [512, 300, 212], heads=9, kv_heads=3, head_dim=64, purpose="bench"),
        _case("llama-2-7b", [512, 300, 212], heads=32, kv_heads=32, head_dim=128, purpose="bench"),
        _case("smollm2-135m-at-the-end", **_PREFIXED, heads=9, kv_heads=3, head_dim=64, purpose="bench"),
        _case("llama-2-7b-at-the-end", **_PREFIXED, heads=32, kv_heads=32, head_dim=128, purpose="bench"),
    ],
    sizes=Sizes(
        _of_model,
        timed=[
            *(Size("llama-2-7b", MANY, length, target="flash", compiled=length == 2048) for length in _TIMED),
            *(Size("smollm2-135m", MANY, length) for length in _TIMED),
        ],
        length=96,
        parts=_parts,
    ),
    typical="packed",
    # Forward QK', PV and, of a dual, Q_dot K', Q K_dot', P V_dot, P_dot V. Backward dP, dV, dQ, dK;
    # of a dual each of these once for its tangent and, by the product rule, twice for its primal.
    products=Products(forward=2, backward=4, dual_forward=6, dual_backward=12),
    multiplies=("forward_kernel", "query_kernel", "key_kernel"),
    any_shape=("o",),  # which only a GPU needs
)
