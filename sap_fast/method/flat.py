"""All trained tensors as one vector: arithmetic over them is one op, whatever their number.

LoRA puts two small tensors at every adapted projection, hundreds in a model. The direction and the gradients are
sums, multiples, norms and inner products over all of them together, so each is kept as one vector, and named
tensors are views of it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce

import torch
from torch import Tensor

from sap_fast.tensors import LEFT_ALONE


@dataclass(frozen=True, eq=False)
class Flat(Mapping[str, Tensor]):
    """Holds tensors by name, which lie one after another in ``vector [n]`` in the order of ``layout``.

    A tensor looked up by name is a view. Nothing writes to ``vector``: every operation gives a new one. Two take
    part in one operation only if they hold the same names and shapes in the same order.
    """

    vector: Tensor
    layout: tuple[tuple[str, torch.Size], ...] = field(metadata=LEFT_ALONE)

    @classmethod
    def of(cls, like: Mapping[str, Tensor], values: Sequence[Tensor | None] | None = None) -> "Flat":
        """Copy tensors into one vector, in float32 (float64 if any of ``like`` is float64).

        Args:
            like: gives names, shapes and the dtype.
            values: one for each of ``like``, zeros where it is None; the tensors of ``like`` themselves if absent.
        """
        weights = list(like.values())
        found = weights if values is None else values
        dtype = reduce(torch.promote_types, {w.dtype for w in weights}, torch.float32)
        missing = [w.numel() for w, v in zip(weights, found, strict=True) if v is None]
        with torch.no_grad():
            # One zero tensor serves all that is missing.
            zeros = weights[0].new_zeros(max(missing)) if missing else weights[0]
            parts = [zeros[: w.numel()] if v is None else v.flatten() for w, v in zip(weights, found, strict=True)]
            vector = torch.cat(parts).to(dtype)
        return cls(vector, tuple((name, w.shape) for name, w in like.items()))

    @cached_property
    def _views(self) -> dict[str, Tensor]:
        parts = self.vector.split([shape.numel() for _, shape in self.layout])
        return {name: part.view(shape) for (name, shape), part in zip(self.layout, parts, strict=True)}

    def __getitem__(self, name: str) -> Tensor:
        return self._views[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.layout)

    def __len__(self) -> int:
        return len(self.layout)

    def __add__(self, other: "Flat") -> "Flat":
        return Flat(self.vector + self._matching(other), self.layout)

    def __sub__(self, other: "Flat") -> "Flat":
        return Flat(self.vector - self._matching(other), self.layout)

    def __mul__(self, scalar: Tensor | float) -> "Flat":
        return Flat(self.vector * scalar, self.layout)

    def __truediv__(self, scalar: Tensor | float) -> "Flat":
        return Flat(self.vector / scalar, self.layout)

    def dot(self, other: "Flat") -> Tensor:
        """Compute the inner product with another, 0-dim."""
        return (self.vector * self._matching(other)).sum()

    def norm(self) -> Tensor:
        """Compute the Euclidean norm, 0-dim."""
        # linalg.vector_norm adds up one number after another on the CPU, and in float32 is wrong by 4e-4 at 10^7 of
        # them; sum adds in pairs.
        return self.vector.square().sum().sqrt()

    def copies(self, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy the tensors into memory of their own, each in the dtype and layout of its namesake in ``like``."""
        fresh = {name: torch.empty_like(like[name]) for name in self}
        torch._foreach_copy_(list(fresh.values()), list(self.values()))
        return fresh

    def check_fits(self, own: "Flat", name: str) -> None:
        """Refuse a vector that is not over the same weights as ``own``, in its dtype and on its device.

        Raises:
            ValueError: saying what was expected of ``name``.
        """
        if self.layout != own.layout:
            raise ValueError(f"{name} must be over the trained weights, in their order: Flat.of(sap.decoder.trained)")
        for what in ("dtype", "device"):
            given, wanted = getattr(self.vector, what), getattr(own.vector, what)
            if given != wanted:
                raise ValueError(f"{name} must have the {what} {wanted}, but has {given}")

    def _matching(self, other: "Flat") -> Tensor:
        if other.layout is not self.layout and other.layout != self.layout:
            raise ValueError("the operands hold other names or shapes, or the same in another order")
        return other.vector
