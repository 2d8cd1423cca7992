"""A device that is not there: what the host sends to it, and where it waits for it, is seen without a GPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from recorders import attached
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

import sap_fast
from sap_fast import SAP, SAPConfig
from sap_fast.graph import Graphs
from sap_fast.model.attachment import Snapshot
from sap_fast.tensors import tensors_of

# What needs numbers from the device, or an output whose size depends on them.
_READS = {"item", "tolist", "cpu", "__bool__", "__int__", "__float__", "__index__"} | {
    "nonzero",
    "masked_select",
    "bincount",
    "unique",
    "equal",
    "allclose",
}


class Pretended(TorchFunctionMode):
    """Tensors on a CUDA device that lie in the host's memory. Everything in Python that touches them comes by here.

    Attributes:
        events: what a device would notice, in order: ``"send"`` is a copy that nobody waits for, ``"wait: ..."`` one
            for the device, by what is waited in.
    """

    device = torch.device("cuda", 0)

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []
        self._there: dict[int, Tensor] = {}  # by the address of their memory, which is kept meanwhile
        self._pinned: dict[int, Tensor] = {}
        self._aside = False

    def put(self, x: Tensor) -> Tensor:
        """Put ``x``, and whatever is computed from it, on the device; unless it has no memory at all."""
        if address := _address(x):
            self._there[address] = x
        return x

    def holds(self, x: Any) -> bool:
        return isinstance(x, Tensor) and _address(x) in self._there

    def aside(self, function: Callable) -> Callable:
        """Wrap ``function`` so that it is noted as one event; its results are on the device."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self.events.append(function.__name__)
            self._aside = True
            try:
                result = function(*args, **kwargs)
                for x in tensors_of(result)[0]:
                    self.put(x)
                return result
            finally:
                self._aside = False

        return run

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if self._aside:
            return func(*args, **kwargs)
        name = func.__name__
        leaves = tree_leaves((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        there = [x for x in tensors if self.holds(x)]
        if func == Tensor.device.__get__:
            return self.device if there else func(*args)
        if there and (name in _READS or (name == "__getitem__" and _by_mask(args[1]))):
            self.events.append(f"wait: {name}")
        elif there and name in ("numpy", "__array__"):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if name == "cpu":
            return args[0].clone() if there else args[0]
        target = next((x for x in leaves if isinstance(x, torch.device)), None)
        if name == "to" and target is not None:
            return self._moved(args[0], target, asynchronous=kwargs.get("non_blocking", False))
        apart = [x for x in tensors if x.numel() > 0 and x.ndim > 0 and not self.holds(x)]
        if there and apart:
            raise RuntimeError(f"{name} of tensors on {self.device} and on the host")
        pinned = kwargs.pop("pin_memory", False)
        made = target == self.device
        if made and name == "tensor":
            self.events.append("wait: a copy from pageable memory")
        args, kwargs = tree_map(lambda x: torch.device("cpu") if x == self.device else x, (args, kwargs))
        result = func(*args, **kwargs)
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and (there or made):
                self.put(x)
            elif isinstance(x, Tensor) and pinned:
                self._pinned[_address(x)] = x
        return result

    def _moved(self, x: Tensor, target: torch.device, *, asynchronous: bool) -> Tensor:
        if self.holds(x) == (target == self.device):
            return x
        if target != self.device:
            self.events.append("wait: to")
            return x.clone()
        sends = asynchronous and _address(x) in self._pinned
        self.events.append("send" if sends else "wait: a copy from pageable memory")
        return self.put(x.clone())


def _address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _by_mask(index: Any) -> bool:
    return any(isinstance(x, Tensor) and x.dtype == torch.bool for x in tree_leaves(index))


@contextmanager
def on_pretended(
    model: nn.Module, config: SAPConfig, kind: type[Graphs] | None = None
) -> Iterator[tuple[SAP, Pretended]]:
    """Attach a handle to a model on such a device; yield both. The passes are one event, ``"_solved"``.

    Args:
        kind: of captured steps, recorded as in ``recorders.py``; None for ``graph=False``.
    """
    device = Pretended()
    with attached(model, config, kind) if kind else sap_fast.attach(model, config) as entered:
        sap: SAP = entered[0] if kind else entered
        for x in [*model.parameters(), *model.buffers(), *tensors_of(sap.state)[0]]:
            device.put(x)
        with mock.patch.object(sap, "_solved", device.aside(sap._solved)), device:
            # The weights have moved since the handle was made, which it would refuse: the look is at where they are.
            moved, check = Snapshot.of(model), Snapshot.check
            with mock.patch.object(Snapshot, "check", lambda _: check(moved)):
                yield sap, device
