"""Holds what rotary is tried on."""

import torch

from sap_fast.ops._cases import STREAMED, Case, Dual, OpCases, Sizes, normal
from sap_fast.ops.rotary import rotary
from sap_fast.ops.rotary.reference import primal


def _case(
    rows: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    name: str = "",
    *,
    rotary_dim: int | None = None,
    repeated: bool = False,
    purpose: str = "contract",
) -> Case:
    def make(rng: torch.Generator) -> tuple[dict, dict]:
        # Models repeat their angles in the two halves of the channels; the op does not rely on it, others do.
        width = rotary_dim or head_dim
        angles = normal(rng, rows, width // 2).repeat(1, 2) if repeated else normal(rng, rows, width)
        inputs = {
            "q": normal(rng, 2, rows, heads, head_dim),
            "k": normal(rng, 2, rows, kv_heads, head_dim),
        }
        return inputs, {"cos": angles.cos(), "sin": angles.sin()}

    return Case(name or f"{rows}x{heads}x{kv_heads}x{head_dim}", make, purpose)


def _call(duals: dict[str, Dual], c: dict) -> list[Dual]:
    q, q_dot, k, k_dot = rotary(*duals["q"], *duals["k"], **c)
    return [(q, q_dot), (k, k_dot)]


CASES = OpCases(
    name="rotary",
    # Not q and k: the answers of a problem are told apart by name, and those are its inputs.
    outputs=("q_out", "k_out"),
    call=_call,
    primal=lambda xs, c: primal(xs["q"], xs["k"], **c),
    cases=[
        _case(1, 1, 1, 2),
        _case(0, 3, 1, 6),
        _case(5, 3, 1, 6),
        _case(7, 4, 2, 10),
        _case(5, 3, 3, 10, "partial", rotary_dim=4),
        *(_case(3, 32, 8, d, purpose="compile") for d in (64, 96, 128, 256)),
        _case(3, 32, 8, 128, "partial-128", rotary_dim=32, purpose="compile"),
        _case(1024, 9, 3, 64, "smollm2-135m", purpose="bench"),
        _case(1024, 32, 32, 128, "llama-2-7b", purpose="bench"),
    ],
    sizes=Sizes(lambda w, rows, _: _case(rows, w.heads, w.kv_heads, w.head_dim, repeated=True), timed=STREAMED),
    typical="partial",
    # Channels beyond those of cos and sin are left alone, however many there are.
    any_width=("q", "k", "dq", "dk"),
)
