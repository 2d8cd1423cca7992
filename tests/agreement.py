"""Compares two sets of results by their largest difference, relative to a scale."""

from torch import Tensor

from sap_fast.ops._tolerances import EXACT


def error(actual: Tensor, expected: Tensor) -> float:
    """Compute the largest difference of two elements; NaN if there is one."""
    assert actual.shape == expected.shape
    return float((actual.double() - expected.double()).abs().max()) if expected.numel() else 0.0


def scales(truth: dict[str, Tensor]) -> dict[str, float]:
    """Find the largest element of each result, against which its error is measured.

    A result that is zero altogether has no scale: attention over one token, say, has no gradient in
    its query, and what is computed for it is the rounding error of terms that cancel. Its scale is
    that of the largest result beside it.
    """
    largest = {name: float(x.abs().max()) if x.numel() else 0.0 for name, x in truth.items()}
    return {name: scale or max(largest.values()) for name, scale in largest.items()}


def assert_agrees(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = EXACT) -> None:
    """Compare all of ``actual`` with its namesakes in ``expected``, relative to their scales."""
    for name, scale in scales(expected).items():
        if name in actual:
            difference = error(actual[name], expected[name])
            assert difference <= tolerance * scale, (
                f"{name} is off by {difference:.3g}; its largest element is {scale:.3g}, "
                f"of which {tolerance:.1g} is allowed"
            )
