"""The library's own decoder loop over a model's weights: an ordinary pass (S = 1) or a dual (S = 2).

The model's modules hold the weights and nothing else here; what runs is the ops of ``sap_fast.ops``, layer after layer
(``layer.py``), between an embedding and a head. Beneath the lowest probe the primal half needs no gradient, so the ops
there run their half backward.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sap_fast.batch.packer import Packer
from sap_fast.batch.rows import Rows
from sap_fast.dual import halves
from sap_fast.model.layer import Layer, Norm, Stream, Traversal, Weights
from sap_fast.ops import (
    linear_cross_entropy,
    take_rows,
)
from sap_fast.ops._library import compute_dtype
from sap_fast.ops.lora_linear.float8 import Float8Weight


@dataclass(frozen=True)
class Decoder:
    """A model's decoder, as ``read.py`` has read it."""

    layers: tuple[Layer, ...]
    embedding: nn.Embedding
    embed_scale: str | None  # the attribute of the embedding by which its output is multiplied
    norm: Norm
    head: nn.Linear
    rotary_embedding: Any
    adapters: Weights  # every LoRA tensor of the active adapter, by name
    trained: Mapping[str, nn.Parameter]  # those that require grad: theta
    float8: Mapping[nn.Module, Float8Weight] | None = field(default=None, kw_only=True)  # frozen weights, for duals

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def vocab_size(self) -> int:
        return self.head.weight.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.embedding.weight.shape[1]

    def drops_out(self) -> bool:
        """Tell whether any adapter's dropout is live."""
        adapted = [p for layer in self.layers for p in layer.projections if p.adapter]
        drops = [p.lora.lora_dropout[p.adapter] for p in adapted]
        return any(isinstance(drop, nn.Dropout) and drop.training and drop.p > 0 for drop in drops)

    def packer(self, *, share_prefixes: bool) -> Packer:
        """Make what checks and packs batches for this model.

        Args:
            share_prefixes: whether what sequences begin with in common is computed once. Under dropout a task batch
                shares nothing, since each of its tokens has a mask of its own; the direction is computed without.
        """
        embeddings, shares_tasks = self.embedding.num_embeddings, share_prefixes and not self.drops_out()
        return Packer(self.vocab_size, embeddings, self.device, shares_tasks, share_prefixes)

    def enter(self, part: Literal["direction", "task", "update", "write"]) -> None:
        """Note that a part of a step begins. Nothing happens here; a profiler's decoder takes the time."""

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Let each layer module's ``__call__`` run the library's forward, for the duration of a step.

        Going through ``__call__`` runs what wraps a layer's call, such as the hooks that gather sharded weights.
        The forward is taken off whatever happens; it must stay while backward runs, since a checkpointed layer is
        called again there.
        """
        put: list[nn.Module] = []
        try:
            for layer in self.layers:
                put.append(layer.module)
                layer.module.forward = layer.forward
            yield
        finally:
            for module in put:
                module.__dict__.pop("forward", None)

    def start(
        self,
        rows: Rows,
        seed: Tensor | None,
        *,
        theta: Weights | None = None,
        theta_dot: Weights | None = None,
        probe: Mapping[int, Tensor] | None = None,
    ) -> Traversal:
        """Prepare a traversal.

        Args:
            rows: a packed batch.
            seed: int64 scalar that draws the dropout masks; None is a pass without dropout.
            theta: values to use instead of the model's, by name; absent ones are the model's own.
            theta_dot: the direction by name, which makes the traversal a dual; weights it lacks do not move.
            probe: ``[S, d]`` stacks by layer.
        """
        theta = {**self.adapters, **(theta or {})}
        if theta_dot is not None:
            theta = {name: value.detach() for name, value in theta.items()}
            frozen = {n: torch.zeros_like(v, dtype=torch.float32) for n, v in theta.items() if n not in theta_dot}
            theta_dot = {**theta_dot, **frozen}
        with torch.no_grad():
            like = torch.empty(0, dtype=compute_dtype(self.embedding.weight), device=self.device)
            tables = {}
            for kind in {layer.rotary_type for layer in self.layers}:
                which = {} if kind is None else {"layer_type": kind}
                cos, sin = self.rotary_embedding(like, rows.position_ids[None], **which)
                tables[kind] = cos[0], sin[0]
        return Traversal(rows, theta, theta_dot, probe or {}, seed, tables, None if theta_dot is None else self.float8)

    def embed(self, traversal: Traversal) -> Stream:
        """Make the stream that enters the first layer. Embeddings are frozen, so their tangent is zero."""
        with torch.no_grad():
            x = F.embedding(traversal.rows.input_ids, self.embedding.weight)
            if self.embed_scale is not None:
                x *= getattr(self.embedding, self.embed_scale).to(x.dtype)
            if not traversal.is_dual:
                return Stream(x, None)
            dual = x.new_zeros((2, *x.shape))
            dual[0] = x
            return Stream(*halves(dual))

    def run_layers(self, traversal: Traversal, stream: Stream, start: int, stop: int) -> Stream:
        """Run layers ``start`` to ``stop - 1``; the stream is that which left layer ``start - 1``."""
        return self.run_together([traversal], [stream], start, stop)[0]

    def run_together(
        self, traversals: Sequence[Traversal], streams: Sequence[Stream], start: int, stop: int
    ) -> list[Stream]:
        """Run layers for several traversals, with one frozen product for all rows; only the first may be a dual."""
        for i in range(start, stop):
            module, probes = self.layers[i].module, [traversal.probe.get(i - 1) for traversal in traversals]
            # nn.Module's own __call__: some versions of transformers checkpoint in the layer class's.
            call = partial(nn.Module.__call__, module)
            if module.training and getattr(module, "gradient_checkpointing", False):
                # Dropout masks are functions of the seed: recomputation needs no generator state.
                call = partial(checkpoint, call, use_reentrant=False, preserve_rng_state=False)
            streams, rstds = zip(*call(streams, probes, traversals), strict=True)
            for traversal, probe, rstd in zip(traversals, probes, rstds, strict=True):
                if probe is not None:
                    traversal.rms[i - 1] = _rms(rstd, self.layers[i].norm_before_attention.eps)
        return list(streams)

    def score(self, traversal: Traversal, stream: Stream) -> tuple[Tensor, Tensor | None]:
        """Run last norm and head on rows that predict a scored token: ``(nll, nll_dot) [scored]``; 0 of dead ones."""
        last, norm, labelled, padding = len(self.layers) - 1, self.norm, traversal.rows.labelled, traversal.rows.padding
        probed = last in traversal.probe
        # Only scored rows matter from here on; but a probe on the last layer takes its scale from all of them.
        if not probed:
            residual, residual_dot, update, update_dot = stream
            assert update is not None  # a layer has run
            summands = take_rows([(residual, residual_dot), (update, update_dot)], labelled)
            stream = Stream(*summands[0], *summands[1])
        _, _, y, y_dot, rstd = norm.of_sum(stream, traversal.probe.get(last))
        if probed:
            traversal.rms[last] = _rms(rstd, norm.eps)
            ((y, y_dot),) = take_rows([(y, y_dot)], labelled)
        nll, nll_dot = linear_cross_entropy(y, y_dot, self.head.weight.detach(), traversal.rows.labels)
        if padding is None:
            return nll, nll_dot
        # Not a product with 0, which would let through what is not finite.
        return nll.masked_fill(padding.labels, 0), None if nll_dot is None else nll_dot.masked_fill(padding.labels, 0)

    def forward(self, traversal: Traversal) -> tuple[Tensor, Tensor | None]:
        """Run the whole traversal: ``(nll, nll_dot) [scored]``."""
        return self.score(traversal, self.run_layers(traversal, self.embed(traversal), 0, len(self.layers)))


def _rms(rstd: Tensor, eps: float) -> Tensor:
    return (rstd.pow(-2) - eps).clamp_min(0).sqrt()
