"""Holds what rms_norm is tried on."""

import torch

from sap_fast.ops._cases import STREAMED, Case, OpCases, Sizes, normal
from sap_fast.ops.rms_norm import rms_norm
from sap_fast.ops.rms_norm.reference import primal


def _case(
    rows: int,
    d: int,
    name: str = "",
    *,
    eps: float = 1e-5,
    offset: float = 0.0,
    scale: float = 1.0,
    purpose: str = "contract",
) -> Case:
    def make(rng: torch.Generator) -> tuple[dict, dict]:
        x = scale * normal(rng, 2, rows, d)
        return {"x": x}, {"weight": normal(rng, d), "eps": eps, "offset": offset}

    return Case(name or f"{rows}x{d}", make, purpose)


CASES = OpCases(
    name="rms_norm",
    outputs=("y",),
    call=lambda duals, c: [rms_norm(*duals["x"], **c)],
    primal=lambda xs, c: primal(xs["x"], **c)[:1],
    cases=[
        # In width 1 the terms of the tangent cancel but for eps / (x^2 + eps) of them.
        _case(1, 1, eps=1.0),
        _case(0, 8),
        _case(1, 33),
        _case(5, 7),
        _case(13, 64),
        _case(5, 7, "offset", offset=1.0),
        # A mean square below eps, and first tokens that carry a massive activation.
        _case(5, 7, "tiny", scale=1e-3),
        _case(5, 7, "huge", scale=1e3),
        _case(70, 33, "narrow-rows", purpose="tiles"),
        _case(3, 2100, "wide-rows", purpose="tiles"),
        *(
            _case(3, d, purpose="compile")
            for d in (32, 64, 96, 128, 256, 576, 1024, 2048, 3584, 4096, 5376, 8192, 16384)
        ),
        _case(1024, 576, "smollm2-135m", purpose="bench"),
        _case(1024, 4096, "llama-2-7b", purpose="bench"),
    ],
    sizes=Sizes(lambda w, rows, _: _case(rows, w.hidden), timed=STREAMED),
    typical="5x7",
)
