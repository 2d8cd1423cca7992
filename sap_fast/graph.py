"""Captured steps, ``SAPConfig(graph=True)``: what a step computes is recorded once for a size of batches and replayed.

Every op of a step's passes is a launch, which costs the host time. A CUDA graph launches all of them at once. It
runs on the memory that it was recorded with, so a step's inputs (packed rows of static shapes, the seeds of dropout,
the probe and its moments, the last direction) are copied into buffers first, and its results are copied out; the
model's weights are read where they lie. The first step of a size runs eagerly, on the same padded rows; the second is
recorded. A replay does what was recorded, so that its results are those of the eager step in every bit.

What is left to the host is the packing: it checks the batch, finds common prefixes and rounds sizes up while the device
is busy with the last step. A step then waits for the last step's numbers, and for nothing afterwards.

What a replay cannot follow is seen here before it would go wrong: weights that have moved in memory, training and
evaluation mode, dropout. Settings of torch that choose algorithms have to stay as they are.
"""

import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sap_fast.model.decoder import Decoder
from sap_fast.ops._library import architecture
from sap_fast.tensors import T, rebuilt, tensors_of

# Each keeps its launches and its results in memory. Batches of more sizes than this seldom meet one again.
_MOST = 64
# How far beneath its caller ``attach``, and ``SAP.step``, the warnings here are raised.
_ATTACH, _STEP = 5, 6


class Recorder(Protocol):
    """Records a function of no arguments, which reads and writes the same memory whenever it is called."""

    def record(self, function: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """Record a function; return what it returned then, and a replay, which fills its tensors anew."""
        ...


class CudaGraphs:
    """Records CUDA graphs in one memory: they are replayed in turn, and what one leaves there is its results alone.

    Args:
        device: where the functions compute.
    """

    def __init__(self, device: torch.device) -> None:
        # One stream, since libraries keep a workspace for each that they have seen.
        self._device, self._pool, self._stream = device, torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def record(self, function: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        current, aside = torch.cuda.current_stream(self._device), self._stream
        # Where recording fails, torch leaves the stream current that it recorded on; here it is put back.
        with torch.cuda.device(self._device), torch.cuda.stream(current):
            aside.wait_stream(current)
            # Once before: compiling, or a library that sets itself up, would end the recording.
            with torch.cuda.stream(aside):
                function()
            current.wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            # Others' threads, such as one that pins a data loader's memory, go on meanwhile.
            with torch.cuda.graph(graph, self._pool, aside, capture_error_mode="thread_local"):
                result = function()
        return result, graph.replay


def what_blocks(decoder: Decoder) -> str | None:
    """Tell why steps of a decoder cannot be captured; None if nothing speaks against it."""
    device = decoder.device
    if device.type != "cuda":
        return f"the model is on {device}, and CUDA graphs need a CUDA device"
    dtype = decoder.embedding.weight.dtype
    if dtype == torch.float64 or architecture(device) is None:
        name = "float64" if dtype == torch.float64 else torch.cuda.get_device_name(device)
        return f"there are no kernels for {name}, and the reference rules wait for the device"
    return None


@dataclass(frozen=True)
class _Captured:
    """Holds a recorded step: the buffers it reads, its results as it filled them, and how to fill them again."""

    inputs: list[Tensor]
    results: Any
    replay: Callable[[], None]

    def run(self, inputs: Sequence[Tensor]) -> Any:
        _copy(self.inputs, inputs)
        self.replay()
        # One for each tensor, however often the results hold it.
        own = {id(x): x for x in tensors_of(self.results)[0]}
        fresh = {key: torch.empty_like(x) for key, x in own.items()}
        _copy(list(fresh.values()), list(own.values()))
        return rebuilt(self.results, lambda x: fresh[id(x)])


class Graphs:
    """Holds the captured steps of one model.

    Args:
        decoder: of the model.
        recorder: what records them.
    """

    def __init__(self, decoder: Decoder, recorder: Recorder) -> None:
        self._recorder: Recorder | None = recorder
        self._layers = [layer.module for layer in decoder.layers]
        modules = [decoder.embedding, decoder.norm.module, decoder.head, decoder.rotary_embedding, *self._layers]
        self._memory = [x for module in modules for x in (*module.parameters(), *module.buffers())]
        self._adapted = [p for layer in decoder.layers for p in layer.projections if p.adapter]
        self._places = self._addresses()
        self._seen: set[Hashable] = set()
        self._captured: dict[Hashable, _Captured] = {}
        self._told = False

    @classmethod
    def of(cls, decoder: Decoder) -> "Graphs | None":
        """Make CUDA graphs for a decoder; None, with a warning, where something blocks them."""
        if reason := what_blocks(decoder):
            _warn(reason, _ATTACH)
            return None
        return cls(decoder, CudaGraphs(decoder.device))

    @property
    def active(self) -> bool:
        """True while steps are captured; False once one could not be."""
        return self._recorder is not None

    def run(self, compute: Callable[[T], Any], given: T) -> Any:
        """Run ``compute(given)`` eagerly or, where the like of it was seen before, by a replay.

        Args:
            compute: a function of the tensors in ``given`` and of the model. It may be called with others in their
                places, more than once, and must write nothing that outlives it.
            given: nested dataclasses of tensors of static shapes; what else they hold is part of what is captured.

        Returns:
            What ``compute`` returned, in memory of its own.
        """
        if self._recorder is None:
            return compute(given)
        if (places := self._addresses()) != self._places:
            self._captured.clear()
            self._places = places
        inputs, kind = tensors_of(given)
        key = (kind, self._modes())
        captured = self._captured.get(key)
        if captured is None and key in self._seen:
            captured = self._capture(compute, given, key)
        self._seen.add(key)
        return compute(given) if captured is None else captured.run(inputs)

    def _capture(self, compute: Callable[[T], Any], given: T, key: Hashable) -> _Captured | None:
        """Record a step; None, with a warning, where that fails. No other is recorded then.

        The step is not touched by it; of its own allocator torch does not promise that after a failure.
        """
        if len(self._captured) == _MOST:
            if not self._told:
                self._told = True
                warnings.warn(
                    f"graph=True: batches come in more than {_MOST} sizes; those of further ones run eagerly. Batches "
                    "of more equal numbers of tokens have fewer",
                    stacklevel=_STEP,
                )
            return None
        static = rebuilt(given, torch.clone)
        try:
            assert self._recorder is not None
            results, replay = self._recorder.record(lambda: compute(static))
        except Exception as error:  # whatever it is, the eager step shows it if it is more than the recording's
            self._recorder = None
            self._captured.clear()
            said = " ".join(str(error).split())[:300]
            _warn(f"recording a step failed ({type(error).__name__}: {said})", _STEP)
            return None
        captured = self._captured[key] = _Captured(tensors_of(static)[0], results, replay)
        return captured

    def _addresses(self) -> list[int]:
        return [x.data_ptr() for x in self._memory]

    def _modes(self) -> Hashable:
        """Collect what a recording has taken from the modules, apart from their weights."""
        drops = [p.lora.lora_dropout[p.adapter] for p in self._adapted]
        return (
            tuple((drop.training, getattr(drop, "p", 0.0)) for drop in drops),
            tuple(p.lora.scaling[p.adapter] for p in self._adapted),
            tuple((m.training, getattr(m, "gradient_checkpointing", False)) for m in self._layers),
            torch.are_deterministic_algorithms_enabled(),
        )


def _warn(reason: str, depth: int) -> None:
    warnings.warn(
        f"graph=True: {reason}. Steps run eagerly, with the same results; set graph=False to silence this",
        stacklevel=depth,
    )


def _copy(there: Sequence[Tensor], these: Sequence[Tensor]) -> None:
    """Copy tensors into others of their shapes and dtypes, all of a dtype at once."""
    by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for into, x in zip(there, these, strict=True):
        pair = by_dtype.setdefault(x.dtype, ([], []))
        pair[0].append(into)
        pair[1].append(x)
    with torch.no_grad():
        for into_all, xs in by_dtype.values():
            torch._foreach_copy_(into_all, xs)
