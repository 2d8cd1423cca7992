"""Holds what taking rows is tried on."""

from collections.abc import Sequence

import torch

from sap_fast.ops._cases import Case, Dual, OpCases, Sizes, Widths, normal
from sap_fast.ops.take_rows import RowIndex, take_rows
from sap_fast.ops.take_rows.reference import primal


def _case(
    name: str, count: int, rows: Sequence[int], shapes: Sequence[tuple[int, ...]] = ((3,),), purpose: str = "contract"
) -> Case:
    """Describe an index and the shapes of what it takes rows from."""

    def make(rng: torch.Generator) -> tuple[dict, dict]:
        inputs = {f"x{i}": normal(rng, 2, count, *shape) for i, shape in enumerate(shapes)}
        taken = torch.tensor(rows, dtype=torch.int64, device=rng.device)
        return inputs, {"index": RowIndex.of(taken, count)}

    return Case(name, make, purpose)


def _shared(sequences: int, length: int, prefix: int) -> tuple[int, list[int]]:
    """Describe sequences that share a prefix: how many rows they have, and the row of each token."""
    own = length - prefix
    rows = [[*range(prefix), *range(prefix + i * own, prefix + (i + 1) * own)] for i in range(sequences)]
    return prefix + sequences * own, [row for sequence in rows for row in sequence]


def _of_model(w: Widths, rows: int, _: int) -> Case:
    """Describe keys and values of sequences whose common prefix is a third of what they have."""
    return _case(str(rows), rows, [i % rows for i in range(rows + rows // 2)], [(w.kv_heads, w.head_dim)] * 2)


def _call(duals: dict[str, Dual], c: dict) -> list[Dual]:
    return take_rows([*duals.values()], c["index"])


_KV_7B = [(32, 128), (32, 128)]
_KV_135M = [(3, 64), (3, 64)]

CASES = OpCases(
    name="take_rows",
    outputs=("y0", "y1", "y2", "y3"),
    call=_call,
    primal=lambda xs, c: tuple(primal(x, c["index"].rows) for x in xs.values()),
    cases=[
        _case("one", 1, [0]),
        _case("none-taken", 3, []),
        _case("of-none", 0, []),
        _case("identity", 4, [0, 1, 2, 3]),
        _case("some-never-taken", 5, [3, 1]),
        _case("many-times", 3, [0, 1, 0, 2, 0, 0, 1], [(2, 5)]),
        _case("shared-prefix", *_shared(3, 5, 2), [(3, 4), (1, 4), (1, 4)]),
        _case("more-than-a-launch", 4, [1, 1, 3, 0], [(5,), (2, 3), (1,), (7,)]),
        _case("wide", 3, [2, 0, 2], [(9, 130), (17,)], purpose="tiles"),
        _case("llama-2-7b", *_shared(3, 4, 2), _KV_7B, purpose="compile"),
        _case("smollm2-135m", *_shared(3, 4, 2), _KV_135M, purpose="compile"),
        _case("smollm2-135m", *_shared(12, 85, 40), _KV_135M, purpose="bench"),
        _case("llama-2-7b", *_shared(12, 85, 40), _KV_7B, purpose="bench"),
    ],
    sizes=Sizes(_of_model, timed=()),
    typical="shared-prefix",
    # It takes any rows of any tensor; that these are there is a matter of values.
    any_width=("dy",),
    any_shape=("x", "rows"),
)
