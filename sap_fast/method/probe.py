"""The probe ``V``: one vector added to the output of each probed layer. The only state of the method.

It is a training-time device: it lives here, never on the model, and never in a checkpoint of the model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sap_fast.config import SAPConfig

# torch.optim.AdamW's defaults, with which the released code steps its probe (model.py, load_optimizer).
_BETA1, _BETA2, _EPS = 0.9, 0.999, 1e-8


@dataclass(frozen=True)
class Probe:
    """Holds the probe in use, and AdamW's moments, all layers in one tensor.

    Immutable: :meth:`climbed` gives the next one, so that a refused step leaves this one as it was.

    Attributes:
        layers: the probed layers, in the order of the rows.
        vectors, first_moment, second_moment: ``[P, d]`` in float32 (float64 for a float64 model).
        steps: how often AdamW has stepped; 0-dim float64 on the device for captured steps, where it cannot be a number.
    """

    layers: tuple[int, ...]
    vectors: Tensor
    first_moment: Tensor
    second_moment: Tensor
    steps: int | Tensor = 0

    @classmethod
    def zeros(cls, layers: tuple[int, ...], width: int, device: torch.device, dtype: torch.dtype) -> "Probe":
        zero = torch.zeros(len(layers), width, device=device, dtype=dtype)
        return cls(layers, zero, zero, zero)

    @classmethod
    def of(cls, vectors: Mapping[int, Tensor]) -> "Probe":
        """Make the probe of these vectors ``[d]`` by layer, before AdamW's first step."""
        stack = torch.stack(list(vectors.values()))
        zero = torch.zeros_like(stack)
        return cls(tuple(vectors), stack, zero, zero)

    def by_layer(self, rows: Tensor) -> dict[int, Tensor]:
        """Return the rows of a tensor ``[P, ...]`` by layer: views."""
        return dict(zip(self.layers, rows.unbind(), strict=True))

    def dual_leaves(self) -> dict[int, Tensor]:
        """Make leaves ``[2, d]`` by layer for a dual pass. Their tangents are 0: a probe stays where weights move."""
        return self._by_layer(torch.stack((self.vectors, torch.zeros_like(self.vectors)), 1), requires_grad=True)

    def leaves(self, *, requires_grad: bool = False) -> dict[int, Tensor]:
        """Make leaves ``[1, d]`` by layer for an ordinary pass."""
        return self._by_layer(self.vectors[:, None], requires_grad)

    def _by_layer(self, stacks: Tensor, requires_grad: bool) -> dict[int, Tensor]:
        return {j: x.detach().requires_grad_(requires_grad) for j, x in self.by_layer(stacks).items()}

    def at_zero(self) -> "Probe":
        """Return this probe with its vectors zero, where a climb starts."""
        return replace(self, vectors=torch.zeros_like(self.vectors))

    def climbed(self, gradient: Tensor, rms: Tensor, alpha: Tensor | None, config: SAPConfig) -> "Probe":
        """Find a probe from zero by one climb on ``L_su = alpha L_dot``.

        Args:
            gradient: ``grad_V L_dot``, ``[P, d]``.
            rms: per-token RMS of each probed layer's output, ``[P, tokens]``; infinite of dead tokens.
            alpha: 0-dim; what turns ``grad_V L_dot`` into ``grad_V L_su``. Only ``"adamw"`` is not scale-free.
        """
        scale = _median(rms, padded=config.graph) if config.strength_unit == "relative" else 1.0
        if config.probe_update == "sign":
            # Steepest ascent where each coordinate may move by strength * scale.
            return replace(self, vectors=config.strength * scale * gradient.sign())
        if config.probe_update == "normalised":
            return replace(self, vectors=_normalised(gradient, scale, config))
        assert alpha is not None  # AdamW is not scale-free
        return self._adamw(-alpha * gradient, scale, config)

    def _adamw(self, descent: Tensor, scale: Tensor | float, config: SAPConfig) -> "Probe":
        """Take one AdamW step from zero, minimising ``-L_su``. Weight decay of a zero vector is none."""
        t = self.steps + 1
        first = _BETA1 * self.first_moment + (1 - _BETA1) * descent
        second = _BETA2 * self.second_moment + (1 - _BETA2) * descent.square()
        root = (second / (1 - _BETA2**t)).sqrt() + _EPS
        vectors = -config.strength * scale * (first / (1 - _BETA1**t)) / root
        return Probe(self.layers, vectors, first, second, t)


def _median(rms: Tensor, *, padded: bool) -> Tensor:
    """Take the median over tokens ``[P, 1]``: a sequence's first token can carry an activation 100 times as large.

    Args:
        padded: whether there may be dead tokens, which are infinite, among them.
    """
    # By sorting, since torch.median along a dimension is refused on CUDA under deterministic algorithms.
    ordered = rms.sort(1).values
    if padded:
        real = (rms != torch.inf).sum(1, keepdim=True)
        return ordered.gather(1, (real - 1).clamp_min(0) // 2)
    return ordered[:, (rms.shape[1] - 1) // 2, None]


def _normalised(gradient: Tensor, scale: Tensor | float, config: SAPConfig) -> Tensor:
    """Climb by the steepest ascent over all layers together on a sphere.

    Absolute: ``V = strength * G / |G|``. Relative: the sphere is ``sum_j |v_j|^2 / (d scale_j^2) = strength^2``,
    so that ``w_j = v_j / (sqrt(d) scale_j)``, whose gradient is ``sqrt(d) scale_j G_j``, has norm ``strength``.
    """
    unit = gradient.shape[1] ** 0.5 * scale if config.strength_unit == "relative" else 1.0
    scaled = unit * gradient
    norm = scaled.norm()
    # A zero gradient gives no probe rather than 0 / 0.
    step = torch.where(norm > 0, config.strength / norm, torch.zeros_like(norm))
    return step * unit * scaled
