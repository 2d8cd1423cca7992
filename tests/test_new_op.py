"""An op owns itself: by its folder alone every test and benchmark of ops finds it, and the profiler counts it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# An op without a C++ kernel, whose map is linear, so that both halves and their cotangents are treated alike.
FILES = {
    "reference.py": """
from torch import Tensor


def primal(x: Tensor, factor: float) -> tuple[Tensor, ...]:
    return (factor * x,)
""",
    "__init__.py": """
import torch
from torch.autograd.function import once_differentiable

from sap_fast.dual import halves, stacked
from sap_fast.ops._library import Mode, define, row_wise, split_cotangent, stacked_cotangent
from sap_fast.ops.scaled_rows.reference import primal


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, x_dot, factor):
        ctx.set_materialize_grads(False)
        ctx.mode, ctx.factor = Mode.of(x_dot, ctx.needs_input_grad[0]), factor
        ctx.save_for_backward(x)
        y, y_dot = halves(torch.ops.sap_fast.scaled_rows(stacked(x, x_dot), factor))
        if ctx.mode is Mode.HALF:
            ctx.mark_non_differentiable(y)
        return y, y_dot

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dy_dot):
        dy = stacked_cotangent(ctx.mode, dy, dy_dot, *ctx.saved_tensors)
        return *split_cotangent(ctx.mode, torch.ops.sap_fast.scaled_rows_backward(dy, ctx.factor)), None


def scaled_rows(x, x_dot, factor):
    return _Scaled.apply(x, x_dot, factor)


def _rule(x, factor):
    return primal(x, factor)[0]


def _fake(x, factor):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


define("scaled_rows(Tensor x, float factor) -> Tensor", _rule, _fake, flops=row_wise)
define("scaled_rows_backward(Tensor dy, float factor) -> Tensor", _rule, _fake, flops=row_wise)
""",
    "cases.py": """
from sap_fast.ops._cases import STREAMED, Case, OpCases, Sizes, normal
from sap_fast.ops.scaled_rows import scaled_rows
from sap_fast.ops.scaled_rows.reference import primal


def _case(rows, d, purpose="contract"):
    return Case(f"{rows}x{d}", lambda rng: ({"x": normal(rng, 2, rows, d)}, {"factor": 0.75}), purpose)


CASES = OpCases(
    name="scaled_rows",
    outputs=("y",),
    call=lambda pairs, c: [scaled_rows(*pairs["x"], **c)],
    primal=lambda xs, c: primal(xs["x"], **c),
    cases=[_case(5, 7), _case(3, 64, "compile"), _case(9, 65, "bench")],
    sizes=Sizes(lambda w, rows, _: _case(rows, w.hidden), timed=STREAMED),
    typical="5x7",
)
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the op's folder, beside a plugin of pytest that makes it one of the library's."""
    folder = tmp_path_factory.mktemp("ops")
    (folder / "scaled_rows").mkdir()
    for name, text in FILES.items():
        (folder / "scaled_rows" / name).write_text(text, encoding="utf-8")
    plugin = f"import sap_fast.ops\n\nsap_fast.ops.__path__.append({str(folder)!r})\n"
    (folder / "with_scaled_rows.py").write_text(plugin, encoding="utf-8")
    return folder


def run_pytest(folder: Path, *arguments: str) -> str:
    """Run pytest in a process of its own, since an op once registered stays."""
    command = [sys.executable, "-m", "pytest", "-p", "with_scaled_rows", "-p", "no:cacheprovider", "-q", *arguments]
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_it_keeps_the_contract_is_counted_and_is_found_right_by_the_benchmarks(folder: Path) -> None:
    tests = ["tests/test_ops.py", "tests/test_profile_counts.py", "tests/test_benchmarks_gpu.py"]
    tests += ["tests/test_extension.py"]
    said = run_pytest(folder, *tests, "-k", "scaled_rows or raw_op or csrc")
    assert int(re.findall(r"(\d+) passed", said)[0]) > 20


def test_it_is_compiled_run_and_timed_where_ops_are(folder: Path) -> None:
    files = ["tests/test_kernels.py", "tests/test_compile.py", "tests/test_gpu.py", "benchmarks/ops/bench_ops.py"]
    files += ["benchmarks/ops/bench_cpu.py", *(f"benchmarks/gpu/{name}.py" for name in ("smoke", "variants", "ops"))]
    options = ["--collect-only", "-p", "benchmarks.gpu.reporter", "--size", "real", "-m", "", "-k", "scaled_rows"]
    said = run_pytest(folder, *files, *options)
    for file in files:
        assert f"{file}::" in said, said
    assert "smoke.py::test_op[scaled_rows-full-bfloat16-llama-2-7b-768]" in said
    assert "ops.py::test_op[scaled_rows llama-2-7b 16384 0 forward ours 1]" in said
    # Nobody has written its pair by hand.
    assert " eager " not in said and " compiled " not in said
