"""What a traversal costs is what the modules of every family and PyTorch's own counter say."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from benchmarks.floor.work import Shape, Tokens, Work, traversal

SMALL = Shape(hidden=48, inner=80, layers=5, vocab=100, heads=4, kv_heads=2, head_dim=16)

CONFIGS = [
    LlamaConfig(num_key_value_heads=2),
    Qwen2Config(num_key_value_heads=2, use_sliding_window=True, sliding_window=9, max_window_layers=2),
    Qwen3Config(num_key_value_heads=2, head_dim=24),
    MistralConfig(num_key_value_heads=2, sliding_window=7),
    Gemma3TextConfig(num_key_value_heads=2, head_dim=24, sliding_window=8, sliding_window_pattern=2),
]
TINY = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 96}


def tiny(config: Any, layers: int = 3) -> Any:
    """Make a configuration of the same family with tiny widths."""
    values = {k: v for k, v in config.to_dict().items() if k not in ("layer_types", "head_dim", "rope_parameters")}
    more = {"head_dim": 24} if config.model_type in ("qwen3", "gemma3_text") else {}
    return type(config)(**values | TINY | more | {"num_hidden_layers": layers, "max_position_embeddings": 64})


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_a_shape_is_that_of_the_models_modules(config: Any) -> None:
    config = tiny(config)
    shape = Shape.of(config, rank=4, targets=("o_proj",), dtype_bytes=4)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = model.get_submodule("model.layers")
    assert len(layers) == shape.layers
    for i, layer in enumerate(layers):
        maps = {name.split(".")[-1]: x for name, x in layer.named_modules() if isinstance(x, nn.Linear)}
        assert shape.maps == {name: (x.in_features, x.out_features) for name, x in maps.items()}
        assert shape.layer_weights == sum(x.weight.numel() for x in maps.values())
        window = (
            config.sliding_window
            if config.model_type == "mistral"
            else getattr(layer.self_attn, "sliding_window", None)
        )
        assert (shape.windows[i] if shape.windows else None) == window
    assert shape.head_weights == model.lm_head.weight.numel()
    assert (shape.rank, shape.targets, shape.dtype_bytes) == (4, ("o_proj",), 4)


def test_a_model_of_text_and_images_has_the_shape_of_its_text_part() -> None:
    text = tiny(CONFIGS[-1])
    assert Shape.of(Gemma3Config(text_config=text.to_dict())) == Shape.of(text)


def count(run: Callable[[], Any]) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[2]], ids=lambda config: config.model_type)
def test_a_layer_costs_what_pytorch_counts(config: Any) -> None:
    """Two models differ by a layer, whose cost has neither the head nor what a first layer is spared."""
    sequences, length, rank = 3, 20, 4
    targets = ("q_proj", "k_proj", "o_proj", "down_proj")
    forward, both = [], []
    for layers in (2, 3):
        base = AutoModelForCausalLM.from_config(tiny(config, layers), attn_implementation="eager")
        model = get_peft_model(base, LoraConfig(r=rank, target_modules=list(targets)))
        ids = torch.randint(TINY["vocab_size"], (sequences, length))
        forward.append(count(lambda model=model, ids=ids: model(input_ids=ids)))  # type: ignore[misc]
        both.append(count(lambda model=model, ids=ids: model(input_ids=ids).logits.sum().backward()))  # type: ignore[misc]
    shape = Shape.of(tiny(config), rank=rank, targets=targets)
    run = partial(traversal, shape, Tokens(sequences * length, length), range(1), head=False)
    # Eager attention takes all pairs of tokens, and needs no product again in its backward.
    attention = 2 * shape.queries * sequences * length**2
    there, back = run(), run(backward=True)
    assert forward[1] - forward[0] == there.linear + there.lora + 2 * attention
    assert both[1] - both[0] == there.linear + there.lora + back.linear + back.lora + 6 * attention


def test_the_head_costs_what_pytorch_counts() -> None:
    x, weight = torch.randn(7, SMALL.hidden, requires_grad=True), torch.randn(SMALL.vocab, SMALL.hidden)
    run = partial(traversal, SMALL, Tokens(20, 10, 7), range(0))
    assert count(lambda: nn.functional.linear(x, weight)) == run().flops == run().head
    assert count(lambda: nn.functional.linear(x, weight).sum().backward()) == run().head + run(backward=True).head
    assert run(tangents=0.5).head == 1.5 * run().head
    assert run(head=False) == Work()


@pytest.mark.parametrize("backward", [False, True])
def test_bytes_are_those_of_each_operand(backward: bool) -> None:
    """Two layers of SMALL in bfloat16 are counted, on 10 rows of which half have tangents, operand by operand."""
    x, inner, q, kv = 48, 80, 64, 32
    found = traversal(SMALL, Tokens(10, 5, 4), range(2), backward=backward, tangents=0.5)
    # What goes into and comes out of the products: q, k and v; o; gate and up; down.
    operands = (x + q + 2 * kv) + (q + x) + (x + 2 * inner) + (inner + x)
    if backward:
        norms, turned, gated = 2 * (2 + 2) * x, 2 * (q + kv), (3 + 2) * inner
        attended = (q + 2 * kv + 2 * q) + (q + 2 * kv)  # q, k, v, o and do; dq, dk, dv
        lora = (x + q) + (x + kv)
    else:
        norms, turned, gated = 2 * (2 + 2) * x, 2 * (q + kv), (2 + 1) * inner
        attended, lora = (q + 2 * kv) + q, 0
    numbers = 2 * 2 * 15
    assert found.operands == numbers * operands
    assert found.rowwise == numbers * (norms + turned + attended + gated)
    assert found.lora_bytes == numbers * lora
    assert found.weights == 2 * (2 * (2 * x * q + 2 * x * kv + 3 * x * inner) + x * 100)
    assert found.bytes == found.operands + found.rowwise + found.lora_bytes + found.weights


def dual_flops(primal: Callable[..., Tensor], frozen: int, *xs: Tensor) -> tuple[int, int]:
    """FLOPs of a dual forward of ``primal``, and of the backward of both halves.

    Args:
        frozen: of ``xs``, how many from the first need both cotangents; the others need that of their tangent alone.
    """
    xs = tuple(x.clone().requires_grad_(i < frozen) for i, x in enumerate(xs))
    x_dots = tuple(torch.randn_like(x).requires_grad_() for x in xs)

    def forward() -> Tensor:
        with forward_ad.dual_level():
            y = primal(*map(forward_ad.make_dual, xs, x_dots))
            value, tangent = forward_ad.unpack_dual(y)
            assert tangent is not None
            return (value * torch.randn_like(value) + tangent * torch.randn_like(value)).sum()

    there = count(forward)
    wanted = [*xs[:frozen], *x_dots]
    return there, count(lambda: torch.autograd.grad(forward(), wanted)) - there


def test_tangents_of_lora_cost_what_pytorch_counts() -> None:
    rows, (n, m) = 6, SMALL.maps["q_proj"]
    x, a, b = torch.randn(rows, n), torch.randn(SMALL.rank, n), torch.randn(m, SMALL.rank)
    shape = replace(SMALL, targets=("q_proj",))
    run = partial(traversal, shape, Tokens(rows, rows), range(1), tangents=1.0)
    found = dual_flops(lambda x, a, b: x @ a.T @ b.T, 1, x, a, b)
    assert found == (run().lora, run(backward=True).lora)
    assert run().linear == 2 * traversal(shape, Tokens(rows, rows), range(1)).linear


def test_tangents_triple_attention_as_pytorch_counts() -> None:
    q, k, v = torch.randn(3, 5, 8).unbind(0)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.T).softmax(-1) @ v

    there, back = dual_flops(attention, 3, q, k, v)
    xs = [x.clone().requires_grad_() for x in (q, k, v)]
    plain = count(lambda: attention(*xs))
    plain_back = count(lambda: attention(*xs).sum().backward()) - plain
    assert (there, back) == (3 * plain, 3 * plain_back)
    for backward in (False, True):
        run = partial(traversal, SMALL, Tokens(9, 3), range(2), backward=backward)
        assert run(tangents=1.0).attention == 3 * run().attention


@pytest.mark.parametrize("length", [1, 5, 6, 7, 40])
def test_windows_bound_what_a_query_attends_to(length: int) -> None:
    shape = replace(SMALL, windows=(6, None, 1, 40, 100))
    for layer, window in enumerate(shape.windows):
        expected = sum(min(i, window or length) for i in range(1, length + 1)) / length
        assert shape.attended(layer, length) == pytest.approx(expected)
    tokens = Tokens(80, length)
    rest = traversal(shape, tokens, range(2, 5)).attention + traversal(shape, tokens, range(2)).attention
    assert traversal(shape, tokens, range(5)).attention == pytest.approx(rest)


def test_tokens_of_sequences_attend_as_much_as_they_do_one_by_one() -> None:
    lengths = [3, 11, 6]
    tokens = Tokens.of(lengths, 9)
    assert (tokens.rows, tokens.scored) == (20, 9)
    one_by_one = [traversal(SMALL, Tokens(n, n), range(5)).attention for n in lengths]
    assert traversal(SMALL, tokens, range(5)).attention == pytest.approx(sum(one_by_one))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replace(SMALL, layers=0), "layers of a shape must be a whole number of at least 1"),
        (lambda: replace(SMALL, hidden=-4), "hidden of a shape .* is -4"),
        (lambda: replace(SMALL, inner=2.5), "inner of a shape .* is 2.5"),
        (lambda: replace(SMALL, rank=0), "rank of a shape"),
        (lambda: replace(SMALL, kv_heads=3), "heads must be a multiple of kv_heads.* 4 and 3"),
        (lambda: replace(SMALL, windows=(4,)), "windows has 1 entries; give one for each of 5"),
        (lambda: replace(SMALL, windows=(4, 0, 4, 4, 4)), r"\[1\] of windows"),
        (lambda: replace(SMALL, targets=("q_proj", "wo")), r"some of \['q_proj', .*'wo'"),
        (lambda: replace(SMALL, targets=()), "targets of LoRA"),
        (lambda: Shape.of(GPT2Config()), "model_type 'gpt2'"),
        (lambda: Tokens(0, 4), "rows of tokens"),
        (lambda: Tokens(8, 4, 9), "scored must be at most rows, 8, but is 9"),
        (lambda: Tokens.of([]), "lengths is empty"),
        (lambda: Tokens.of([3, 0]), r"lengths\[1\] of tokens"),
    ],
)
def test_refuses(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
