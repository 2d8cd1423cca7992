"""Holds what linear_cross_entropy is tried on."""

import torch

from sap_fast.ops._cases import FEW, REAL_MODELS, Case, OpCases, Products, Size, Sizes, normal
from sap_fast.ops.linear_cross_entropy import linear_cross_entropy
from sap_fast.ops.linear_cross_entropy.reference import primal


def _case(rows: int, vocab: int, d: int, name: str = "", *, peak: float = 0.0, purpose: str = "contract") -> Case:
    """Describe ``rows`` predictions; ``peak`` turns each row toward its target."""

    def make(rng: torch.Generator) -> tuple[dict, dict]:
        weight = normal(rng, vocab, d)
        targets = torch.randint(vocab, (rows,), generator=rng, device=rng.device)
        x = normal(rng, 2, rows, d) * d**-0.5
        x[0] += peak * weight[targets]
        return {"x": x}, {"weight": weight, "targets": targets}

    return Case(name or f"{rows}x{vocab}x{d}", make, purpose, flops=2.0 * rows * vocab * d)


CASES = OpCases(
    name="linear_cross_entropy",
    outputs=("nll",),
    call=lambda duals, c: [linear_cross_entropy(*duals["x"], **c)],
    primal=lambda xs, c: primal(xs["x"], **c),
    # The backward's products are formed in the forward.
    products=Products(forward=2, backward=0, dual_forward=4, dual_backward=0),
    cases=[
        _case(1, 1, 1),
        _case(0, 11, 8),
        _case(1, 33, 5),
        _case(5, 11, 7),
        _case(13, 129, 16),
        # Probabilities near one, as of a trained model, whose differences cancel.
        _case(5, 11, 7, "peaked", peak=1.0),
        # Two of the reference's chunks of 512 rows and a part of one.
        _case(1030, 11, 3, "chunks", purpose="reference"),
        # More of the vocabulary than one block.
        _case(3, 5000, 9, purpose="tiles"),
        *(_case(3, vocab, 16, purpose="compile") for vocab in (32000, 49152)),
        _case(1024, 49152, 576, "smollm2-135m", purpose="bench"),
        _case(1024, 32000, 4096, "llama-2-7b", purpose="bench"),
    ],
    sizes=Sizes(
        lambda w, rows, _: _case(rows, w.vocab, w.hidden),
        timed=[Size(model, rows, compiled=rows == FEW[0]) for rows in FEW for model in REAL_MODELS],
        rows=384,  # those of a task batch that predict a token
    ),
    typical="5x11x7",
    reordered=True,
    any_width=("basis",),
)
