"""A step's own arithmetic is a handful of ops, however many layers, adapters and probes there are."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from oracle import ALL_LINEAR, random_batch, random_pairs, tiny_model
from steps import CONFIG, CONFIGS
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import sap_fast
from sap_fast import SAPConfig
from sap_fast.batch.packer import Packer
from sap_fast.model.decoder import Decoder

# What allocates or asks, and computes nothing.
IDLE = {"aten.empty.memory_format", "aten.empty_like.default", "aten.new_empty.default", "aten.promote_types.default"}


# What needs a number from the device, or an output whose size depends on numbers there.
WAITING = {"aten._local_scalar_dense", "aten.nonzero", "aten.bincount", "aten.masked_select", "aten.equal"}


class Ops(TorchDispatchMode):
    """Counts the ops that compute, apart from views and from what runs under :meth:`apart`."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.depth = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.depth == 0 and not func.is_view and str(func) not in IDLE:
            self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))

    def apart(self, function: Callable) -> Callable:
        def uncounted(*args: Any, **kwargs: Any) -> Any:
            self.depth += 1
            try:
                return function(*args, **kwargs)
            finally:
                self.depth -= 1

        return uncounted


@contextmanager
def counted() -> Iterator[Ops]:
    """Count all of a step but the passes themselves, the decoder's ops and their backward, and the packing."""
    of_decoder = [(Decoder, name) for name in ("start", "embed", "run_layers", "run_together", "score")]
    packing = [(Packer, name) for name in ("read", "read_pairs", "task", "pairs")]
    with ExitStack() as stack:
        ops = stack.enter_context(Ops())
        for owner, name in [*of_decoder, *packing, (torch.autograd, "grad")]:
            stack.enter_context(mock.patch.object(owner, name, ops.apart(getattr(owner, name))))
        yield ops


def arithmetic(model: nn.Module, config: SAPConfig) -> Counter[str]:
    """Collect the ops of two steps, one with accumulated micro-batches; a probe acts, ``.grad`` is added to."""
    batch, pairs = random_batch(), random_pairs()
    with sap_fast.attach(model, config) as sap:
        sap.step(batch, pairs)
        with counted() as ops:
            sap.step([batch, batch], pairs)
            sap.step(batch, pairs)
    return ops.seen


BRANCHES = {name: (CONFIGS[name], None) for name in CONFIGS if name not in ("last-layer", "every-layer")}
BRANCHES["deferred"] = CONFIG.replace(check="deferred"), None
BRANCHES["bfloat16 adapters"] = CONFIGS["fresh-store"], torch.bfloat16


@pytest.mark.parametrize(("config", "adapters"), BRANCHES.values(), ids=BRANCHES.keys())
def test_the_number_of_ops_does_not_depend_on_the_number_of_tensors(config: SAPConfig, adapters: Any) -> None:
    dtypes = {"dtype": torch.float32 if adapters else torch.float64, "adapter_dtype": adapters}
    few, many = tiny_model(layers=2, **dtypes), tiny_model(layers=6, targets=ALL_LINEAR, **dtypes)
    seen = [
        arithmetic(few, config.replace(probe_layers=(0,))),
        arithmetic(many, config.replace(probe_layers=(1, 2, 4))),
    ]
    assert seen[0] == seen[1]
    assert not {name.rpartition(".")[0] for name in seen[0]} & WAITING
