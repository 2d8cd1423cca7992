"""Tells what a reader needs to place a number, and who serves which operation."""

import platform
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sap_fast import _C
from sap_fast._version import __version__
from sap_fast.model.attention_backends import Heads, choose, machine_of
from sap_fast.ops._library import architecture

_PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "numpy")
_OPTIONAL = ("trl", "datasets", "flash-attn", "liger-kernel")


def environment(device: torch.device) -> dict[str, Any]:
    """Return the device, the versions and the threads, by name."""
    packages = {name: found for name in _PACKAGES if (found := package_version(name))}
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "sap-fast": __version__,
        **packages,
    }


def device_name(device: torch.device) -> str:
    """Return what a device is called by its maker."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def package_version(name: str) -> str | None:
    """Return the installed release of a package, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def optional_versions() -> dict[str, str]:
    """The releases of the packages that are used where they are there."""
    return {name: package_version(name) or "not installed" for name in _OPTIONAL}


def devices() -> list[str]:
    """Name every device that torch can use here."""
    kernels = f"C++ kernels {_C.status}" if _C.loaded else f"no C++ kernels ({_C.status})"
    cpu = f"cpu: {device_name(torch.device('cpu'))}, {torch.get_num_threads()} threads, {kernels}"
    gpus = []
    for i in range(torch.cuda.device_count()):
        table = architecture(torch.device("cuda", i))
        note = f"kernels configured for {table}" if table else "no kernels for it: PyTorch reference rules"
        gpus.append(f"cuda:{i}: {torch.cuda.get_device_name(i)}, {note}")
    return [cpu, *gpus]


def backends() -> dict[str, dict[str, str]]:
    """Tell by operation what serves it on each kind of device: a kernel of its own, or the PyTorch reference."""
    import_module("sap_fast.ops")  # which defines them
    found = {}
    for name in sorted(torch._C._dispatch_get_all_op_names()):
        library, _, op = name.partition("::")
        if library == "sap_fast":
            own = {key: torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for key in ("CPU", "CUDA")}
            found[op] = {
                "cpu": "C++ kernel" if own["CPU"] else "PyTorch reference",
                "cuda": "Triton kernel" if own["CUDA"] else "PyTorch reference",
            }
    return found


def attention_backends() -> list[str]:
    """Tell what serves attention in each kind of pass, and why the others do not."""
    heads = Heads(torch.bfloat16, 128)
    lines = ["dual passes, everywhere: own, since no other backend knows tangents"]
    for device in [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]:
        choice = choose("auto", machine_of(device, heads), heads)
        lines.append(f"ordinary passes, {device}, {heads}: {choice.backend}, {choice.because}")
        lines += [f"  not {name}: {why}" for name, why in choice.others.items()]
    return [*lines, "ordinary passes, float32 and float64: own"]
