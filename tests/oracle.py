"""The oracle of the model tests: transformers' own model, its gradients by double backward in float64.

Nothing here uses the library's rules. ``everything_in_float64`` lifts the casts to float32 that transformers
has in its norms and softmax even for float64 models; without it an unmodified model agrees to about 1e-6.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import import_module
from unittest import mock

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

FAMILIES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "llama-biased": ("LlamaConfig", "LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("LlamaConfig", "LlamaForCausalLM", {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 5, "head_dim": 6}),
    "qwen2": (
        "Qwen2Config",
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    ),
    "qwen3": (
        "Qwen3Config",
        "Qwen3ForCausalLM",
        {"head_dim": 6, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    # Sliding and full attention in turn, which differ in their rotary tables.
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            "head_dim": 6,
            "query_pre_attn_scalar": 10,
            "sliding_window": 4,
            "sliding_window_pattern": 2,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
            },
        },
    ),
}
VOCAB = 37
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def base_model(family: str = "llama", layers: int = 4, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Make a tiny random model of a family: 4 heads, 2 key-value heads."""
    import transformers

    config_name, model_name, extra = FAMILIES[family]
    config = getattr(transformers, config_name)(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        attn_implementation="eager",
        **extra,
    )
    model = getattr(transformers, model_name)(config).to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            # Weights and biases large enough that every nonlinearity is felt, norms away from where they start.
            noise = torch.randn_like(p) * (0.3 if "norm" in name or "bias" in name else 0.15)
            p.copy_(p + noise if "norm" in name else noise)
    return model


def tiny_model(
    family: str = "llama",
    targets: tuple[str, ...] = ("q_proj", "v_proj"),
    layers: int = 4,
    dtype: torch.dtype = torch.float64,
    adapter_dtype: torch.dtype | None = None,
    **lora: object,
) -> nn.Module:
    """Make a tiny random PEFT model whose adapters are not at zero, in eval mode (no dropout)."""
    settings = {"r": 3, "lora_alpha": 6, "lora_dropout": 0.0, **lora}
    model = get_peft_model(base_model(family, layers, dtype), LoraConfig(target_modules=list(targets), **settings))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.data = (torch.randn(p.shape, dtype=torch.float64) * 0.2).to(adapter_dtype or dtype)
    return model.eval()


def random_batch(sequences: int = 3, length: int = 9, *, ragged: bool = True) -> dict[str, Tensor]:
    """Draw random tokens, ragged and padded right, the first third of each sequence not scored."""
    ids = torch.randint(3, VOCAB, (sequences, length))
    mask, labels = torch.ones_like(ids), ids.clone()
    for b in range(sequences):
        real = length - (2 * b) % (length - 3) * ragged
        ids[b, real:], mask[b, real:], labels[b, real:] = 0, 0, -100
        labels[b, : max(1, real // 3)] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def random_pairs(pairs: int = 2, length: int = 8) -> dict[str, Tensor]:
    """Draw random pairs: each prompt twice, chosen rows first."""
    batch = random_batch(2 * pairs, length)
    prompt = length // 3
    batch["input_ids"][pairs:, :prompt] = batch["input_ids"][:pairs, :prompt]
    for b in range(2 * pairs):
        batch["labels"][b, : max(1, min(prompt, int(batch["attention_mask"][b].sum()) - 1))] = -100
    return batch


def lora(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@contextmanager
def everything_in_float64(model: nn.Module) -> Iterator[None]:
    """Patch, for the duration of a test, the casts to float32 in transformers' norms and softmax."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    module = import_module(type(base).__module__)
    norm = getattr(module, type(base).__name__.replace("ForCausalLM", "RMSNorm"))

    def rms_norm(self: nn.Module, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    def gemma_rms_norm(self: nn.Module, x: Tensor) -> Tensor:
        return (1 + self.weight) * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)

    def softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.softmax(x, dim)

    with ExitStack() as stack:
        stack.enter_context(
            mock.patch.object(norm, "forward", gemma_rms_norm if "Gemma" in norm.__name__ else rms_norm)
        )
        stack.enter_context(mock.patch.object(module.nn.functional, "softmax", softmax))
        yield


@contextmanager
def probes(model: nn.Module, vectors: Mapping[int, Tensor]) -> Iterator[None]:
    """Add ``vectors`` to the outputs of the model's layers."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    handles = [base.model.layers[j].register_forward_hook(lambda _, __, out, v=v: out + v) for j, v in vectors.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def token_log_p(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Compute ``(log p of token t + 1 given its past, whether it is scored)``, both ``[B, T - 1]``."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    log_p = F.log_softmax(logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32)), -1)
    labels = batch["labels"][:, 1:]
    return log_p.gather(-1, labels.clamp_min(0)[..., None])[..., 0], labels != -100


def task_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    log_p, scored = token_log_p(model, batch)
    return -log_p[scored].mean()


def margins(model: nn.Module, pairs: Mapping[str, Tensor], *, per_token: bool) -> Tensor:
    log_p, scored = token_log_p(model, pairs)
    totals = (log_p * scored).sum(1)
    chosen, rejected = (totals / scored.sum(1) if per_token else totals).chunk(2)
    return chosen - rejected


def unit_direction(
    model: nn.Module,
    pairs: Mapping[str, Tensor],
    *,
    per_token: bool = True,
    logsigmoid: float | None = None,
) -> dict[str, Tensor]:
    """Compute the harmful direction; ``logsigmoid`` is its temperature, None the difference loss."""
    margin = margins(model, pairs, per_token=per_token)
    loss = -margin.mean() if logsigmoid is None else -F.logsigmoid(margin / logsigmoid).mean()
    grads = torch.autograd.grad(loss, list(lora(model).values()))
    norm = torch.stack([g.norm() for g in grads]).norm()
    return {name: g / norm for name, g in zip(lora(model), grads, strict=True)}


def exact(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    u: Mapping[str, Tensor],
    vectors: Mapping[int, Tensor],
) -> tuple[Tensor, Tensor, dict, dict, dict]:
    """Compute ``(L, L_dot, grad_theta L, grad_V L, grad_V L_dot)`` by double backward."""
    leaves = {j: v.detach().clone().requires_grad_() for j, v in vectors.items()}
    theta = lora(model)
    with probes(model, leaves):
        loss = task_loss(model, batch)
    grads = torch.autograd.grad(loss, [*theta.values(), *leaves.values()], create_graph=True)
    slope = sum((g * u[name]).sum() for name, g in zip(theta, grads, strict=False))
    second = torch.autograd.grad(slope, list(leaves.values()))
    return (
        loss.detach(),
        slope.detach(),
        {name: g.detach() for name, g in zip(theta, grads, strict=False)},
        {j: g.detach() for j, g in zip(leaves, grads[len(theta) :], strict=True)},
        dict(zip(leaves, second, strict=True)),
    )
