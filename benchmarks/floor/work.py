"""What one traversal of a decoder costs in FLOPs and bytes, for any model of the families that are supported.

A traversal is a forward or a backward of some tokens, with or without tangents, through some layers. Counted are

- the frozen linear maps: ``2 * in * out`` FLOPs a row, and as many in a backward, which takes no gradient of them;
  tangent rows go through the same products as further rows;
- attention, causal within each sequence: 2 products of queries and keys forward and 5 backward (as flash attention
  recomputes one), and for the tangents twice as many on top;
- the head, forward and backward, on the rows it is said to run on;
- LoRA: ``2 * rank * (in + out)`` FLOPs a row and target forward, twice that backward, and for the tangents twice that
  in either, on top;
- bytes: weights once a traversal, every product's operand once, and what row-wise operations read and write, each
  fused as far as it can be: residual, probe and norm in one, rotary, the gated unit, attention's operands, and
  of LoRA the second reading of inputs and cotangents for its gradients.

Left out, as it is small or can be fused into what is counted: embeddings, the optimizer, the norms of heads (Qwen3) and
of outputs (Gemma-3), the reading of LoRA's own weights. Activations are stored, so nothing is recomputed. Counted
although it could be spared: the cotangent of the first layer's input (for Llama-2-7B 0.4% of plain fine-tuning), and
LoRA's gradients in a backward that is for the probe alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")


def check_positive(what: str, numbers: Mapping[str, float], *, whole: bool = False) -> None:
    """See that numbers, by name, are positive and finite, and whole if they have to be.

    Raises:
        ValueError: one is not; ``what`` says whose it is.
    """
    for name, x in numbers.items():
        if not (math.isfinite(x) and x > 0 and (not whole or x == int(x))):
            kind = "a whole number of at least 1" if whole else "positive and finite"
            raise ValueError(f"{name} of {what} must be {kind}, but is {x}")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model's widths, its LoRA adapters, and the size of its numbers.

    Attributes:
        inner: width of the MLP.
        windows: each layer's sliding window in tokens, None for full attention; empty if no layer has one.
        rank, targets: of LoRA: the rank, and the linear maps that have an adapter.
        dtype_bytes: of a stored weight or activation.

    Raises:
        ValueError: a number that cannot be, named.
    """

    hidden: int
    inner: int
    layers: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...] = ()
    rank: int = 8
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    dtype_bytes: int = 2

    def __post_init__(self) -> None:
        widths = ("hidden", "inner", "layers", "vocab", "heads", "kv_heads", "head_dim", "rank", "dtype_bytes")
        check_positive("a shape", {name: getattr(self, name) for name in widths}, whole=True)
        if self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads, but they are {self.heads} and {self.kv_heads}")
        if self.windows and len(self.windows) != self.layers:
            raise ValueError(f"windows has {len(self.windows)} entries; give one for each of {self.layers} layers")
        check_positive("windows", {f"[{i}]": w for i, w in enumerate(self.windows) if w is not None}, whole=True)
        unknown = sorted(set(self.targets) - set(self.maps))
        if unknown or not self.targets:
            raise ValueError(f"targets of LoRA must be some of {list(self.maps)}, but are {list(self.targets)}")

    @classmethod
    def of(cls, config: Any, **others: Any) -> "Shape":
        """Read the shape of a transformers model.

        Args:
            config: the model's configuration: Llama, Mistral, Qwen2, Qwen3, or Gemma-3, of which the text part is read.
            others: ``rank``, ``targets``, ``dtype_bytes``.

        Raises:
            ValueError: another family.
        """
        config = config.get_text_config()
        if config.model_type not in FAMILIES:
            raise ValueError(
                f"no shape is known of model_type {config.model_type!r}, only of {list(FAMILIES)}; give widths"
            )
        layers, window = config.num_hidden_layers, getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
        windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
        return cls(
            hidden=config.hidden_size,
            inner=config.intermediate_size,
            layers=layers,
            vocab=config.vocab_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            windows=windows if any(windows) else (),
            **others,
        )

    @property
    def queries(self) -> int:
        """The width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """The width of all key heads together, and of all value heads."""
        return self.kv_heads * self.head_dim

    @property
    def maps(self) -> dict[str, tuple[int, int]]:
        """The ``(in, out)`` of each linear map of a layer."""
        hidden, inner, queries, keys = self.hidden, self.inner, self.queries, self.keys
        return {
            "q_proj": (hidden, queries),
            "k_proj": (hidden, keys),
            "v_proj": (hidden, keys),
            "o_proj": (queries, hidden),
            "gate_proj": (hidden, inner),
            "up_proj": (hidden, inner),
            "down_proj": (inner, hidden),
        }

    @property
    def layer_weights(self) -> int:
        """The number of weights of a layer's linear maps."""
        return sum(n * m for n, m in self.maps.values())

    @property
    def head_weights(self) -> int:
        return self.hidden * self.vocab

    @property
    def lora_widths(self) -> int:
        """The sum of ``in + out`` over the targets of a layer."""
        return sum(sum(self.maps[name]) for name in self.targets)

    def attended(self, layer: int, length: float) -> float:
        """Count the keys that a query attends to in a layer, on average over the sequence."""
        window = self.windows[layer] if self.windows else None
        if window is None or length <= window:
            return (length + 1) / 2
        return window - window * (window - 1) / (2 * length)


@dataclass(frozen=True)
class Tokens:
    """Describes what a traversal computes on.

    Attributes:
        rows: tokens, with padding if that is computed on.
        length: of the sequence that a token is in, on average over tokens.
        scored: rows that the head runs on; None is all of them.

    Raises:
        ValueError: a number that is not positive and finite, or more scored rows than rows.
    """

    rows: float
    length: float
    scored: float | None = None

    def __post_init__(self) -> None:
        check_positive("tokens", {"rows": self.rows, "length": self.length, "scored": self.head_rows})
        if self.head_rows > self.rows:
            raise ValueError(f"scored must be at most rows, {self.rows}, but is {self.scored}")

    @classmethod
    def of(cls, lengths: Sequence[int], scored: float | None = None) -> "Tokens":
        """Make the tokens of sequences of these lengths, without padding between them."""
        if not lengths:
            raise ValueError("lengths is empty; give at least one sequence's")
        check_positive("tokens", {f"lengths[{i}]": n for i, n in enumerate(lengths)})
        return cls(sum(lengths), sum(n * n for n in lengths) / sum(lengths), scored)

    @property
    def head_rows(self) -> float:
        return self.rows if self.scored is None else self.scored

    def share(self, fraction: float) -> "Tokens":
        """Take a share of the sequences."""
        return Tokens(self.rows * fraction, self.length, self.head_rows * fraction)


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes; ``+`` adds two, ``*`` takes a share or a multiple of one.

    Attributes:
        linear, attention, head, lora: FLOPs of the frozen linear maps, of attention, of the head and of LoRA.
        spared: FLOPs of ``linear`` that cost no time, because FP8 computes more of them in a second.
        weights: bytes of frozen weights read.
        operands: bytes that products of frozen maps read and write beside weights.
        rowwise: bytes that row-wise operations and attention read and write.
        lora_bytes: bytes that LoRA's gradients read.
    """

    linear: float = 0.0
    attention: float = 0.0
    head: float = 0.0
    lora: float = 0.0
    spared: float = 0.0
    weights: float = 0.0
    operands: float = 0.0
    rowwise: float = 0.0
    lora_bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: float) -> "Work":
        return Work(*(a * times for a in astuple(self)))

    @property
    def flops(self) -> float:
        return self.linear + self.attention + self.head + self.lora

    @property
    def bytes(self) -> float:
        return self.weights + self.operands + self.rowwise + self.lora_bytes


def traversal(
    shape: Shape,
    tokens: Tokens,
    layers: range,
    *,
    backward: bool = False,
    tangents: float = 0.0,
    head: bool = True,
    float8: tuple[float, float] = (1.0, 1.0),
) -> Work:
    """Count the work of one forward or backward of some tokens.

    Args:
        layers: those that are run.
        tangents: share of the tokens that carry tangents (in a backward: cotangents of both halves).
        head: whether the traversal ends, or a backward begins, with the head.
        float8: how many times faster than else FP8 runs the frozen maps, on primal and on tangent rows.
    """
    primal, tangent = tokens.rows, tokens.rows * tangents
    rows, depth = primal + tangent, len(layers)
    hidden, inner, stream = shape.hidden, shape.inner, shape.queries + shape.keys
    linear = 2 * shape.layer_weights * depth
    keys = sum(shape.attended(layer, tokens.length) for layer in layers)
    if backward:
        products = 5
        lora = 4 * primal + 4 * tangent
        # Two norms of 4 operands each, rotary, attention's 8 operands, the gated unit's 5.
        rowwise = 8 * hidden + 2 * stream + 4 * stream + 5 * inner
    else:
        products = 2
        lora = 2 * primal + 4 * tangent
        # Two norms of 4 operands each, rotary, attention's 4 operands, the gated unit's 3.
        rowwise = 8 * hidden + 2 * stream + 2 * stream + 3 * inner
    # Queries, keys and values share one input, and so do gate and up.
    operands = 4 * hidden + 2 * stream + 3 * inner
    numbers = shape.dtype_bytes * depth * rows
    return Work(
        linear=linear * rows,
        attention=2 * shape.queries * keys * products * (primal + 2 * tangent),
        head=2 * shape.head_weights * tokens.head_rows * (1 + tangents) if head else 0.0,
        lora=shape.rank * shape.lora_widths * depth * lora,
        spared=linear * (primal * (1 - 1 / float8[0]) + tangent * (1 - 1 / float8[1])),
        weights=shape.dtype_bytes * (depth * shape.layer_weights + (shape.head_weights if head else 0)),
        operands=numbers * operands,
        rowwise=numbers * rowwise,
        lora_bytes=numbers * shape.lora_widths if backward else 0.0,
    )
