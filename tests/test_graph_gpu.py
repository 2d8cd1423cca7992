"""Captured steps on a GPU: replays equal eager steps in every bit, and leave the host nothing to launch or wait for."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from oracle import ALL_LINEAR, lora, random_batch, random_pairs, tiny_model
from recorders import Eager
from steps import CONFIG, grads
from sync import forbidden_syncs
from torch import nn
from torch.autograd import DeviceType

import sap_fast
from sap_fast import SAP, SAPConfig
from sap_fast.graph import CudaGraphs, Graphs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

GRAPH = CONFIG.replace(check="deferred", graph=True)


def on_gpu(layers: int = 4, **lora_settings: Any) -> nn.Module:
    model = tiny_model(
        targets=ALL_LINEAR, layers=layers, dtype=torch.bfloat16, adapter_dtype=torch.float32, **lora_settings
    )
    return model.cuda()


def there(batch: dict) -> dict:
    return {key: x.cuda() for key, x in batch.items()}


def steps(model: nn.Module, config: SAPConfig, given: list) -> tuple[list, SAP]:
    torch.manual_seed(4)
    found = []
    with sap_fast.attach(model, config) as sap:
        for batch, pairs in given:
            model.zero_grad()
            report = sap.step(batch, pairs)
            found.append((grads(model), sap.probe, report))
            with torch.no_grad():
                for p in lora(model).values():
                    p.sub_(0.05 * p.grad)
        return [(g, probe, report.to_dict()) for g, probe, report in found], sap


@pytest.mark.parametrize("drops", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize(
    "options",
    [{}, {"schedule": "fresh"}, {"probe_update": "adamw"}, {"tangent_fraction": 0.5}, {"probe_every": 2}],
    ids=str,
)
def test_replays_equal_eager_steps_in_every_bit(options: dict[str, Any], drops: bool) -> None:
    model = on_gpu(lora_dropout=0.2 if drops else 0.0).train(drops)
    own, config = copy.deepcopy(model), GRAPH.replace(**options)
    sizes = [(3, 9), (9, 30)] * 4
    given = [(there(random_batch(*size)), there(random_pairs())) for size in sizes]
    with mock.patch.object(Graphs, "of", lambda decoder: Eager(decoder, CudaGraphs(decoder.device))):
        expected, _ = steps(own, config, given)
    with mock.patch.object(CudaGraphs, "record", autospec=True, side_effect=CudaGraphs.record) as record:
        found, _ = steps(model, config, given)
    assert record.call_count >= 2  # no warning that something blocked it either, which would be an error here
    for (gradients, probe, told), (expected_gradients, expected_probe, expected_told) in zip(
        found, expected, strict=True
    ):
        assert all(torch.equal(g, expected_gradients[name]) for name, g in gradients.items())
        assert all(torch.equal(v, expected_probe[j]) for j, v in probe.items())
        assert told == expected_told


@contextmanager
def replaying(layers: int) -> Iterator[tuple[SAP, dict, dict]]:
    """Make a handle whose next step is a replay."""
    model, batch, pairs = on_gpu(layers), there(random_batch()), there(random_pairs())
    with sap_fast.attach(model, GRAPH) as sap:
        for _ in range(4):
            model.zero_grad()
            sap.step(batch, pairs)
        yield sap, batch, pairs


def launches(layers: int) -> tuple[int, int]:
    """``(graphs, kernels)`` that the host launched in a replayed step."""
    with replaying(layers) as (sap, batch, pairs):
        with torch.profiler.profile() as profiler:
            sap.step(batch, pairs)
            torch.cuda.synchronize()
        names = [event.name for event in profiler.events() if event.device_type == DeviceType.CPU]
    return sum("GraphLaunch" in name for name in names), sum("LaunchKernel" in name for name in names)


def test_a_replay_is_one_launch_whatever_the_depth() -> None:
    (graphs, few), (graphs_deep, many) = launches(4), launches(12)
    assert graphs == graphs_deep == 1
    # Packing, copies into buffers and out of them, which do not depend on the depth; and the copies of gradients, of
    # which torch launches some dozens at once.
    assert many - few <= 16, (few, many)


def test_nothing_is_waited_for_after_packing() -> None:
    with replaying(4) as (sap, batch, pairs):
        settle, rest = sap.settle, ExitStack()

        def strict() -> None:
            settle()
            rest.enter_context(forbidden_syncs())  # from here to the end of the step

        with rest, mock.patch.object(sap, "settle", strict):
            sap.step(batch, pairs)


def test_a_failed_recording_leaves_the_stream_and_the_step_as_they_were() -> None:
    model, batch, pairs = on_gpu(), there(random_batch()), there(random_pairs())
    record = CudaGraphs.record

    def failing(self: CudaGraphs, function: Any) -> Any:
        def waits() -> Any:
            result = function()
            if torch.cuda.is_current_stream_capturing():
                result.report.loss.item()
            return result

        return record(self, waits)

    stream = torch.cuda.current_stream()
    with sap_fast.attach(model, GRAPH) as sap, mock.patch.object(CudaGraphs, "record", failing):
        sap.step(batch, pairs)
        sap.step(batch, pairs)
        with pytest.warns(UserWarning, match="recording a step failed"):
            sap.step(batch, pairs)
        assert torch.cuda.current_stream() == stream
        assert sap._graphs is not None and not sap._graphs.active
        assert torch.isfinite(sap.step(batch, pairs).loss)


def test_float64_has_no_kernels() -> None:
    model = tiny_model().cuda()
    with pytest.warns(UserWarning, match="no kernels for float64"):
        sap_fast.attach(model, GRAPH).detach()
