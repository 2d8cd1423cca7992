"""What a reader of a profile has to know of how it was made."""

from collections.abc import Mapping
from typing import Any

import torch

from sap_fast.config import SAPConfig
from sap_fast.profiling.rounds import Measured


def notes(
    found: Measured,
    config: SAPConfig,
    settings: Mapping[str, Any],
    device: torch.device,
    profiled: float,
    busy: float,
) -> list[str]:
    """Sentences.

    Args:
        profiled: what the phases of SAP's step come to together, to its total.
        busy: the share of them in which the GPU was busy with kernels.
    """
    on_gpu, steps = device.type == "cuda", settings["steps"]
    said = [
        f"Whole steps: {steps} rounds after {settings['warmup']} of warm-up, in which the steps took turns on the same "
        "batches; nothing took note of phases. Ratios are taken round by round.",
        f"Phases: {steps} further rounds, one after each of these, timed by "
        f"{'events on the stream' if on_gpu else 'the clock'}; medians, which for SAP come to {profiled:.2f}x its "
        "whole step.",
        "A step moves its batch to the device, checks and packs it, computes the gradient, and steps AdamW over copies "
        "of the trained weights. Loading and tokenizing are not in it.",
        "Ops, bytes and FLOPs were counted in one further step, on the batches of median length: calls of ops without "
        "views and allocations (each of the library's counts one), what these read and wrote by their shapes, and "
        "their matrix products.",
    ]
    if on_gpu:
        said.append(
            "Kernels, and how long the GPU was busy with them, are from one step under torch's profiler. Peak memory "
            "is torch's max_memory_allocated."
        )
        said.append(
            f"The GPU was busy with kernels for {busy:.0%} of SAP's time. The rest it waited for launches and for the "
            "host, and larger batches would fill it."
        )
    else:
        said.append(
            "Peak memory is the process's highest resident set after each step's last warm-up round, in the order of "
            "the table; it does not come down again, so that only a rise says something of a step."
        )
    if settings["peak_flops"] or settings["bandwidth"]:
        said.append(
            "Times floor: a phase's time over the least that its own ops would take, the greater of FLOPs at the peak "
            "and bytes at the bandwidth given. Fused ops would move fewer bytes than are counted here."
        )
    if found.absent is None:
        said.append("In the step of transformers and PEFT, head and loss are part of the forward and backward pass.")
    else:
        said.append(f"The step of transformers and PEFT did not run, and is left out ({found.absent}).")
    if config.direction_min_cosine is not None:
        said.append("With direction_min_cosine directions may come more often than the average here has them.")
    if config.delayed_direction:
        said.append("Pairs run with the task: their share is within the dual phases, and advice on pairs is left out.")
    if steps < 5:
        said.append(f"{steps} rounds are few: the spread says little.")
    return said
