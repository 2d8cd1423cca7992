"""The library's own decoder loop over a model's weights: an ordinary pass (S = 1) or a dual (S = 2).

The model's modules hold the weights and nothing else here; what runs is the ops of ``sap_fast.ops``. A layer
hands on the residual stream and its own update separately, because their sum is taken, together with the
probe, inside the next norm:

    h, y = probe_rms_norm(residual, update, probe of the layer before)
    h, y = probe_rms_norm(h, attention(y));  hand on (h, mlp(y))

Families that normalise an output before it is added (sandwich norms) have ``rms_norm`` around ``attention(y)`` and
``mlp(y)``: what is handed on stays the residual stream and the summand, so the probe and the scale of a layer's
output keep their meaning.

Beneath the lowest probe the primal half needs no gradient, so the ops there run their half backward.

Several traversals can be run together: a layer's forward is a generator for one of them, which hands out what goes into
linear maps and is handed back what comes out, and the maps take the rows of all at once.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sap_fast.batch.packer import Packer
from sap_fast.batch.rows import Rows
from sap_fast.dual import halves
from sap_fast.model.lockstep import lockstep
from sap_fast.ops import (
    Group,
    LoRATarget,
    attention,
    glu,
    linear_cross_entropy,
    lora_linear_grouped,
    probe_rms_norm,
    rms_norm,
    rotary,
    take_rows,
)
from sap_fast.ops._library import compute_dtype
from sap_fast.ops.lora_linear.float8 import Float8Weight

Weights = Mapping[str, Tensor]
Dual = tuple[Tensor, Tensor | None]
# What a traversal hands out, the maps' input and the maps, and is handed back, their outputs.
Asked = tuple[Dual, Sequence["Projection"]]


class Stream(NamedTuple):
    """Holds what one layer hands to the next: ``[rows, d]`` each; tangents None in an ordinary pass.

    ``update`` is None before the first layer, whose norm reads the embeddings alone.
    """

    residual: Tensor
    residual_dot: Tensor | None
    update: Tensor | None = None
    update_dot: Tensor | None = None


@dataclass(frozen=True)
class Traversal:
    """Describes one traversal of the decoder, and what is constant over it.

    ``theta`` holds the values of all LoRA tensors by name. ``theta_dot`` holds the direction, and makes the traversal
    a dual; gradients go to it (see :func:`sap_fast.ops.lora_linear`), else to ``theta``. ``probe`` holds
    ``[S, d]`` stacks by layer. ``seed`` draws the dropout masks; None is one without dropout. ``rotary`` holds
    ``(cos, sin)`` of every row by the layers' ``rotary_type``. ``float8`` holds frozen weights in float8 by module,
    where its products are to be formed in that.
    """

    rows: Rows
    theta: Weights
    theta_dot: Weights | None
    probe: Mapping[int, Tensor]
    seed: Tensor | None
    rotary: Mapping[str | None, tuple[Tensor, Tensor]]
    float8: Mapping[nn.Module, Float8Weight] | None = None
    rms: dict[int, Tensor] = field(default_factory=dict)  # per-row RMS of each probed layer's output [rows]

    @property
    def is_dual(self) -> bool:
        return self.theta_dot is not None


@dataclass(frozen=True)
class Norm:
    """Holds an RMSNorm module and how to read it: what is added to its weight, and the name of its epsilon."""

    module: Any
    offset: float
    eps_name: str

    @property
    def weight(self) -> Tensor:
        return self.module.weight.detach()

    @property
    def eps(self) -> float:
        return float(getattr(self.module, self.eps_name))

    def __call__(self, x: Tensor, x_dot: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Normalise a dual over its last dimension."""
        # The op has one dimension of rows; of heads that are packed, rows and heads flatten without a copy.
        flat, flat_dot = x.flatten(0, -2), None if x_dot is None else x_dot.flatten(0, -2)
        y, y_dot = rms_norm(flat, flat_dot, self.weight, eps=self.eps, offset=self.offset)
        return y.view(x.shape), None if y_dot is None else y_dot.view(x.shape)

    def of_sum(
        self, stream: "Stream", probe: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor]:
        """Add the stream and the probe, and normalise the sum: ``(h, h_dot, y, y_dot, rstd)``."""
        residual, residual_dot, update, update_dot = stream
        assert update is not None  # a layer has run
        return probe_rms_norm(
            residual, residual_dot, update, update_dot, probe, self.weight, eps=self.eps, offset=self.offset
        )


@dataclass(frozen=True)
class Projection:
    """Holds a linear module, with the names of its LoRA tensors where it has an active adapter.

    ``lora`` is PEFT's layer around it, if there is one; without an active adapter it computes what its base does.
    """

    base: nn.Linear
    lora: Any = None  # PEFT's LoRA Linear
    adapter: str = ""
    a: str = ""
    b: str = ""
    salt: int = 0

    def target(self, traversal: Traversal) -> LoRATarget:
        weight = self.base.weight.detach()
        bias = None if self.base.bias is None else self.base.bias.detach()
        float8 = None if traversal.float8 is None else traversal.float8[self.base]
        if not self.adapter:
            return LoRATarget(weight, bias, float8=float8)
        drop, dot = self.lora.lora_dropout[self.adapter], traversal.theta_dot
        dropping = traversal.seed is not None and drop.training and isinstance(drop, nn.Dropout)
        return LoRATarget(
            weight,
            bias,
            traversal.theta[self.a],
            traversal.theta[self.b],
            None if dot is None else dot[self.a],
            None if dot is None else dot[self.b],
            self.lora.scaling[self.adapter],
            drop.p if dropping else 0.0,
            self.salt,
            float8,
        )


@dataclass(frozen=True)
class Layer:
    """Holds one decoder layer: its parts, and its forward on a stream."""

    module: nn.Module
    norm_before_attention: Norm
    norm_after_attention: Norm | None
    norm_before_mlp: Norm
    norm_after_mlp: Norm | None
    qkv: tuple[Projection, Projection, Projection]
    q_norm: Norm | None
    k_norm: Norm | None
    o: Projection
    gate_up: tuple[Projection, Projection]
    down: Projection
    head_dim: int
    scale: float
    window: int | None
    rotary_type: str | None  # which of a traversal's tables turns queries and keys; None where all layers share one
    activation: str
    attention: Callable[..., tuple[Tensor, Tensor | None]] = attention  # or what attention_backends chose

    @property
    def projections(self) -> tuple[Projection, ...]:
        return (*self.qkv, self.o, *self.gate_up, self.down)

    @property
    def norms(self) -> tuple[Norm, ...]:
        stream = self.norm_before_attention, self.norm_after_attention, self.norm_before_mlp, self.norm_after_mlp
        return tuple(norm for norm in (*stream, self.q_norm, self.k_norm) if norm is not None)

    def forward(
        self, streams: Sequence[Stream], probes: Sequence[Tensor | None], traversals: Sequence[Traversal]
    ) -> list[tuple[Stream, Tensor | None]]:
        """Run the layer for one traversal, or for several together, of which only the first may be a dual.

        Args:
            streams, probes, traversals: of each; a probe is that of the layer before, added to the stream here.

        Returns:
            Of each traversal the stream, and ``rstd [rows]`` of the sum (None in the first layer, which has none).
        """
        return lockstep(
            [self._traverse(*each) for each in zip(streams, probes, traversals, strict=True)],
            lambda asked: lora_linear_grouped(
                [
                    Group(*x, [p.target(traversal) for p in maps], traversal.seed)
                    for (x, maps), traversal in zip(asked, traversals, strict=True)
                ]
            ),
        )

    def _traverse(
        self, stream: Stream, probe: Tensor | None, traversal: Traversal
    ) -> Generator[Asked, list[Dual], tuple[Stream, Tensor | None]]:
        residual, residual_dot, update, _ = stream
        rstd: Tensor | None = None
        if update is None:
            y, y_dot = self.norm_before_attention(residual, residual_dot)
        else:
            residual, residual_dot, y, y_dot, rstd = self.norm_before_attention.of_sum(stream, probe)
        m, m_dot = yield from self._attention(y, y_dot, traversal)
        if self.norm_after_attention is not None:
            m, m_dot = self.norm_after_attention(m, m_dot)
        residual, residual_dot, y, y_dot, _ = self.norm_before_mlp.of_sum(Stream(residual, residual_dot, m, m_dot))
        m, m_dot = yield from self._mlp(y, y_dot)
        if self.norm_after_mlp is not None:
            m, m_dot = self.norm_after_mlp(m, m_dot)
        return Stream(residual, residual_dot, m, m_dot), rstd

    def _attention(self, y: Tensor, y_dot: Tensor | None, traversal: Traversal) -> Generator[Asked, list[Dual], Dual]:
        qkv = yield (y, y_dot), self.qkv
        (q, q_dot), (k, k_dot), (v, v_dot) = ((self._heads(x), self._heads(x_dot)) for x, x_dot in qkv)
        if self.q_norm is not None:
            q, q_dot = self.q_norm(q, q_dot)
        if self.k_norm is not None:
            k, k_dot = self.k_norm(k, k_dot)
        q, q_dot, k, k_dot = rotary(q, q_dot, k, k_dot, *traversal.rotary[self.rotary_type])
        rows, shared = traversal.rows, traversal.rows.shared
        options: dict[str, Any] = {"max_seqlen": rows.max_seqlen, "scale": self.scale, "window": self.window}
        if shared is not None:
            (k, k_dot), (v, v_dot) = take_rows([(k, k_dot), (v, v_dot)], shared.spread)
            options |= {"cu_seqlens_k": shared.cu_seqlens, "max_seqlen_k": shared.max_seqlen}
        o, o_dot = self.attention(q, q_dot, k, k_dot, v, v_dot, rows.cu_seqlens, **options)
        o, o_dot = o.flatten(1), None if o_dot is None else o_dot.flatten(1)
        ((m, m_dot),) = yield (o, o_dot), (self.o,)
        return m, m_dot

    def _heads(self, x: Any) -> Any:
        """View ``[rows, heads * head_dim]`` as ``[rows, heads, head_dim]``; None stays None."""
        return None if x is None else x.unflatten(-1, (-1, self.head_dim))

    def _mlp(self, y: Tensor, y_dot: Tensor | None) -> Generator[Asked, list[Dual], Dual]:
        (gate, gate_dot), (up, up_dot) = yield (y, y_dot), self.gate_up
        y, y_dot = glu(gate, gate_dot, up, up_dot, activation=self.activation)
        ((m, m_dot),) = yield (y, y_dot), (self.down,)
        return m, m_dot


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
