"""What crosses between the host and the model's device in a step: its batch, at most once in each direction.

Batches are checked and packed on the host. What lies there already costs no wait: the packed arrays go to the device
by one asynchronous copy, which the host only enqueues. What lies on the device is read first, by one copy that the
host has to wait for, and with it for all that the device was given before. A model on the CPU needs neither.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sap_fast.tensors import T, rebuilt, tensors_of

# Bytes: what torch's allocator gives its own tensors at the least, so that kernels find the same alignment.
_ALIGNMENT = 512


def fetched(batches: Sequence[Any], device: torch.device) -> list[Any]:
    """Return batches whose integers lie on the host: all that is on ``device`` is read by one copy, the only wait.

    Args:
        batches: dicts of tensors. Whatever else is among them is left as it is, for the checks to name.
        device: of the model.

    Returns:
        The batches in order; what was read is int64.
    """
    if device.type == "cpu":
        return list(batches)
    mappings = [batch for batch in batches if isinstance(batch, Mapping)]
    there = {id(x): x for batch in mappings for x in batch.values() if _is_read(x, device)}
    if not there:
        return list(batches)
    flat = torch.cat([x.reshape(-1).long() for x in there.values()]).cpu()
    parts = flat.split([x.numel() for x in there.values()])
    here = {key: part.view(x.shape) for (key, x), part in zip(there.items(), parts, strict=True)}
    return [
        {name: here.get(id(x), x) for name, x in batch.items()} if isinstance(batch, Mapping) else batch
        for batch in batches
    ]


def _is_read(x: Any, device: torch.device) -> bool:
    return isinstance(x, Tensor) and x.device == device and not (x.is_floating_point() or x.is_complex())


def sent(x: T, device: torch.device) -> T:
    """Send the host tensors in ``x`` to a device by one copy that nobody waits for; for the CPU, return ``x`` itself.

    The copy starts from pinned memory of torch's own, which it hands out again only once the copy is over, so that
    steps may follow one another without looking.

    Args:
        x: nested dataclasses, tuples, lists and dicts of tensors. Those on a device stay what they are.
        device: where to.

    Returns:
        The same with views of one allocation, each aligned as an allocation of its own would be.
    """
    if device.type == "cpu":
        return x
    arrays = {id(t): t.contiguous() for t in tensors_of(x)[0] if t.device.type == "cpu"}
    if not arrays:
        return x
    places, size = {}, 0
    for key, array in arrays.items():
        places[key] = size // array.itemsize
        size += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    buffer = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda")
    dtypes = {array.dtype for array in arrays.values()}
    here = {dtype: buffer.view(dtype).numpy() for dtype in dtypes}
    for key, array in arrays.items():
        here[array.dtype][places[key] : places[key] + array.numel()] = array.numpy().ravel()
    sending = buffer.to(device, non_blocking=True)
    there = {dtype: sending.view(dtype) for dtype in dtypes}

    def placed(t: Tensor) -> Tensor:
        if (array := arrays.get(id(t))) is None:
            return t
        return there[t.dtype].as_strided(array.shape, array.stride(), places[id(t)])

    return rebuilt(x, placed)
