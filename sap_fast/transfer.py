"""Sends what was packed on the host to a device: all tensors of a step in one asynchronous copy."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sap_fast.tensors import T, rebuilt, tensors_of

# Bytes: what torch's allocator gives its own tensors at the least, so that kernels find the same alignment.
_ALIGNMENT = 512


def sent(x: T, device: torch.device) -> T:
    """``x`` with its tensors on a device, by one copy for all of them that are on the host; nothing is waited for.

    The copy starts in pinned memory, which is fresh each time: the device may not have read the last one yet. torch
    keeps that memory from being used again before the device has.

    Args:
        x: nested dataclasses, tuples, lists and dicts of tensors.
    """
    if device.type == "cpu":
        return x

    def there(buffer: Tensor) -> Tensor:
        return buffer.to(device, non_blocking=True)

    return moved(x, there, pinned=device.type == "cuda")


def moved(x: T, there: Callable[[Tensor], Tensor], *, pinned: bool) -> T:
    """``x`` with each tensor of the host a part of what ``there`` makes of one buffer that holds them all.

    Args:
        there: is given ``[bytes]`` uint8, once; returns the like.
        pinned: whether the buffer is of pinned memory.
    """
    own = {id(tensor): tensor for tensor in tensors_of(x)[0] if tensor.device.type == "cpu"}
    if not own:
        return x
    sizes = [tensor.numel() * tensor.element_size() for tensor in own.values()]
    starts = [0]
    for size in sizes:
        starts.append(-(-(starts[-1] + size) // _ALIGNMENT) * _ALIGNMENT)
    buffer = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=pinned)
    _fill(buffer, starts, list(own.values()))
    copy = there(buffer)
    parts = {
        key: copy[start : start + size].view(tensor.dtype).view(tensor.shape)
        for (key, tensor), start, size in zip(own.items(), starts, sizes, strict=False)
    }
    return rebuilt(x, lambda tensor: parts.get(id(tensor), tensor))


def _fill(buffer: Tensor, starts: Sequence[int], tensors: Sequence[Tensor]) -> None:
    """Write tensors to their places, by NumPy: an operation of torch costs several times as much for so few numbers."""
    target = buffer.numpy()
    for start, tensor in zip(starts, tensors, strict=False):
        source = tensor.detach().contiguous().view(-1).numpy()
        target[start : start + source.nbytes].view(source.dtype)[:] = source
