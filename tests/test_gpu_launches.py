"""How many kernels a step launches on a GPU, counted without one: what the launchers launch, and PyTorch's own ops."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from oracle import random_pairs, tiny_model
from test_launches import IDLE
from test_prefixes import alike
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton_kernels import INTERPRETED

import sap_fast
from sap_fast import SAPConfig
from sap_fast.ops._library import launcher, launchers_on_cpu

pytestmark = pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter launches by another way")

# Of a layer, in both passes together. 28 are products with frozen weights, of which there would be 16 if q, k, v and
# gate, up were not weights of their own in the model; joining them would take a second copy of two thirds of it.
UNSHARED, SHARED = 65, 69
# Packing, the direction, the probe, the head.
BESIDE = 340


class Launches(TorchDispatchMode):
    """Counts kernels by name. Triton's are not run, so that all results are whatever memory held."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        library, _, name = func._schema.name.partition("::")
        if library == "sap_fast":
            with self:
                return launcher(name)(*args, **(kwargs or {}))
        if not func.is_view and str(func) not in IDLE | {"aten.empty_strided.default"}:
            self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[Launches]:
    from triton.runtime.jit import JITFunction

    launches = Launches()

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.seen[kernel.__name__] += 1

    with launchers_on_cpu(), mock.patch.object(JITFunction, "run", run), launches:
        yield launches


def of_a_step(model: nn.Module, config: SAPConfig) -> int:
    # Deferred, so that a step on numbers that mean nothing is not refused.
    with sap_fast.attach(model, config.replace(check="deferred")) as sap:
        with counted() as launches:
            sap.step(alike(), random_pairs())
        sap._deferred = None
    return launches.seen.total()


@pytest.mark.parametrize("shares", [False, True], ids=["each token a row", "shared rows"])
def test_launches_of_a_step_are_a_constant_a_layer(shares: bool) -> None:
    config = SAPConfig(share_prefixes=shares, probe_layers=lambda depth: range(10, 20))
    few, many = (
        of_a_step(tiny_model(layers=layers, dtype=torch.bfloat16, adapter_dtype=torch.float32), config)
        for layers in (24, 32)
    )
    # In both passes together; none of the eight layers more has a probe.
    a_layer, rest = divmod(many - few, 8)
    assert rest == 0
    assert a_layer <= (SHARED if shares else UNSHARED)
    assert many <= 32 * a_layer + BESIDE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_trace_of_a_step_shows_no_more_launches() -> None:
    """The profiler sees no more on a GPU; a product may be two kernels there, where cuBLAS splits its sum."""
    from benchmarks.step.counts import launches

    model = tiny_model(layers=32, dtype=torch.bfloat16, adapter_dtype=torch.float32).cuda()
    batch, pairs = ({key: x.cuda() for key, x in given.items()} for given in (alike(), random_pairs()))
    with sap_fast.attach(model, SAPConfig(attention="own")) as sap:
        sap.step(batch, pairs)  # compiles
        found = launches(lambda: sap.step(batch, pairs), "cuda")
    assert found <= 32 * (SHARED + 28) + BESIDE
