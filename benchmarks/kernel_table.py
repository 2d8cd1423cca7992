"""Tells what a kernel's reader would ask: bytes, widths of accesses, registers, programs, a prediction.

    python -m benchmarks.kernel_table [--write]

Kernels are compiled for sm_90 as their launchers launch them, which takes no GPU, for duals in bfloat16 at the widths
of two models. Bytes and grids are those of launches on tensors without memory. ``--write`` puts the table into
``sap_fast/ops/README.md``, between its marks.
"""

import argparse
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from benchmarks.common.compiled import Compiled, compiling, launched_for
from benchmarks.common.record import ROOT
from benchmarks.gpu.cases import smallest
from benchmarks.gpu.subjects import Subject, op_named, posed
from benchmarks.ops.contenders import PASSES, Recorder
from sap_fast.ops._cases import MANY, Problem, every_op, run
from sap_fast.ops._library import launcher

ARCH = "sm_90"
MODELS = ("llama-2-7b", "smollm2-135m")
FEW = 768
# What copies were seen to move, read and written, in bytes a second (NVIDIA H100 80GB HBM3, NVIDIA H200), and the
# multiprocessors of both.
BANDWIDTH, PROCESSORS = {"H100": 3.0e12, "H200": 4.3e12}, 132
# A dual whose primal half is not differentiated has another backward, beneath the lowest probe.
MODES: dict[str, Callable[[Problem], Problem]] = {"full": lambda dual: dual, "half": Problem.half}
PAGE = ROOT / "sap_fast/ops/README.md"
BEGIN, END = "<!-- made by benchmarks.kernel_table -->", "<!-- end -->"


class Launch(NamedTuple):
    """Holds a kernel's launch: its grid, bytes of all tensors that it is given, each counted once, and its options."""

    name: str
    grid: tuple[int, ...]
    bytes: int
    options: Mapping[str, Any]

    @property
    def programs(self) -> int:
        return math.prod(self.grid)


class KernelRow(NamedTuple):
    """Describes one kernel at the widths of one model, in one pass of one mode.

    ``must``: bytes that the raw op has to read and write at least, at ``FEW`` and ``MANY`` rows. ``few``, ``many``: the
    kernel's launches there.
    """

    op: str
    model: str
    pass_: str
    mode: str
    must: tuple[int, int]
    few: list[Launch]
    many: list[Launch]
    compiled: Compiled

    def microseconds(self, launches: Sequence[Launch], device: str) -> float:
        """The bytes by bandwidth, of which fewer programs than multiprocessors reach their share alone."""
        shares = (launch.bytes / min(1.0, launch.programs / PROCESSORS) for launch in launches)
        return 1e6 * sum(shares) / BANDWIDTH[device]


@contextmanager
def noted() -> Iterator[list[Launch]]:
    """Note launches within a block, in which nothing is compiled or run."""
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []

    def note(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append(Launch(kernel.__name__, tuple(grid), _bytes((args, options)), options))

    with mock.patch.object(JITFunction, "run", note):
        yield launches


def launches(subject: Subject, mode: str) -> dict[str, tuple[int, list[Launch]]]:
    """Return by pass the bytes that a raw op has to move, and its launches, on tensors without memory."""
    found: dict[str, tuple[int, list[Launch]]] = {}
    with launched_for(ARCH), FakeTensorMode(), noted() as seen:
        problem = MODES[mode](posed(subject, "cpu", torch.bfloat16))
        marks: list[int] = []

        def launching(name: str) -> Callable[..., Any]:
            def rule(*args: Any) -> Any:
                marks.append(len(seen))
                return launcher(name)(*args)

            return rule

        with Recorder(launching) as recorder:
            run(op_named(subject.op), problem)
        for pass_, call, start, end in zip(PASSES, recorder.calls, marks, [*marks[1:], len(seen)], strict=True):
            _, args, outputs = call
            found[pass_] = _bytes((args, outputs)), seen[start:end]
    return found


def _bytes(x: Any) -> int:
    """Count the bytes of all tensors in nested tuples, lists and dicts, each once."""
    tensors = {id(t): t for t in tree_leaves(x) if isinstance(t, Tensor)}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def rows(ops: Iterable[str], models: Iterable[str] = MODELS) -> list[KernelRow]:
    """Make the rows of some ops, in the order of launches."""
    found = []
    for op in ops:
        for model in models:
            for mode in MODES:
                found += _rows(op, model, mode)
    return found


def _rows(op: str, model: str, mode: str) -> list[KernelRow]:
    length = op_named(op).sizes.length
    few, many = (launches(Subject(op, model, count, length), mode) for count in (FEW, MANY))
    with compiling(ARCH) as kernels:
        subject = smallest(Subject(op, model, FEW, length))
        run(op_named(op), MODES[mode](posed(subject, "cpu", torch.bfloat16)))
    compiled = {_key(kernel.name, kernel.options): kernel for kernel in kernels}
    found = []
    for pass_ in PASSES:
        if mode == "half" and pass_ == "forward":
            continue  # that of full mode
        must = few[pass_][0], many[pass_][0]
        keys = dict.fromkeys(_key(launch.name, launch.options) for launch in few[pass_][1])
        for key in keys:
            of_key = [[x for x in each[pass_][1] if _key(x.name, x.options) == key] for each in (few, many)]
            found.append(KernelRow(op, model, pass_, mode, must, of_key[0], of_key[1], compiled[key]))
    return found


def _key(name: str, options: Mapping[str, Any]) -> tuple:
    """Return what tells a kernel from another, whatever the rows: how many parts a sum has follows from them."""
    options = {key: value for key, value in options.items() if key != "BLOCKS"}
    return name, tuple(sorted((key, str(value)) for key, value in options.items()))


def lines(found: Iterable[KernelRow]) -> list[str]:
    """Write the table in Markdown."""
    heads = ["op, pass", "kernel", "model", "must, MB", "given, MB", "programs", "loads, B", "stores, B", "registers"]
    heads += ["shared, KiB", "local, B", "H100, µs", "H200, µs"]
    text = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for row in found:
        kernel = row.compiled
        both = row.few, row.many
        cells = [f"{row.op} {row.pass_}" + (", half" if row.mode == "half" else ""), f"`{kernel.name}`", row.model]
        cells += [" / ".join(f"{size / 1e6:.3g}" for size in row.must)]
        cells += [" / ".join(f"{sum(launch.bytes for launch in each) / 1e6:.3g}" for each in both)]
        cells += [" / ".join(_programs(each) for each in both)]
        cells += [_widths(kernel.accesses(kind)) for kind in ("ld", "st")]
        cells += [str(kernel.registers), f"{kernel.shared / 1024:.3g}", str(kernel.local)]
        cells += [" / ".join(f"{row.microseconds(each, device):.3g}" for each in both) for device in BANDWIDTH]
        text.append(f"| {' | '.join(cells)} |")
    return text


def _programs(launches: Sequence[Launch]) -> str:
    """Write the programs of a launch; of several, as of the chunks of a head, how many there are."""
    return str(launches[0].programs) + (f" × {len(launches)}" if len(launches) > 1 else "")


def _widths(accesses: Mapping[int, int]) -> str:
    return ", ".join(map(str, sorted(accesses, reverse=True))) or "-"


def structural(table: Iterable[str]) -> list[str]:
    """Return, of the table's lines, the columns that no release of Triton changes."""
    return ["|".join(line.split("|")[1:7]) for line in table]


def written(page: str, table: Sequence[str]) -> str:
    """Return a page with the table between its marks."""
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return "\n".join([f"{head}{BEGIN}", "", *table, "", f"{END}{tail}"])


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, or write it; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_table", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.relative_to(ROOT)}")
    parser.add_argument("--ops", nargs="+", choices=[op.name for op in every_op()], help="some ops only")
    args = parser.parse_args(argv)
    if args.write and args.ops:
        parser.error("--write takes all ops; leave --ops out")
    table = lines(rows(args.ops or [op.name for op in every_op()]))
    print("\n".join(table))
    if args.write:
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), table), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
