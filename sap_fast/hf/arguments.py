"""Tells which of a trainer's arguments the step can honour; the others are refused by name, before any work is done."""

from typing import Any

import torch
from torch import nn

from sap_fast.model.read import base_model

# Optimizers that step inside backward, layer by layer: a step's gradient is only known as a whole.
_INSIDE_BACKWARD = ("lomo", "adalomo", "layerwise")


def check_arguments(args: Any, model: nn.Module) -> None:
    """Refuse ``transformers.TrainingArguments`` that a step would have to ignore.

    Raises:
        ValueError: naming the argument, and what to do instead.
    """
    if any(cls.__module__.partition(".")[0] == "trl" for cls in type(args).__mro__):
        raise ValueError(
            f"args is a trl {type(args).__name__}: trl's trainers are not supported yet; pass transformers' "
            "TrainingArguments, and max_length to SAPTrainer"
        )
    for name, why in _REFUSED.items():
        value = getattr(args, name, None)
        if value:  # an option left alone is None, False, 0 or empty
            raise ValueError(f"TrainingArguments({name}={value!r}) is not supported: {why}")
    if args.world_size > 1 or args.n_gpu > 1:
        devices = max(args.world_size, args.n_gpu)
        raise ValueError(
            f"{devices} devices: training on several is not supported yet; start one process and show it one device "
            "(CUDA_VISIBLE_DEVICES=0)"
        )
    optimizer = str(getattr(args.optim, "value", args.optim))
    if any(word in optimizer for word in _INSIDE_BACKWARD):
        raise ValueError(f"TrainingArguments(optim={optimizer!r}) is not supported: it steps inside backward")
    for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):  # by release of transformers
        if (getattr(args, name, None) or {}).get("offload"):
            raise ValueError("activation checkpointing with offload is not supported: the step keeps what it stores")
    weights = {p.dtype for p in base_model(model).parameters() if not p.requires_grad}
    if args.bf16 and torch.float32 in weights:
        raise ValueError(
            "TrainingArguments(bf16=True) with a float32 model: the step runs in the dtype of the model's weights, "
            "not under autocast. Load the model with dtype=torch.bfloat16 (its LoRA weights stay float32; on the "
            "command line --dtype bfloat16), or set bf16=False"
        )


_REFUSED = {
    "fp16": "float16 overflows in second derivatives; load the model with dtype=torch.bfloat16",
    "deepspeed": "DeepSpeed's backward runs the optimizer",
    "fsdp": "FSDP is not supported yet",
    "torch_compile": "the dual forward reads the model's modules; leave it off",
    "use_liger_kernel": "it replaces modules that the dual forward reads; leave it off",
    "neftune_noise_alpha": "its noise is added by a hook that the dual forward would not run",
    "label_smoothing_factor": "the loss is the plain mean of log-likelihoods",
    "resume_from_checkpoint": "exact resuming is not supported yet; start anew, or load the adapter",
    "debug": "its hooks would be bypassed",
}
