"""What the public op functions refuse: shapes, dtypes and devices that do not fit, by name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sap_fast.ops import (
    LoRATarget,
    attention,
    glu,
    linear_cross_entropy,
    lora_linear,
    probe_rms_norm,
    rms_norm,
    rotary,
)


def t(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    if dtype.is_floating_point:
        return torch.randn(shape, device=device).to(dtype)
    return torch.zeros(shape, dtype=dtype, device=device)


def _norm(x: Tensor, x_dot: Tensor | None = None, weight: Tensor | None = None) -> Any:
    return rms_norm(x, x_dot, t(4) if weight is None else weight, eps=1e-5)


def _probe(*tensors: Tensor | None, weight: Tensor | None = None) -> Any:
    return probe_rms_norm(*tensors, t(4) if weight is None else weight, eps=1e-5)


def _glu(*tensors: Tensor | None, activation: str = "silu") -> Any:
    return glu(*tensors, activation=activation)


def _attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None, **options: Any) -> Any:
    lengths = torch.tensor([0, 3], dtype=torch.int32) if lengths is None else lengths
    return attention(q, None, k, None, v, None, lengths, max_seqlen=3, scale=1.0, **options)


def _lora(x: Tensor, x_dot: Tensor | None = None, **fields: Any) -> Any:
    return lora_linear(x, x_dot, [LoRATarget(**{"weight": t(5, 4), **fields})])


def _adapter(device: str = "cpu") -> dict[str, Tensor]:
    return {"a": t(2, 4, device=device), "b": t(5, 2, device=device)}


q, kv, x = t(3, 4, 6), t(3, 2, 6), t(3, 4)
f16, bf16, f64, i64, i32 = torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32
meta = "meta"
# fmt: off
REFUSED: list[tuple[str, type[Exception], str, Callable[[], Any]]] = [
    ("rms_norm-ndim", ValueError, r"x must have 2 .* \(2, 3, 4\)",
     lambda: _norm(t(2, 3, 4))),
    ("rms_norm-float16", TypeError, "bfloat16.*is torch.float16",
     lambda: _norm(t(3, 4, dtype=f16))),
    ("rms_norm-int", TypeError, "float32.*is torch.int64",
     lambda: _norm(t(3, 4, dtype=i64))),
    ("rms_norm-weight", ValueError, r"weight .* \(4,\).* \(5,\)",
     lambda: _norm(x, weight=t(5))),
    ("rms_norm-device", ValueError, "weight is on cpu.* x on meta",
     lambda: _norm(t(3, 4, device=meta))),
    ("rms_norm-tangent-shape", ValueError, r"x and its .*\(3, 4\).*\(2, 4\)",
     lambda: _norm(x, t(2, 4))),
    ("rms_norm-tangent-dtype", ValueError, "float32.*float64",
     lambda: _norm(x, t(3, 4, dtype=f64))),
    ("rms_norm-tangent-device", ValueError, "cpu.*meta",
     lambda: _norm(x, t(3, 4, device=meta))),
    ("probe-update-shape", ValueError, r"update .*\(3, 4\).*\(2, 4\)",
     lambda: _probe(x, None, t(2, 4), None, None)),
    ("probe-update-dtype", TypeError, "update .*bfloat16.*float32",
     lambda: _probe(x, None, t(3, 4, dtype=bf16), None, None)),
    ("probe-one-tangent", ValueError, "both have a tangent, or neither",
     lambda: _probe(x, x, x, None, None)),
    ("probe-shape", ValueError, r"probe .*\(2, 4\).*\(1, 4\)",
     lambda: _probe(x, x, x, x, t(1, 4))),
    ("probe-shape-ordinary", ValueError, r"probe .*\(1, 4\).*\(4,\)",
     lambda: _probe(x, None, x, None, t(4))),
    ("probe-device", ValueError, "probe is on meta",
     lambda: _probe(x, None, x, None, t(1, 4, device=meta))),
    ("probe-weight", ValueError, r"weight .*\(4,\).*\(3,\)",
     lambda: _probe(x, None, x, None, None, weight=t(3))),
    ("glu-activation", ValueError, "'gelu_tanh', 'silu'.*'relu'",
     lambda: _glu(x, None, x, None, activation="relu")),
    ("glu-shape", ValueError, r"up .*\(3, 4\).*\(3, 5\)",
     lambda: _glu(x, None, t(3, 5), None)),
    ("glu-dtype", TypeError, "up and gate .*bfloat16.*float32",
     lambda: _glu(x, None, t(3, 4, dtype=bf16), None)),
    ("glu-int", TypeError, "gate .*int64",
     lambda: _glu(t(3, 4, dtype=i64), None, x, None)),
    ("glu-one-tangent", ValueError, "both have a tangent, or neither",
     lambda: _glu(x, x, x, None)),
    ("glu-device", ValueError, "up is on meta",
     lambda: _glu(x, None, t(3, 4, device=meta), None)),
    ("rotary-ndim", ValueError, r"q must have 3 .*\(3, 4\)",
     lambda: rotary(x, None, x, None, t(3, 4), t(3, 4))),
    ("rotary-odd", ValueError, "even width .* 6, but has 5",
     lambda: rotary(q, None, kv, None, t(3, 5), t(3, 5))),
    ("rotary-too-wide", ValueError, "at most .* 6, but has 8",
     lambda: rotary(q, None, kv, None, t(3, 8), t(3, 8))),
    ("rotary-rows", ValueError, r"cos .*\(3, 6\).*\(2, 6\)",
     lambda: rotary(q, None, kv, None, t(2, 6), t(3, 6))),
    ("rotary-sin", ValueError, r"sin .*\(3, 6\).*\(3, 4\)",
     lambda: rotary(q, None, kv, None, t(3, 6), t(3, 4))),
    ("rotary-k", ValueError, r"k .*\(3, 2, 6\).*\(2, 2, 6\)",
     lambda: rotary(q, None, t(2, 2, 6), None, t(3, 6), t(3, 6))),
    ("rotary-device", ValueError, "cos is on meta",
     lambda: rotary(q, None, kv, None, t(3, 6, device=meta), t(3, 6))),
    ("rotary-one-tangent", ValueError, "both have a tangent",
     lambda: rotary(q, q, kv, None, t(3, 6), t(3, 6))),
    ("attention-ndim", ValueError, r"q must have 3 .*\(3, 4\)",
     lambda: _attention(x, kv, kv)),
    ("attention-v", ValueError, r"v .*\(3, 2, 6\).*\(3, 1, 6\)",
     lambda: _attention(q, kv, t(3, 1, 6))),
    ("attention-dtype", TypeError, "v and q .*bfloat16.*float32",
     lambda: _attention(q, kv, t(3, 2, 6, dtype=bf16))),
    ("attention-float16", TypeError, "q .*float16",
     lambda: _attention(t(3, 4, 6, dtype=f16), kv, kv)),
    ("attention-heads", ValueError, "multiple .* 4 and 3",
     lambda: _attention(q, t(3, 3, 6), t(3, 3, 6))),
    ("attention-lengths", TypeError, "cu_seqlens .*int32.*int64",
     lambda: _attention(q, kv, kv, t(2, dtype=i64))),
    ("attention-used", ValueError, r"seqused .*\(1,\).*\(2,\)",
     lambda: _attention(q, kv, kv, seqused=t(2, dtype=i32))),
    ("attention-used-dtype", TypeError, "seqused .*int64",
     lambda: _attention(q, kv, kv, seqused=t(1, dtype=i64))),
    ("attention-rows-k", ValueError, r"k .*\(3, 2, 6\).*\(5, 2, 6\)",
     lambda: _attention(q, t(5, 2, 6), t(5, 2, 6))),
    ("attention-keys-alone", ValueError, "together or not at all, but max_seqlen_k is missing",
     lambda: _attention(q, kv, kv, cu_seqlens_k=t(2, dtype=i32))),
    ("attention-longest-alone", ValueError, "together or not at all, but cu_seqlens_k is missing",
     lambda: _attention(q, kv, kv, max_seqlen_k=3)),
    ("attention-keys-used", ValueError, "seqused does not go together with cu_seqlens_k",
     lambda: _attention(q, kv, kv, seqused=t(1, dtype=i32), cu_seqlens_k=t(2, dtype=i32), max_seqlen_k=3)),
    ("attention-keys-lengths", ValueError, r"cu_seqlens_k .*\(2,\).*\(3,\)",
     lambda: _attention(q, kv, kv, cu_seqlens_k=t(3, dtype=i32), max_seqlen_k=3)),
    ("attention-keys-dtype", TypeError, "cu_seqlens_k .*int64",
     lambda: _attention(q, kv, kv, cu_seqlens_k=t(2, dtype=i64), max_seqlen_k=3)),
    ("attention-too-few-keys", ValueError, "keys",
     lambda: _attention(q, t(2, 2, 6), t(2, 2, 6), torch.tensor([0, 3], dtype=i32),
                        cu_seqlens_k=torch.tensor([0, 2], dtype=i32), max_seqlen_k=2)),
    ("attention-window", ValueError, "at least 1, or None.*is 0",
     lambda: _attention(q, kv, kv, window=0)),
    ("attention-device", ValueError, "v is on meta",
     lambda: _attention(q, kv, t(3, 2, 6, device=meta))),
    ("lora-weight", ValueError, r"\[d_out, 4\].*\(5, 3\)",
     lambda: _lora(x, weight=t(5, 3))),
    ("lora-dtype", TypeError, "weight and x .*float32.*bfloat16",
     lambda: _lora(t(3, 4, dtype=bf16))),
    ("lora-bias", ValueError, r"bias .*\(5,\).*\(4,\)",
     lambda: _lora(x, bias=t(4))),
    ("lora-only-a", ValueError, "both a and b",
     lambda: _lora(x, a=t(2, 4))),
    ("lora-a", ValueError, r"a .*\(2, 4\).*\(2, 3\)",
     lambda: _lora(x, a=t(2, 3), b=t(5, 2))),
    ("lora-b", ValueError, r"b .*\(5, 2\).*\(5, 3\)",
     lambda: _lora(x, a=t(2, 4), b=t(5, 3))),
    ("lora-pair-without-direction", ValueError, "both with x_dot",
     lambda: _lora(x, x, **_adapter())),
    ("lora-direction-without-pair", ValueError, "neither without",
     lambda: _lora(x, **_adapter(), a_dot=t(2, 4), b_dot=t(5, 2))),
    ("lora-direction-shape", ValueError, r"a_dot .*\(2, 4\).*\(3, 4\)",
     lambda: _lora(x, x, **_adapter(), a_dot=t(3, 4), b_dot=t(5, 2))),
    ("lora-device", ValueError, "a is on meta",
     lambda: _lora(x, **_adapter(meta))),
    ("lora-dropout-one", ValueError, r"\[0, 1\).*1.0",
     lambda: _lora(x, **_adapter(), dropout=1.0)),
    ("lora-dropout-seed", ValueError, "needs a seed: an int64 scalar",
     lambda: _lora(x, **_adapter(), dropout=0.5)),
    ("loss-weight", ValueError, r"weight .*\(9, 4\).*\(9, 5\)",
     lambda: linear_cross_entropy(x, None, t(9, 5), t(3, dtype=i64))),
    ("loss-targets", ValueError, r"targets .*\(3,\).*\(2,\)",
     lambda: linear_cross_entropy(x, None, t(9, 4), t(2, dtype=i64))),
    ("loss-targets-dtype", TypeError, "int64.*int32",
     lambda: linear_cross_entropy(x, None, t(9, 4), t(3, dtype=i32))),
    ("loss-device", ValueError, "weight is on meta",
     lambda: linear_cross_entropy(x, None, t(9, 4, device=meta), t(3, dtype=i64))),
    ("loss-int", TypeError, "x .*int64",
     lambda: linear_cross_entropy(t(3, 4, dtype=i64), None, t(9, 4), t(3, dtype=i64))),
]
# fmt: on


@pytest.mark.parametrize(("exception", "message", "call"), [pytest.param(*rest, id=name) for name, *rest in REFUSED])
def test_refuses(exception: type[Exception], message: str, call: Callable[[], Any]) -> None:
    """The message names what was expected, then what came."""
    with pytest.raises(exception, match=message):
        call()
