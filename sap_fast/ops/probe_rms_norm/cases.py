"""Holds what probe_rms_norm is tried on."""

import torch
from torch import Tensor

from sap_fast.ops._cases import STREAMED, Case, Dual, OpCases, Sizes, normal
from sap_fast.ops.probe_rms_norm import probe_rms_norm
from sap_fast.ops.probe_rms_norm.reference import primal


def _case(
    rows: int,
    d: int,
    name: str = "",
    *,
    probe: bool = True,
    eps: float = 1e-5,
    offset: float = 0.0,
    purpose: str = "contract",
) -> Case:
    def make(rng: torch.Generator) -> tuple[dict, dict]:
        inputs = {"residual": normal(rng, 2, rows, d), "update": normal(rng, 2, rows, d)}
        if probe:
            # The probe does not move with the weights: its tangent is zero.
            v = normal(rng, d)
            inputs["probe"] = torch.stack((v, torch.zeros_like(v)))
        return inputs, {"weight": normal(rng, d), "eps": eps, "offset": offset}

    return Case(name or f"{rows}x{d}", make, purpose)


def _call(duals: dict[str, Dual], c: dict) -> list[Dual]:
    v, v_dot = duals.get("probe", (None, None))
    # A stack made of two leaves, so that autograd hands each half its own cotangent.
    probe = v if v is None else v[None] if v_dot is None else torch.stack((v, v_dot))
    h, h_dot, y, y_dot, _ = probe_rms_norm(*duals["residual"], *duals["update"], probe, **c)
    return [(h, h_dot), (y, y_dot)]


def _primal(xs: dict[str, Tensor], c: dict) -> tuple[Tensor, ...]:
    probe = xs["probe"] if "probe" in xs else torch.zeros_like(c["weight"])
    return primal(xs["residual"], xs["update"], probe, **c)[:2]


CASES = OpCases(
    name="probe_rms_norm",
    outputs=("h", "y"),
    call=_call,
    primal=_primal,
    cases=[
        _case(1, 1, eps=1.0),  # see rms_norm's
        _case(0, 8),
        _case(1, 33),
        _case(5, 7),
        _case(13, 64),
        _case(5, 7, "offset", offset=1.0),
        _case(5, 7, "no-probe", probe=False),
        _case(0, 8, "no-probe-no-rows", probe=False),
        _case(70, 33, "narrow-rows", purpose="tiles"),
        _case(3, 2100, "wide-rows", purpose="tiles"),
        *(_case(3, d, purpose="compile") for d in (576, 1024, 2048, 3584, 4096, 5376, 8192, 16384)),
        _case(3, 4096, "no-probe-4096", probe=False, purpose="compile"),
        _case(1024, 576, "smollm2-135m", purpose="bench"),
        _case(1024, 4096, "llama-2-7b", purpose="bench"),
    ],
    # Into how many parts the sums of a captured probe gradient are cut follows from the rows.
    sizes=Sizes(lambda w, rows, _: _case(rows, w.hidden), timed=STREAMED, rows_matter=True),
    typical="5x7",
    # The cotangent of the update is the residual's.
    returned=lambda names: [name for name in names if name != "update"],
    wide=("probe",),
    whole=("probe",),
)
