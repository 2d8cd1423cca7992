"""SmolLM2-135M-Instruct taught to refuse: where the demonstration starts.

The model as it ships hardly refuses anything, so fine-tuning has nothing to wear away. A small LoRA adapter, made by
``benchmarks/make_alignment.py`` from the package's own texts, is merged into it once; the result is kept in the user's
cache.
"""

import hashlib
from importlib.resources import as_file, files
from pathlib import Path

from sap_fast.atomic import make_once
from sap_fast.data.smollm2 import cache_dir, smollm2

_WEIGHTS = "adapter_model.safetensors"


def aligned_smollm2(cache: Path | None = None) -> Path:
    """Return the folder of the aligned model; make it, from the converted one and the adapter, if it is not there yet.

    Its name ends in the beginning of the adapter's SHA-256, so that another adapter is another model.

    Args:
        cache: where to keep it; the user's cache by default.

    Raises:
        FileNotFoundError, ModuleNotFoundError: as :func:`sap_fast.data.smollm2.smollm2`.
    """
    with as_file(files("sap_fast.data.alignment")) as adapter:
        digest = hashlib.sha256((adapter / _WEIGHTS).read_bytes()).hexdigest()[:8]
        folder = (cache or cache_dir()) / f"SmolLM2-135M-Instruct-aligned-{digest}"
        return make_once(folder, lambda scratch: _merge(smollm2(cache), adapter, scratch))


def _merge(base: Path, adapter: Path, folder: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    model.merge_and_unload().save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
