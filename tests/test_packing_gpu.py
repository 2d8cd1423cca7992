"""A step's batch on its way to a GPU: where the host waits, and that nothing is sent from memory in use."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import ALL_LINEAR, VOCAB, random_batch, random_pairs, tiny_model
from steps import CONFIG, grads
from sync import forbidden_syncs
from test_prefixes import alike
from torch import nn
from trainers import ROWS, trainer

import sap_fast
from sap_fast import SAP, BatchError, SAPConfig
from sap_fast.batch.rows import pack
from sap_fast.batch.transfer import sent
from sap_fast.tensors import tensors_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

OPTIONS: dict[str, dict[str, Any]] = {
    "lagged": {},
    "fresh": {"schedule": "fresh"},
    "tangents": {"tangent_fraction": 0.5},
    "half-the-pairs": {"pairs_per_step": 1},
    "delayed": {"delayed_direction": True},
    "graph": {"graph": True},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


def on_gpu(**lora: Any) -> nn.Module:
    return tiny_model(targets=ALL_LINEAR, dtype=torch.bfloat16, adapter_dtype=torch.float32, **lora).cuda()


def there(batch: dict) -> dict:
    return {key: x.cuda() for key, x in batch.items()}


def warm(sap: SAP, batch: Any, pairs: Any) -> None:
    """Steps in which kernels are compiled, libraries set up and, with ``graph=True``, the step recorded."""
    for _ in range(4):
        sap.step(batch, pairs)
    torch.cuda.synchronize()


@contextmanager
def counted() -> Iterator[list[str]]:
    """Count what waited for the device in the block, a warning each."""
    before, waits = torch.cuda.get_sync_debug_mode(), []
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            torch.cuda.set_sync_debug_mode("warn")
            seen.clear()
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode(before)
            waits += [str(w.message) for w in seen if "synchronizing CUDA operation" in str(w.message)]


@every_option
@pytest.mark.parametrize("drops", [False, True], ids=["", "dropout"])
def test_beside_the_last_numbers_a_step_on_host_batches_waits_for_nothing(options: dict, drops: bool) -> None:
    model = on_gpu(lora_dropout=0.2 if drops else 0.0).train(drops)
    batch, pairs = [alike(), random_batch()], random_pairs()
    with sap_fast.attach(model, CONFIG.replace(check="deferred", **options)) as sap:
        warm(sap, batch, pairs)
        for _ in range(2):
            sap.settle()
            with forbidden_syncs():
                sap.step(batch, pairs)


@every_option
def test_a_deferred_step_waits_once_and_once_more_for_batches_on_the_device(options: dict) -> None:
    batch, pairs = [alike(), random_batch()], random_pairs()
    with sap_fast.attach(on_gpu(), CONFIG.replace(check="deferred", **options)) as sap:
        warm(sap, batch, pairs)
        with counted() as waits:
            sap.step(batch, pairs)
        assert len(waits) == 1
        on_device = [there(b) for b in batch], there(pairs)
        warm(sap, *on_device)
        with counted() as waits:
            sap.step(*on_device)
        assert len(waits) == 2


def test_a_checked_step_waits_once() -> None:
    batch, pairs = alike(), random_pairs()
    with sap_fast.attach(on_gpu(), CONFIG) as sap:
        warm(sap, batch, pairs)
        with counted() as waits:
            sap.step(batch, pairs)
    assert len(waits) == 1


def test_waits_are_counted() -> None:
    x = torch.arange(3, device="cuda")
    with counted() as waits:
        x.tolist()
        x[x > 1].cpu()
    assert len(waits) >= 3


@every_option
def test_wherever_a_batch_lies_its_step_is_the_same_in_every_bit(options: dict) -> None:
    model, given = on_gpu(), [(alike(), random_pairs()) for _ in range(4)]
    results = []
    for place in (lambda batch: batch, there):
        own = copy.deepcopy(model)
        torch.manual_seed(3)
        with sap_fast.attach(own, CONFIG.replace(check="deferred", **options)) as sap:
            told = [sap.step(place(batch), place(pairs)).to_dict() for batch, pairs in given]
            results.append((grads(own), told))
    assert results[0][1] == results[1][1]
    assert all(torch.equal(g, results[1][0][name]) for name, g in results[0][0].items())


def test_what_is_sent_while_the_device_is_busy_arrives_unharmed() -> None:
    """Far more is sent than the device takes meanwhile: a buffer that was used again too early would show."""
    device = torch.device("cuda", torch.cuda.current_device())
    given = [(torch.full((4096,), i), torch.full((7,), i, dtype=torch.int32)) for i in range(64)]
    sent(given[0], device)  # pins its first memory
    torch.cuda.synchronize()
    torch.cuda._sleep(int(1e9))  # cycles: some tenths of a second
    with forbidden_syncs():
        found = [sent(x, device) for x in given]
    for x, expected in zip(found, given, strict=True):
        assert all(torch.equal(a.cpu(), b) for a, b in zip(x, expected, strict=True))


def test_sent_is_pinned_once_and_aligned() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    x = {"a": torch.arange(5), "b": torch.tensor([True]), "c": torch.arange(3, dtype=torch.int32), "d": torch.tensor(2)}
    found = tensors_of(sent(x, device))[0]
    assert all(t.device == device and t.data_ptr() % 512 == 0 for t in found)
    assert len({t.untyped_storage().data_ptr() for t in found}) == 1


def test_rows_are_those_of_the_host() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    batch, cpu = random_batch(), torch.device("cpu")
    expected = tensors_of(pack(batch, vocab_size=VOCAB, device=cpu))[0]
    for given in (batch, there(batch)):
        found = tensors_of(pack(given, vocab_size=VOCAB, device=device))[0]
        assert all(x.device == device and torch.equal(x.cpu(), y) for x, y in zip(found, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_batch_on_another_gpu_is_refused() -> None:
    elsewhere = {key: x.to("cuda:1") for key, x in random_batch().items()}
    refused = pytest.raises(BatchError, match="on cuda:1, but the model on cuda:0; leave the batch on the CPU")
    with sap_fast.attach(on_gpu(), SAPConfig(probe_layers=(1,))) as sap, refused:
        sap.step(elsewhere)


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="a Trainer takes all GPUs it sees, and one is supported")
def test_a_trainer_gives_its_steps_host_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.device] = []
    step = SAP.step

    def noted(self: SAP, batches: Any, pairs: Any) -> Any:
        seen.extend(x.device for batch in (*batches, pairs) for x in batch.values())
        return step(self, batches, pairs)

    monkeypatch.setattr(SAP, "step", noted)
    run = trainer(tmp_path, {"use_cpu": False, "dataloader_pin_memory": True}, eval_dataset=ROWS[:2])
    run.train()
    assert {device.type for device in seen} == {"cpu"} and run.args.device.type == "cuda"
    assert run.evaluate()["eval_loss"] > 0
