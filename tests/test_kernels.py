"""The contract of ``test_ops.py`` for the Triton kernels, in the dtypes that they serve.

It needs a GPU, or Triton's interpreter in a process of its own:

    TRITON_INTERPRET=1 pytest tests/test_kernels.py

There, products of bfloat16 tiles are products of what those tiles hold, widened (``on_cpu`` in ``conftest.py``): in
which order a tensor core adds them up is left to a GPU.
"""

from collections.abc import Callable

import pytest
import torch
from agreement import assert_agrees, error, scales
from triton_kernels import needs_kernels

from sap_fast.ops._cases import Case, OpCases, Problem, cases_for, derive, pose, run, split
from sap_fast.ops._tolerances import REORDERED, ROUNDINGS, TIMES, TIMES_OF_PRODUCTS, allowed

pytestmark = [
    *needs_kernels,
    pytest.mark.usefixtures("poisoned_memory"),
    # A sigmoid far out on its tail is 1 / (1 + inf) on any device; only NumPy, which interprets, remarks on it.
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
]
MODES = {"full": lambda pair: pair, "half": Problem.half, "single": Problem.single}

every_case = pytest.mark.parametrize(
    ("op", "case"),
    [pytest.param(op, case, id=f"{op.name}-{case.name}") for op, case in cases_for("contract", "tiles")],
)
every_dtype = pytest.mark.parametrize("dtype", ROUNDINGS, ids=["float32", "bfloat16"])


def generator(device: str) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


@pytest.mark.parametrize("mode", MODES)
@every_dtype
@every_case
def test_agrees_with_the_oracle(
    op: OpCases,
    case: Case,
    dtype: torch.dtype,
    mode: str,
    device: str,
    formula_in: Callable[[OpCases, Problem], dict[str, torch.Tensor]],
    record_property: Callable[[str, object], None],
) -> None:
    """Each mode agrees with the rules derived in float64, to what the same formula makes in this dtype.

    How far off each result is, of what is allowed, is recorded: approximate exponentials, roots and quotients of a GPU
    exceed that by little, a bug by much.
    """
    problem = MODES[mode](pose(op, case, generator(device), dtype))
    truth = derive(op, problem.to(torch.float64))
    # Operands of a tensor core are of the dtype of storage: they are rounded to it, as in the formula in that dtype.
    rounds_operands = bool(op.multiplies) and dtype == torch.bfloat16
    yardstick = (formula_in if rounds_operands else derive)(op, problem)
    times = TIMES_OF_PRODUCTS if rounds_operands else TIMES
    actual = run(op, problem)
    assert actual.keys() == truth.keys()
    off = {}
    for name, scale in scales(truth).items():
        most = allowed(error(yardstick[name], truth[name]), scale, dtype, times)
        off[name] = error(actual[name], truth[name]), most
    record_property("off", off)
    said = [f"{name} is off by {difference:.3g}; {most:.3g} is allowed" for name, (difference, most) in off.items()]
    assert all(difference <= most for difference, most in off.values()), "; ".join(said)


@every_case
def test_each_output_alone(op: OpCases, case: Case, device: str) -> None:
    """An output that no cotangent reaches counts as zero."""
    problem = pose(op, case, generator(device), torch.float32)
    for used in split(problem.cotangents, True):
        alone = {
            name: torch.stack([dy * (used == k) for k, dy in split({name: stack}, True).items()])
            for name, stack in problem.cotangents.items()
        }
        expected = run(op, Problem(problem.inputs, problem.constants, alone))
        assert_agrees(run(op, problem, used=[used]), expected)


@every_case
def test_strided_inputs(op: OpCases, case: Case, device: str) -> None:
    """Rows of a wider buffer, every other column, transposed: equal in every bit to contiguous ones."""
    pair = pose(op, case, generator(device), torch.float32)
    layouts = (
        lambda x: torch.nn.functional.pad(x, (1, 2))[..., 1:-2],
        lambda x: x.repeat_interleave(2, -1)[..., ::2],
        lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    )
    for problem in (pair, pair.single()):
        contiguous = run(op, problem)
        for layout in layouts:
            strided = run(op, problem.map(lambda name, x: layout(x)))  # noqa: B023
            # float32 sums of torch's own matrix products, which the ops call, depend on strides.
            assert_agrees(strided, contiguous, tolerance=REORDERED * torch.finfo(torch.float32).eps)


@every_case
def test_same_bits_again(op: OpCases, case: Case, device: str) -> None:
    problem = pose(op, case, generator(device), torch.float32)
    first, second = run(op, problem), run(op, problem)
    assert all(torch.equal(first[name], second[name]) for name in first)


@every_case
def test_writes_nothing_it_was_given(op: OpCases, case: Case, device: str) -> None:
    problem = pose(op, case, generator(device), torch.float32)
    copy = problem.map(lambda name, x: x.clone())
    run(op, problem)
    for before, after in ((copy.inputs, problem.inputs), (copy.cotangents, problem.cotangents)):
        assert all(torch.equal(before[name], after[name]) for name in before)
