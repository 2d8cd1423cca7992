"""Loads the C++ kernels for the CPU, if they were built: the module of ``csrc/`` for this processor and this torch.

Loading registers them with the dispatcher, in front of the reference rules. ``status`` says what serves the CPU:
the module's name, or why there is none.
"""

import re
import warnings
from importlib import import_module
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

__all__ = ["loaded", "status"]

# The modules that a capability can run, as torch names capabilities, best first.
_MODULES = {"AVX512": ("avx512", "avx2"), "AVX2": ("avx2",)}


def _load() -> tuple[bool, str]:
    """Load a module if there is one; return whether it is loaded, and its name or what is missing."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in _MODULES:
        return False, f"no kernels for this processor, whose capability is {capability}"
    folder, suffix = Path(__file__).parent, EXTENSION_SUFFIXES[0]
    release = re.sub(r"\W", "_", torch.__version__)
    built = sorted(path.name.removesuffix(suffix) for path in folder.glob(f"avx*{suffix}"))
    if not built:
        return False, "not built: pip install --no-build-isolation, where torch and a C++20 compiler are"
    # Modules of another release are not even tried: they can load, and then fail in any way.
    usable = [name for name in built if name.endswith(f"_{release}")]
    problem = f"built for another torch than {torch.__version__} ({', '.join(built)}): install sap-fast again"
    if usable:
        problem = f"built for another capability than {capability} ({', '.join(usable)}): install sap-fast again"
    for name in (f"{name}_{release}" for name in _MODULES[capability]):
        if name in usable:
            try:
                import_module(f"sap_fast._C.{name}")
                return True, name
            except (ImportError, OSError, RuntimeError) as error:
                problem = f"could not be loaded: {error}"
    warnings.warn(f"sap_fast's C++ kernels: {problem}. PyTorch reference rules serve the CPU.", stacklevel=2)
    return False, problem


loaded, status = _load()
