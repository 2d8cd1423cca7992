"""What a step sends to the device, and where it waits for it."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from oracle import ALL_LINEAR, lora, random_batch, random_pairs, tiny_model
from pretended import Pretended, on_pretended
from recorders import Eager
from steps import CONFIG, CONFIGS, grads
from test_prefixes import alike
from torch import Tensor

import sap_fast
from sap_fast import SAP, BatchError, SAPConfig
from sap_fast.batch.transfer import fetched, sent
from sap_fast.graph import Graphs
from sap_fast.tensors import tensors_of

OPTIONS = {
    **{name: CONFIGS[name] for name in ("lagged", "fresh-store", "fresh-recompute", "difference", "probe+project")},
    "delayed": CONFIG.replace(delayed_direction=True),
    "tangents": CONFIG.replace(tangent_fraction=0.5),
    "half-the-pairs": CONFIG.replace(pairs_per_step=1),
    "probe-every": CONFIG.replace(probe_every=2),
    "apart": CONFIG.replace(share_prefixes=False),
}
every_option = pytest.mark.parametrize("config", OPTIONS.values(), ids=OPTIONS.keys())


def put(device: Pretended, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: device.put(x.clone()) for key, x in batch.items()}


@contextmanager
def writing(sap: SAP, device: Pretended) -> Iterator[None]:
    """Note when results are written."""
    write = sap._write

    def noted(outcome: Any) -> None:
        device.events.append("write")
        write(outcome)

    with mock.patch.object(sap, "_write", noted):
        yield


def events(device: Pretended) -> list[str]:
    """Return the events since the last call."""
    seen = device.events.copy()
    device.events.clear()
    return seen


@every_option
def test_the_numbers_before_the_write_are_the_only_wait(config: SAPConfig) -> None:
    model = tiny_model(targets=ALL_LINEAR)
    with on_pretended(model, config) as (sap, device), writing(sap, device):
        for _ in range(3):
            sap.step([alike(), random_batch()], random_pairs())
            assert events(device) == ["send", "_solved", "wait: tolist", "write"]


@every_option
@pytest.mark.parametrize("kind", [None, Eager, Graphs])
def test_deferred_the_last_numbers_are_looked_at_when_the_batch_is_on_its_way(
    config: SAPConfig, kind: type[Graphs] | None
) -> None:
    model = tiny_model(targets=ALL_LINEAR)
    with on_pretended(model, config.replace(check="deferred"), kind) as (sap, device), writing(sap, device):
        for step in range(5):
            sap.step(alike(), random_pairs())
            seen = events(device)
            # A recording calls the passes again.
            seen = [event for i, event in enumerate(seen) if event != "_solved" or seen[i - 1] != "_solved"]
            assert seen == ["send", *(["wait: tolist"] if step else []), "_solved", "write"]


def test_plain_fine_tuning_and_dropout_wait_no_more() -> None:
    model = tiny_model(targets=ALL_LINEAR, lora_dropout=0.2).train()
    with on_pretended(model, CONFIG.replace(check="deferred", tangent_fraction=0.5)) as (sap, device):
        for pairs in (None, random_pairs(), None, random_pairs()):
            sap.step(random_batch(4), pairs)
        assert events(device) == ["send", "_solved", *3 * ["send", "wait: tolist", "_solved"]]


@pytest.mark.parametrize("where", ["task", "pairs", "both"])
def test_what_lies_on_the_device_is_read_at_once(where: str) -> None:
    model = tiny_model(targets=ALL_LINEAR)
    with on_pretended(model, CONFIG.replace(check="deferred", pairs_per_step=1)) as (sap, device):
        for step in range(3):
            batches: list[dict] = [alike(), random_batch()]
            pairs = random_pairs()
            if where != "pairs":
                batches = [put(device, batch) for batch in batches]
            if where != "task":
                pairs = put(device, pairs)
            sap.step(batches, pairs)
            assert events(device) == ["wait: cpu", "send", *(["wait: tolist"] if step else []), "_solved"]


@pytest.mark.parametrize("there", [False, True], ids=["host", "device"])
@every_option
def test_wherever_a_batch_lies_its_step_is_the_same_in_every_bit(config: SAPConfig, there: bool) -> None:
    model = tiny_model(targets=ALL_LINEAR)
    own, given = copy.deepcopy(model), [([alike(), random_batch(4)], random_pairs()) for _ in range(2)]
    torch.manual_seed(1)
    with sap_fast.attach(own, config) as sap:
        expected = [sap.step(*each).to_dict() for each in given]
        probe = dict(sap.probe)
    torch.manual_seed(1)
    with on_pretended(model, config) as (sap, device):
        found = []
        for batches, pairs in given:
            tasks = [put(device, batch) for batch in batches] if there else batches
            found.append(sap.step(tasks, put(device, pairs) if there else pairs))
    assert [report.to_dict() for report in found] == expected
    assert all(torch.equal(g, grads(own)[name]) for name, g in grads(model).items())
    assert all(torch.equal(v, probe[j]) for j, v in sap.probe.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.to("meta"), "on meta, but the model on cuda:0; leave the batch on the CPU"),
        (lambda x: x.float(), "must hold integers, but is torch.float32"),
        (lambda x: x[:, :-1], "they must agree"),
        (lambda x: x.clamp_min(0), "labels where attention_mask is 0"),
    ],
    ids=["elsewhere", "floats", "shape", "values"],
)
def test_a_refused_batch_sends_nothing(change: Any, message: str) -> None:
    model = tiny_model()
    with on_pretended(model, CONFIG) as (sap, device):
        batch = put(device, random_batch())
        batch["labels"] = change(batch["labels"])
        with pytest.raises(BatchError, match=message):
            sap.step(batch, random_pairs())
        assert events(device) == ["wait: cpu"]
        assert all(p.grad is None for p in lora(model).values())


def test_a_deferred_refusal_comes_when_the_next_batch_is_packed() -> None:
    model = tiny_model()
    weight = next(iter(lora(model).values()))
    kept = weight.detach().clone()
    with on_pretended(model, CONFIG.replace(check="deferred")) as (sap, device):
        with torch.no_grad():
            weight.fill_(float("nan"))
        sap.step(random_batch(), random_pairs())
        with pytest.raises(BatchError):
            sap.step({"input_ids": torch.ones(2, 3)}, random_pairs())
        events(device)
        with pytest.raises(sap_fast.StepRefusedError, match="zero it before going on"):
            sap.step(random_batch(), random_pairs())
        assert events(device) == ["send", "wait: tolist"]
        with torch.no_grad():
            weight.copy_(device.put(kept))
        sap.step(random_batch(), random_pairs())


def some_arrays() -> dict[str, Any]:
    return {
        "long": torch.arange(5),
        "int": (torch.arange(300, dtype=torch.int32), [torch.tensor([True, False, True])]),
        "number": torch.tensor(7),
        "nothing": torch.empty(0, dtype=torch.int64),
        "columns": torch.arange(6).view(2, 3).t(),
        "name": "x",
    }


def test_all_is_sent_in_one_aligned_buffer() -> None:
    with Pretended() as device:
        x, seed = some_arrays(), device.put(torch.tensor(3))
        x |= {"again": x["long"], "seed": seed}
        there = sent(x, device.device)
        assert device.events == ["send"]
        placed = tensors_of(there)[0]
        assert there["seed"] is seed and there["name"] == "x"
        assert all(device.holds(t) for t in placed if t.numel())
    kept = tensors_of(x)[0]
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(placed, kept, strict=True))
    own = [t for t in placed if t is not seed]
    assert len({t.untyped_storage().data_ptr() for t in own}) == 1
    assert all(t.storage_offset() * t.itemsize % 512 == 0 for t in own)
    assert there["again"].data_ptr() == there["long"].data_ptr() != there["number"].data_ptr()


def test_the_host_neither_sends_nor_copies() -> None:
    x, host = some_arrays(), torch.device("cpu")
    assert sent(x, host) is x
    batch = random_batch()
    assert fetched([batch, None], host)[0] is batch


def test_fetched_keeps_what_is_no_integer_on_the_device() -> None:
    with Pretended() as device:
        ids, mask, half = (torch.tensor([[1, 2]], dtype=d) for d in (torch.int32, torch.bool, torch.float16))
        there = {"a": device.put(ids), "b": device.put(mask), "c": device.put(half), "d": torch.tensor([3])}
        found, nothing = fetched([there, 7], device.device)
        assert device.events == ["wait: cpu"]
        assert found["c"] is there["c"] and found["d"] is there["d"] and nothing == 7
        assert not device.holds(found["a"]) and found["a"].tolist() == [[1, 2]] and found["b"].tolist() == [[1, 1]]


# The device itself: a wait that it did not see would make the tests above worth nothing.


@pytest.mark.parametrize(
    ("wait", "event"),
    [
        (lambda x: x.sum().item(), "wait: item"),
        (lambda x: (x + 1).tolist(), "wait: tolist"),
        (lambda x: bool(x.any()), "wait: __bool__"),
        (lambda x: int(x[0]), "wait: __int__"),
        (lambda x: x[x > 1], "wait: __getitem__"),
        (lambda x: x.nonzero(), "wait: nonzero"),
        (lambda x: torch.bincount(x), "wait: bincount"),
        (lambda x: x.to(torch.device("cpu")), "wait: to"),
        (lambda x: torch.tensor([1], device=x.device), "wait: a copy from pageable memory"),
        (lambda x: torch.arange(3).to(x.device), "wait: a copy from pageable memory"),
        (lambda x: torch.arange(3).to(x.device, non_blocking=True), "wait: a copy from pageable memory"),
    ],
)
def test_waits_are_seen(wait: Any, event: str) -> None:
    with Pretended() as device:
        wait(device.put(torch.arange(3)))
    assert device.events == [event]


def test_host_and_device_do_not_mix_and_no_array_is_made_of_the_device() -> None:
    with Pretended() as device:
        x = device.put(torch.arange(3))
        with pytest.raises(RuntimeError, match="on the host"):
            x + torch.arange(3)
        with pytest.raises(TypeError, match="numpy"):
            (x + 1).numpy()
        assert (x + torch.tensor(1)).device == device.device and torch.arange(3).device.type == "cpu"
    assert device.events == []
