"""Checks that a model's modules do just what their classes say, and still are what they were at ``attach``.

The dual forward reads weights and runs the library's ops: a hook, a replaced forward or a module exchanged later
would be silently bypassed. Each is refused by name instead.
"""

import weakref
from dataclasses import dataclass
from typing import Any

from torch import nn

from sap_fast.errors import UnsupportedModelError

# Hooks that compute nothing: transformers' and PEFT's, which make embeddings require grad, and those that
# transformers leaves behind once a caller has asked for hidden states.
_IDLE_HOOKS = {"make_inputs_require_grads", "make_inputs_require_grad", "output_capturing_hook"}


def check_module(name: str, module: nn.Module) -> None:
    """Refuse what stands between a module's class and what it does when called."""
    if "forward" in module.__dict__:
        raise UnsupportedModelError(
            f"the forward of {name} was replaced on the instance (by accelerate's prepare, a kernel patch or a device "
            "map?); the dual forward would bypass it. Attach before it is patched, or take the patch off: "
            "del module.forward"
        )
    if getattr(module, "_compiled_call_impl", None) is not None:
        raise UnsupportedModelError(f"{name} is compiled; attach to a model that is not")
    hooks: list[Any] = [
        *module._forward_hooks.values(),
        *module._forward_pre_hooks.values(),
        *module._backward_hooks.values(),
        *module._backward_pre_hooks.values(),
    ]
    for hook in hooks:
        if getattr(hook, "__name__", "") not in _IDLE_HOOKS:
            what = getattr(hook, "__qualname__", hook)
            raise UnsupportedModelError(f"{name} has a hook ({what}), which the dual forward would not run; remove it")


def check_weight(name: str, weight: nn.Parameter) -> None:
    """Refuse hooks on a trained weight: its gradient is computed by ``autograd.grad``, which does not run them."""
    if weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None):
        raise UnsupportedModelError(
            f"{name} has a hook on its gradient (register_hook, or an optimizer in backward?), which a step would not "
            "run; remove it"
        )


@dataclass(frozen=True)
class Snapshot:
    """Holds a model's modules and weights at ``attach``, by identity."""

    modules: tuple[tuple[str, nn.Module, tuple[int, ...]], ...]
    weights: tuple[tuple[str, nn.Parameter, bool, Any], ...]

    @classmethod
    def of(cls, model: nn.Module) -> "Snapshot":
        """Check every module and trained weight of ``model``, and take note of it.

        Raises:
            UnsupportedModelError: naming what would be bypassed.
        """
        modules = tuple((name or type(model).__name__, m, _members(m)) for name, m in model.named_modules())
        for name, module, _ in modules:
            check_module(name, module)
        weights = tuple((name, p, p.requires_grad, (p.dtype, p.device)) for name, p in model.named_parameters())
        for name, weight, trained, _ in weights:
            if trained:
                check_weight(name, weight)
        return cls(modules, weights)

    def check(self) -> None:
        """Refuse a model that is no longer what it was.

        Raises:
            UnsupportedModelError: naming what has changed.
        """
        for name, module, members in self.modules:
            if _members(module) != members:
                raise UnsupportedModelError(f"{name} holds other modules or weights than at attach; {_AGAIN}")
            check_module(name, module)
        for name, weight, trained, kind in self.weights:
            if weight.requires_grad != trained:
                now = "trained" if weight.requires_grad else "frozen"
                raise UnsupportedModelError(f"{name} is {now} since attach; {_AGAIN}")
            if (weight.dtype, weight.device) != kind:
                raise UnsupportedModelError(f"{name} has moved to {weight.dtype} on {weight.device}; {_AGAIN}")
            if trained:
                check_weight(name, weight)


_AGAIN = "detach and attach again"


def _members(module: nn.Module) -> tuple[int, ...]:
    return tuple(map(id, (*module._modules.values(), *module._parameters.values())))


class _Attached:
    """Set on the transformers model while it is attached, so that a PEFT model around it counts as attached too.

    A copy of the model, by deepcopy or pickle, is another model: the mark becomes None there.
    """

    NAME = "_sap_fast_attached"

    def __reduce__(self) -> tuple:
        return type(None), ()


def mark(base: nn.Module) -> None:
    """Mark a transformers model as attached.

    Raises:
        RuntimeError: it is attached already.
    """
    if isinstance(getattr(base, _Attached.NAME, None), _Attached):
        raise RuntimeError("this model is attached already: use that handle, or detach it first")
    setattr(base, _Attached.NAME, _Attached())


def unmark(reference: weakref.ref[nn.Module]) -> None:
    """Take the mark off, if the model still lives."""
    base = reference()
    if base is not None:
        base.__dict__.pop(_Attached.NAME, None)
