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
    """The probe in use, by layer ``[d]`` in float32 (float64 for a float64 model), and AdamW's moments.

    Immutable: :meth:`climbed` gives the next one, so that a refused step leaves this one as it was.
    """

    vectors: Mapping[int, Tensor]
    first_moment: Mapping[int, Tensor]
    second_moment: Mapping[int, Tensor]
    steps: int = 0

    @classmethod
    def zeros(cls, layers: tuple[int, ...], width: int, device: torch.device, dtype: torch.dtype) -> "Probe":
        zero = {layer: torch.zeros(width, device=device, dtype=dtype) for layer in layers}
        return cls(zero, zero, zero)

    def pairs(self) -> dict[int, Tensor]:
        """Leaves ``[2, d]`` for a pair; the tangent half is zero, since the probe does not move with the weights."""
        return {j: torch.stack((v, torch.zeros_like(v))).requires_grad_() for j, v in self.vectors.items()}

    def singles(self, *, requires_grad: bool = False) -> dict[int, Tensor]:
        """Leaves ``[1, d]`` for an ordinary pass."""
        return {j: v[None].clone().requires_grad_(requires_grad) for j, v in self.vectors.items()}

    def at_zero(self) -> "Probe":
        """This probe with its vectors zero, where a climb starts."""
        return replace(self, vectors={j: torch.zeros_like(v) for j, v in self.vectors.items()})

    def climbed(
        self,
        gradient: Mapping[int, Tensor],
        rms: Mapping[int, Tensor],
        alpha: Tensor,
        config: SAPConfig,
    ) -> "Probe":
        """The probe found from zero by one climb on ``L_su = alpha L_dot``.

        Args:
            gradient: ``grad_V L_dot`` by layer, ``[d]``.
            rms: per-token RMS of each probed layer's output, ``[rows]``.
            alpha: 0-dim; what turns ``grad_V L_dot`` into ``grad_V L_su`` where a rule is not scale-free.
        """
        # The median over tokens: the first token of a sequence can carry an activation a hundred times as large.
        scale = {j: rms[j].median() if config.strength_unit == "relative" else 1.0 for j in gradient}
        if config.probe_update == "sign":
            # Steepest ascent where each coordinate may move by strength * scale.
            return replace(
                self,
                vectors={j: config.strength * scale[j] * g.sign() for j, g in gradient.items()},
            )
        if config.probe_update == "normalised":
            return replace(self, vectors=_normalised(gradient, scale, config))
        return self._adamw(gradient, scale, alpha, config)

    def _adamw(
        self,
        gradient: Mapping[int, Tensor],
        scale: Mapping[int, Tensor | float],
        alpha: Tensor,
        config: SAPConfig,
    ) -> "Probe":
        """One AdamW step from zero, minimising ``-L_su``. Weight decay of a zero vector is none."""
        t = self.steps + 1
        first, second, vectors = {}, {}, {}
        for j, g in gradient.items():
            descent = -alpha * g
            first[j] = _BETA1 * self.first_moment[j] + (1 - _BETA1) * descent
            second[j] = _BETA2 * self.second_moment[j] + (1 - _BETA2) * descent.square()
            root = (second[j] / (1 - _BETA2**t)).sqrt() + _EPS
            vectors[j] = -config.strength * scale[j] * (first[j] / (1 - _BETA1**t)) / root
        return Probe(vectors, first, second, t)


def _normalised(
    gradient: Mapping[int, Tensor], scale: Mapping[int, Tensor | float], config: SAPConfig
) -> dict[int, Tensor]:
    """Steepest ascent over all layers together on a sphere.

    Absolute: ``V = strength * G / |G|``. Relative: the sphere is ``sum_j |v_j|^2 / (d scale_j^2) = strength^2``,
    so that ``w_j = v_j / (sqrt(d) scale_j)``, whose gradient is ``sqrt(d) scale_j G_j``, has norm ``strength``.
    """
    relative = config.strength_unit == "relative"
    units = {j: g.numel() ** 0.5 * scale[j] if relative else 1.0 for j, g in gradient.items()}
    scaled = {j: units[j] * g for j, g in gradient.items()}
    norm = torch.stack([g.norm() for g in scaled.values()]).norm()
    # A zero gradient gives no probe rather than 0 / 0.
    step = torch.where(norm > 0, config.strength / norm, torch.zeros_like(norm))
    return {j: step * units[j] * g for j, g in scaled.items()}
