"""Holds what glu is tried on."""

import torch

from sap_fast.ops._cases import STREAMED, Case, OpCases, Sizes, normal
from sap_fast.ops.glu import glu
from sap_fast.ops.glu.reference import primal


def _case(
    rows: int,
    d: int,
    name: str = "",
    *,
    activation: str = "silu",
    scale: float = 1.0,
    purpose: str = "contract",
) -> Case:
    def make(rng: torch.Generator) -> tuple[dict, dict]:
        gate = scale * normal(rng, 2, rows, d)
        return {"gate": gate, "up": normal(rng, 2, rows, d)}, {"activation": activation}

    return Case(name or f"{rows}x{d}", make, purpose)


CASES = OpCases(
    name="glu",
    outputs=("y",),
    call=lambda duals, c: [glu(*duals["gate"], *duals["up"], **c)],
    primal=lambda xs, c: primal(xs["gate"], xs["up"], **c),
    cases=[
        _case(1, 1),
        _case(0, 8),
        _case(1, 33),
        _case(13, 64),
        _case(5, 7, "silu"),
        _case(5, 7, "gelu", activation="gelu"),
        _case(5, 7, "gelu_tanh", activation="gelu_tanh"),
        # Far out on both tails, where exp(-gate) would overflow.
        _case(5, 7, "silu-saturated", scale=200.0),
        _case(5, 7, "gelu-saturated", activation="gelu", scale=200.0),
        _case(5, 7, "gelu_tanh-saturated", activation="gelu_tanh", scale=200.0),
        _case(5, 700, purpose="tiles"),
        *(_case(3, 11008, a, activation=a, purpose="compile") for a in ("silu", "gelu", "gelu_tanh")),
        _case(1024, 1536, "smollm2-135m", purpose="bench"),
        _case(1024, 11008, "llama-2-7b", purpose="bench"),
    ],
    sizes=Sizes(lambda w, rows, _: _case(rows, w.inner), timed=STREAMED),
    typical="silu",
)
