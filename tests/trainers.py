"""A SAPTrainer on a tiny chat model, for its tests."""

from pathlib import Path
from typing import Any

import torch
from chat import save_chat_model

from sap_fast import SAPConfig
from sap_fast.hf import SAPTrainer

ROWS = [{"prompt": f"Say {i}", "completion": f"It is {i * 7}" + "!" * i} for i in range(12)]
PAIRS = [{"prompt": f"Do harm {i}", "chosen": f"No, not {i}.", "rejected": "Sure" + "," * i} for i in range(5)]
CONFIG = SAPConfig(probe_layers=(1, 2))


def load(tmp_path: Path, dtype: torch.dtype = torch.float32, **lora: Any) -> tuple[Any, Any]:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "model"
    if not folder.exists():
        save_chat_model(folder)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"], **lora))
    return model, AutoTokenizer.from_pretrained(folder)


def arguments(tmp_path: Path, **changes: Any) -> Any:
    from transformers import TrainingArguments

    defaults: dict[str, Any] = {
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 2,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**defaults, **changes})


def trainer(tmp_path: Path, args: dict[str, Any] | None = None, **changes: Any) -> SAPTrainer:
    model, tokenizer = load(tmp_path)
    given: dict[str, Any] = {
        "train_dataset": ROWS,
        "safety_dataset": PAIRS,
        "processing_class": tokenizer,
        "sap": CONFIG,
        "safety_batch_size": 2,
    }
    return SAPTrainer(changes.pop("model", model), arguments(tmp_path, **(args or {})), **{**given, **changes})


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def checkpointing() -> str:
    """Name the argument for checkpointing: releases of transformers changed it, and warn of the old one."""
    from transformers import TrainingArguments

    return next(n for n in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, n))
