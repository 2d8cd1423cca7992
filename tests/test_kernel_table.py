"""The table in ``sap_fast/ops/README.md`` is what its command writes, and big tensors are read by wide accesses."""

import pytest
from triton_kernels import INTERPRETED

from benchmarks import kernel_table
from benchmarks.kernel_table import BEGIN, END, PAGE, PROCESSORS, KernelRow, Launch
from sap_fast.ops._cases import every_op

pytestmark = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 leaves nothing to compile")

# Kernels that have accesses of less than 4 bytes to bfloat16 tensors, and why. Nothing else may.
NARROW = {
    # Two angles a thread: of 32 threads in a row of angles, which all heads of a token share. 5% of its bytes.
    ("rotary", "smollm2-135m", "ld"): 2,
}


# Kernels that write statistics or sums in float32 alone, or the most.
SMALL = {
    *(("linear_cross_entropy", "statistics_kernel"), ("attention", "delta_kernel")),
    *(("probe_rms_norm", "sum_kernel"), ("lora_linear", "outer_kernel")),
}


@pytest.fixture(scope="module")
def found() -> list[KernelRow]:
    return kernel_table.rows(op.name for op in every_op())


def test_the_page_has_the_table_that_the_command_makes(found: list[KernelRow]) -> None:
    """But for what differs between releases of Triton; ``python -m benchmarks.kernel_table --write`` mends it."""
    page = PAGE.read_text(encoding="utf-8")
    shown = page.partition(BEGIN)[2].partition(END)[0].strip().splitlines()
    assert kernel_table.structural(shown) == kernel_table.structural(kernel_table.lines(found))
    assert kernel_table.written(page, shown) == page


@pytest.mark.parametrize("kind", ["ld", "st"])
def test_tensors_are_accessed_by_16_bytes(found: list[KernelRow], kind: str) -> None:
    for row in found:
        widths = row.compiled.accesses(kind)
        name = row.op, row.model, kind
        # Rows' statistics and partial sums in float32 are all that these write, or the most of it.
        small = kind == "st" and (row.op, row.compiled.name) in SMALL
        assert small or 16 in widths, f"{name} {row.compiled.name}: {dict(widths)}"
        assert min(widths, default=16) >= NARROW.get(name, 4), f"{name} {row.compiled.name}: {dict(widths)}"
        # The rest is statistics and sums in float32, four bytes a row or a column: never most of what is moved.
        wide, all_ = widths[16] * 16, sum(width * count for width, count in widths.items())
        assert small or wide > 0.5 * all_, f"{name} {row.compiled.name}: {dict(widths)}"
    for op, model, narrow_kind in NARROW:  # none that is no more
        of_op = [row.compiled.accesses(narrow_kind) for row in found if (row.op, row.model) == (op, model)]
        assert min(min(widths) for widths in of_op) == NARROW[op, model, narrow_kind]


def test_what_is_predicted_of_few_programs() -> None:
    """They reach their share of the bandwidth alone."""
    launch = Launch("kernel", (PROCESSORS // 4, 2), 3 * 10**6, {})
    row = KernelRow("glu", "llama-2-7b", "forward", "full", (1, 1), [launch], [launch], None)  # type: ignore[arg-type]
    assert launch.programs == PROCESSORS // 2
    assert row.microseconds([launch], "H100") == pytest.approx(2.0)
    assert row.microseconds([launch._replace(grid=(PROCESSORS, 9))] * 2, "H100") == pytest.approx(2.0)
