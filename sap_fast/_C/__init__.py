"""Loads the C++ kernels for the CPU, if they were built: the module of ``csrc/`` for this processor's capability.

Loading registers them with the dispatcher, in front of the reference rules. ``status`` says what serves the CPU:
the module's name, or why there is none.
"""

import importlib
import json
import warnings
from pathlib import Path

import torch

__all__ = ["loaded", "status"]

# Modules that a capability can run, as torch names capabilities, best first.
_MODULES = {"AVX512": ("avx512", "avx2"), "AVX2": ("avx2",)}


def _load() -> tuple[bool, str]:
    folder = Path(__file__).parent
    capability = torch.backends.cpu.get_cpu_capability()
    names = [name for name in _MODULES.get(capability, ()) if list(folder.glob(f"{name}.*.so"))]
    if capability not in _MODULES:
        return False, f"no kernels for this processor, whose capability is {capability}"
    record = folder / "built_with.json"
    if not names or not record.exists():
        return False, "not built: pip install --no-build-isolation, where torch and a C++20 compiler are"
    built_with = json.loads(record.read_text(encoding="utf-8"))["torch"]
    if built_with != torch.__version__:
        # Not even tried: libraries of another release can load and then fail in any way.
        return False, f"built with torch {built_with}, but this is {torch.__version__}: install sap-fast again"
    try:
        importlib.import_module(f"sap_fast._C.{names[0]}")
    except (ImportError, OSError, RuntimeError) as error:
        return False, f"could not be loaded: {error}"
    return True, names[0]


loaded, status = _load()
if not loaded and (Path(__file__).parent / "built_with.json").exists():
    warnings.warn(f"sap_fast's C++ kernels: {status}. PyTorch reference rules serve the CPU.", stacklevel=2)
