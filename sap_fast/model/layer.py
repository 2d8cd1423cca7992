"""One decoder layer: its parts as the library reads them, and its forward on a stream.

A layer hands on the residual stream and its own update separately, because their sum is taken, together with the
probe, inside the next norm:

    h, y = probe_rms_norm(residual, update, probe of the layer before)
    h, y = probe_rms_norm(h, attention(y));  hand on (h, mlp(y))

Families that normalise an output before it is added (sandwich norms) have ``rms_norm`` around ``attention(y)`` and
``mlp(y)``: what is handed on stays the residual stream and the summand, so the probe and the scale of a layer's
output keep their meaning.

Several traversals can be run together: a layer's forward is a generator for one of them, which hands out what goes into
linear maps and is handed back what comes out, and the maps take the rows of all at once.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from sap_fast.batch.rows import Rows
from sap_fast.model.lockstep import lockstep
from sap_fast.ops import (
    Group,
    LoRATarget,
    attention,
    glu,
    lora_linear_grouped,
    probe_rms_norm,
    rms_norm,
    rotary,
    take_rows,
)
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
