"""Compiles Triton kernels for a GPU that need not be there, as the launchers would launch them."""

import functools
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from sap_fast.ops._library import launcher, launchers_on_cpu, raw_ops

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# KiB of shared memory that one block may use.
SHARED_LIMIT = {"sm_80": 163, "sm_86": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}


@dataclass(frozen=True)
class Compiled:
    """Holds one kernel as compiled, for one set of options.

    Attributes:
        shared: bytes of shared memory.
        local: bytes of local memory a thread.
        registers: a thread.
        assembly: PTX, or AMD's; empty if it was not compiled here but found in a cache.
        options: its constants and compilation options, by name.
    """

    name: str
    shared: int
    local: int
    registers: int
    assembly: str
    options: Mapping[str, Any]

    @property
    def products(self) -> set[str]:
        """Name the kinds of tensor-core instructions in the kernel."""
        kinds = {"wgmma": "wgmma.mma_async", "mma": "mma.sync", "tcgen05": "tcgen05.mma", "mfma": "v_mfma"}
        return {kind for kind, instruction in kinds.items() if instruction in self.assembly}

    def accesses(self, kind: str) -> Counter[int]:
        """Count the instructions of a kind, ``"ld"`` or ``"st"``, that go to global memory, by their width in bytes.

        Among the loads are the asynchronous ones, which go to shared memory.
        """
        found: Counter[int] = Counter()
        if kind == "ld":
            found.update(int(size, 0) for size in re.findall(r"cp\.async\.c[ag]\.[^;]*?\], (\w+)", self.assembly))
        pattern = rf"\b{kind}\.global(?:\.\w+(?:::\w+)*)*?(?:\.v(\d))?\.[busf](\d+)\b"
        for vector, bits in re.findall(pattern, self.assembly):
            found[int(vector or 1) * int(bits) // 8] += 1
        return found


class _Driver:
    """Stands for a GPU of one architecture; one device number for each, since kernels are kept by device."""

    def __init__(self, arch: str) -> None:
        from triton.backends.compiler import GPUTarget

        self.number = 1 + [*SHARED_LIMIT].index(arch)
        hip = arch.startswith("gfx")
        self.target = GPUTarget("hip", arch, 64) if hip else GPUTarget("cuda", int(arch[3:]), 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling(arch: str) -> Iterator[list[Compiled]]:
    """Let the raw ops on CPU tensors compile their kernels for ``arch`` and run none, within a block; collect them."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    found: dict[int, Compiled] = {}
    result: list[Compiled] = []

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        binary = run(kernel, *args, grid=grid, warmup=True, **options)
        if id(binary) not in found:
            found[id(binary)] = _read(kernel.__name__, binary, arch, options)
            result.append(found[id(binary)])

    run = JITFunction.run
    compile_runs = mock.patch.object(JITFunction, "run", compile_only)
    with launched_for(arch), compile_runs, mock.patch.object(driver, "_active", _Driver(arch)):
        yield result


@contextmanager
def launched_for(arch: str) -> Iterator[None]:
    """Let the raw ops on CPU tensors launch their kernels as on a GPU of an architecture, within a block."""
    with ExitStack() as patches:
        patches.enter_context(launchers_on_cpu())
        for module in {sys.modules[launcher(name).__module__] for name in raw_ops()}:
            patches.enter_context(mock.patch.object(module, "architecture", lambda device: arch))
        yield


def _read(name: str, binary: Any, arch: str, options: Mapping[str, Any]) -> Compiled:
    if arch.startswith("gfx"):
        text = binary.asm["amdgcn"]
        (local,) = map(int, re.findall(r"\.private_segment_fixed_size: (\d+)", text))
        (registers,) = map(int, re.findall(r"\.vgpr_count:\s+(\d+)", text))
        return Compiled(name, binary.metadata.shared, local, registers, text, options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.run([_cuobjdump(), "-res-usage", file.name], capture_output=True, text=True, check=True)
    (stack,) = map(int, re.findall(r"STACK:(\d+)", usage.stdout))
    (local,) = map(int, re.findall(r"LOCAL:(\d+)", usage.stdout))
    (registers,) = map(int, re.findall(r"REG:(\d+)", usage.stdout))
    # A cache that has travelled (``benchmarks/gpu/cache.py``) holds machine code alone.
    return Compiled(name, binary.metadata.shared, stack + local, registers, binary.asm.get("ptx", ""), options)


@functools.cache
def _cuobjdump() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
