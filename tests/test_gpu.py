"""What only a GPU can show of the kernels: captured, compiled, without synchronisation, at sizes past 2^31 elements."""

from collections.abc import Callable

import pytest
import torch
from sync import forbidden_syncs
from torch import Tensor

from sap_fast.ops import attention, glu, rms_norm
from sap_fast.ops._cases import Case, OpCases, Problem, cases_for, duals_of, pose, run, split

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

every_op = pytest.mark.parametrize(
    ("op", "case"),
    [
        pytest.param(op, case, id=f"{op.name}-{case.name}")
        for op, case in cases_for("contract")
        if case.name == op.typical
    ],
)
assert {param.values[0].name for param in every_op.args[1]} == {op.name for op, _ in cases_for("contract")}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def posed(op: OpCases, case: Case, dtype: torch.dtype) -> Problem:
    return pose(op, case, torch.Generator("cuda").manual_seed(0), dtype)


@every_op
@DTYPES
def test_never_waits_for_the_device(op: OpCases, case: Case, dtype: torch.dtype) -> None:
    problem = posed(op, case, dtype)
    run(op, problem)  # the first call compiles
    with forbidden_syncs():
        for each in (problem, problem.half(), problem.single()):
            run(op, each)


@every_op
@DTYPES
def test_replays_as_a_graph(op: OpCases, case: Case, dtype: torch.dtype) -> None:
    """An op captured on one input and replayed on another is equal in every bit to eager."""
    problem = posed(op, case, dtype)
    static = problem.map(lambda name, x: x.clone())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(op, static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(op, static)
    for x in static.inputs.values():
        x.mul_(0.5)
    other = static.map(lambda name, x: x.clone())
    graph.replay()
    expected = run(op, other)
    assert all(torch.equal(captured[name], expected[name]) for name in expected)


@every_op
def test_compiles_without_a_graph_break(op: OpCases, case: Case) -> None:
    problem = posed(op, case, torch.float32)
    pairs = duals_of(split(problem.inputs, True))

    def forward() -> list:
        return [y for pair in op.call(pairs, problem.constants) for y in pair]

    with torch.no_grad():
        compiled = torch.compile(forward, fullgraph=True)()
        assert all(torch.equal(a, b) for a, b in zip(compiled, forward(), strict=True))


BIG = {
    "rms_norm": lambda x: rms_norm(x, None, torch.ones(x.shape[1], device="cuda"), eps=1e-5)[0],
    "glu": lambda x: glu(x, None, x, None, activation="silu")[0],
}


@pytest.mark.parametrize("call", BIG.values(), ids=BIG.keys())
def test_rows_past_2_to_the_31_elements(call: Callable[[Tensor], Tensor]) -> None:
    rows, width = 2**19 + 8, 4096
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free GPU memory")
    try:
        x = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
        found = call(x)[-8:]
    except torch.OutOfMemoryError:
        pytest.skip("needs 16 GiB of free GPU memory, which others have taken meanwhile")
    assert torch.equal(found, call(x[-8:].clone()))


def test_memory_of_attention_is_linear_in_the_sequence() -> None:
    """Forward and backward of one sequence, in tensors of q's size: 18 on an H200, whatever the length.

    Inputs and cotangents that are stacked (8), results (2) and gradients (6) make 16. One T x T matrix of each head
    would be 16 of 2k tokens, and 64 of 8k.
    """
    for length in (2048, 4096, 8192):
        lengths = torch.tensor([0, length], dtype=torch.int32, device="cuda")
        shape = (length, 8, 128)
        qkv = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(6)]
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        o, o_dot = attention(*qkv, lengths, max_seqlen=length, scale=128**-0.5)
        torch.autograd.grad([o, o_dot], qkv, [torch.ones_like(o), torch.ones_like(o)])
        tensors = (torch.cuda.max_memory_allocated() - before) / (qkv[0].numel() * qkv[0].element_size())
        assert tensors <= 20, (length, tensors)
        del o, o_dot, qkv
