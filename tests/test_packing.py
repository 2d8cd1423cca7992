"""Packing waits for no device: what it does is done on the host, and sent in one copy.

Without a GPU, what lies on one is told from what does not by where it comes from: weights and the handle's state, and
all that is computed once the packed rows were sent.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from oracle import lora, random_batch, random_pairs, tiny_model
from steps import CONFIG, grads
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sap_fast
from sap_fast import SAP, BatchError, SAPConfig, outcome
from sap_fast.batch import pack, packed, read
from sap_fast.packing import Packer
from sap_fast.transfer import moved, sent

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SIZES: dict[str, Any] = {"vocab_size": 37, "device": CUDA}
# Ops whose result, or its shape, the host has to know.
WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::equal"}


class Waits(TorchDispatchMode):
    """Notes what a step would wait for on a device, in order, beside the steps of packing.

    Attributes:
        events: ``"read"``, ``"task"``, ``"pairs"``, ``"sent"``, and ``"wait: ..."``.
    """

    def __init__(self, device: list[Tensor]) -> None:
        super().__init__()
        self.events: list[str] = []
        self._is_sent = False
        self._device = {x.untyped_storage().data_ptr() for x in device if x.numel()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        by_mask = name == "aten::index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        if (name in WAITING or by_mask) and self.is_there(args):
            self.events.append(f"wait: {name}")
        return func(*args, **(kwargs or {}))

    def is_there(self, args: Any) -> bool:
        tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
        return self._is_sent or any(x.untyped_storage().data_ptr() in self._device for x in tensors)

    def reading(self, name: str) -> Any:
        """A method of tensors that copies to the host without an op."""
        original = getattr(Tensor, name)

        def noted(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.is_there(x):
                self.events.append(f"wait: {name}")
            return original(x, *args, **kwargs)

        return noted

    def sent(self, x: Any, device: torch.device) -> Any:
        """Stands for the copy to a device: nothing there shares memory with the host."""
        copies: list[Tensor] = []

        def there(buffer: Tensor) -> Tensor:
            copies.append(buffer.clone())
            return copies[0]

        found = moved(x, there, pinned=False)
        assert len(copies) == 1
        self.events.append("sent")
        self._is_sent = True
        return found


@contextmanager
def watched(model: nn.Module, sap: SAP) -> Iterator[Waits]:
    state = [*sap._state.probe.vectors, *([] if sap._deferred is None else [sap._deferred.seen])]
    waits = Waits([*model.parameters(), *state])
    with ExitStack() as stack:
        for name in ("read", "read_pairs", "task", "pairs"):
            original = getattr(Packer, name)

            def noted(*args: Any, original: Any = original, name: str = name) -> Any:
                waits.events.append(name)
                return original(*args)

            stack.enter_context(mock.patch.object(Packer, name, noted))
        for name in ("tolist", "numpy", "cpu"):
            stack.enter_context(mock.patch.object(Tensor, name, waits.reading(name)))
        stack.enter_context(mock.patch.object(outcome, "sent", waits.sent))
        stack.enter_context(waits)
        yield waits


def second_step(config: SAPConfig, pairs: Mapping[str, Tensor] | None) -> list[str]:
    """What happens in a step when another has come before."""
    model = tiny_model(dtype=torch.float32)
    with sap_fast.attach(model, config) as sap:
        sap.step(random_batch(), pairs)
        with watched(model, sap) as waits:
            sap.step(random_batch(), pairs)
        return waits.events


PACKING = ["read", "read_pairs", "task", "pairs"]


@pytest.mark.parametrize("options", [{}, {"schedule": "fresh"}, {"probe_update": "adamw"}], ids=str)
def test_a_step_waits_once(options: dict[str, Any]) -> None:
    """For its numbers, before it writes a gradient; deferred, for those of the step before, when it is packed."""
    config = CONFIG.replace(**options)
    assert second_step(config, random_pairs()) == [*PACKING, "sent", "wait: tolist"]
    assert second_step(config.replace(check="deferred"), random_pairs()) == [*PACKING, "wait: tolist", "sent"]
    assert second_step(config.replace(check="deferred"), None) == ["read", "task", "wait: tolist", "sent"]


@pytest.mark.parametrize("options", [{"tangent_fraction": 0.5}, {"pairs_per_step": 1}], ids=str)
def test_what_is_drawn_is_packed_on_the_host_too(options: dict[str, Any]) -> None:
    events = second_step(CONFIG.replace(check="deferred", **options), random_pairs())
    assert [event for event in events if event not in PACKING] == ["wait: tolist", "sent"]


class OnDevice(Tensor):
    """Says that it lies on a GPU, can be copied to the host and not read from there otherwise."""

    copies = 0

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA

    def cpu(self) -> Tensor:  # type: ignore[override]
        OnDevice.copies += 1
        return self.as_subclass(Tensor)

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("read from the host without a copy")

    tolist = item = __bool__ = __int__ = __float__ = numpy  # type: ignore[assignment]


@pytest.mark.parametrize("here", [(), ("labels",)], ids=["all-there", "labels-here"])
def test_a_batch_on_a_device_is_copied_once(here: tuple[str, ...]) -> None:
    batch = random_batch()
    there = {key: x if key in here else x.as_subclass(OnDevice) for key, x in batch.items()}
    OnDevice.copies = 0
    found, expected = read(there, **SIZES), read(batch, **SIZES)
    assert OnDevice.copies == 1
    assert all((x == y).all() for x, y in zip(vars(found).values(), vars(expected).values(), strict=True))


def test_a_batch_on_the_host_is_welcome_whatever_the_device() -> None:
    assert read(random_batch(), **SIZES).sequences == 3
    other = {key: x.as_subclass(OnDevice) for key, x in random_batch().items()}
    with pytest.raises(BatchError, match="is on cuda:0, but the model on cuda:1; leave the batch on the CPU"):
        read(other, vocab_size=37, device=torch.device("cuda", 1))


def test_integers_of_any_width_are_read() -> None:
    batch, expected = random_batch(), read(random_batch(), **SIZES)
    torch.manual_seed(0)
    batch = random_batch()
    narrow = {"input_ids": batch["input_ids"].short(), "labels": batch["labels"].int()}
    narrow["attention_mask"] = batch["attention_mask"].bool()
    torch.manual_seed(0)
    expected = read(random_batch(), **SIZES)
    found = read(narrow, **SIZES)
    assert all((x == y).all() for x, y in zip(vars(found).values(), vars(expected).values(), strict=True))
    assert found.input_ids.dtype == "int64" and found.real.dtype == bool


# Sending


def test_what_is_sent_is_equal_and_lies_apart() -> None:
    """All in one buffer, each part where a kernel finds it aligned; what is there already stays."""
    rows = packed(read(random_batch(), **SIZES))
    seed, empty = torch.tensor(7), torch.empty(0, 3)
    given = {"rows": rows, "flags": [torch.tensor([True, False])], "seed": seed, "empty": empty, "number": 5}
    buffers: list[Tensor] = []

    def there(buffer: Tensor) -> Tensor:
        buffers.append(buffer.clone())
        return buffers[-1]

    found = moved(given, there, pinned=False)
    (buffer,) = buffers
    start = buffer.untyped_storage().data_ptr()
    pairs = [(found["rows"].input_ids, rows.input_ids), (found["rows"].labelled.offsets, rows.labelled.offsets)]
    pairs += [(found["flags"][0], given["flags"][0]), (found["seed"], seed), (found["empty"], empty)]
    for x, expected in pairs:
        assert torch.equal(x, expected) and x.dtype == expected.dtype and x.shape == expected.shape
        assert x.untyped_storage().data_ptr() == start
        assert x.storage_offset() * x.element_size() % 512 == 0
    assert found["number"] == 5 and found["rows"].max_seqlen == rows.max_seqlen
    # A tensor that the structure holds twice is sent once.
    twice = moved([seed, seed], there, pinned=False)
    assert twice[0] is twice[1] and buffers[-1].numel() == 512
    assert sent(given, CPU) is given


def test_strided_tensors_are_sent_as_they_read() -> None:
    x = torch.arange(12).view(3, 4).t()
    (found,) = moved([x], Tensor.clone, pinned=False)
    assert torch.equal(found, x)


# On a GPU

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def on_gpu() -> nn.Module:
    return tiny_model(dtype=torch.bfloat16, adapter_dtype=torch.float32).cuda()


@pytest.mark.parametrize("where", [pytest.param("cuda", marks=GPU), "cpu"])
def test_rows_are_those_of_the_host(where: str) -> None:
    batch = random_batch()
    rows = pack(batch, vocab_size=37, device=torch.device(where))
    again = pack({key: x.to(where) for key, x in batch.items()}, vocab_size=37, device=torch.device(where))
    host = packed(read(batch, vocab_size=37, device=CPU))
    for found in (rows, again):
        assert found.input_ids.device.type == where
        assert torch.equal(found.input_ids.cpu(), host.input_ids)
        assert torch.equal(found.labelled.takers.cpu(), host.labelled.takers)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [{}, {"schedule": "fresh"}, {"graph": True}], ids=str)
def test_a_step_from_the_host_never_waits(options: dict[str, Any]) -> None:
    """... from packing to its gradient, once the numbers of the step before were looked at; and the bits are the same
    from batches on the device."""
    from sync import forbidden_syncs

    batch, pairs = random_batch(), random_pairs()
    found = []
    for there in (False, True):
        torch.manual_seed(1)
        model = on_gpu()
        given = [{key: x.cuda() for key, x in each.items()} if there else each for each in (batch, pairs)]
        with sap_fast.attach(model, CONFIG.replace(check="deferred", **options)) as sap:
            for _ in range(4):  # compiled, recorded, replayed
                model.zero_grad()
                sap.step(*given)
            sap._settle()
            model.zero_grad()
            if there:
                sap.step(*given)
            else:
                with forbidden_syncs():
                    sap.step(*given)
            found.append(grads(model))
    assert lora(model).keys() == found[0].keys()
    assert all(torch.equal(found[0][name], g) for name, g in found[1].items())
