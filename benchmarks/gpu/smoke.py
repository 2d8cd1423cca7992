"""The smoke: does every kernel run, is it right, at the widths of a real model; then whole steps of two layers.

Run by ``python -m benchmarks.gpu --part check``. The truth is float64: of an op the rules derived from its primal, of a
step the library's own step on a float64 copy, which runs no kernels and which the tests hold to transformers' model by
double backward. Each test records how far off each result is and how much is allowed, so that the rounding of a fast
exponential is told from a bug.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import sap_fast
from benchmarks.common import models
from benchmarks.gpu import subjects
from benchmarks.gpu.cases import DTYPES, MODES, SmokeCase, smoke_cases
from benchmarks.published.parts import trained
from benchmarks.step.bases import wake
from benchmarks.step.batches import PUBLISHED, Batch, rows
from sap_fast import SAPConfig
from sap_fast.ops._cases import derive, run
from sap_fast.ops._library import launchers_on_cpu
from sap_fast.ops._tolerances import OF_LARGEST, OF_NORM, TIMES_AT_WIDTH, allowed

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# Of a step: the loss; the gradient of each weight, of its norm, to which roundings add up over the layers
# (``step/check.py``); of the probe, which is another derivative, the cosine, by the bound of ``benchmarks.fidelity``.
LOSS_GATE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
GRADIENT_GATE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
LEAST_COSINE = {torch.float32: 0.99999, torch.bfloat16: 0.995}
LAYERS, VOCAB = 2, 4096

Recording = Callable[[str, object], None]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    size = metafunc.config.getoption("--size", None)
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", [] if size is None else smoke_cases(size), ids=str)


@pytest.fixture(autouse=True)
def fresh_memory() -> Iterator[None]:
    """Fill fresh memory with NaN, and serve a CPU's tensors by interpreted kernels where there is no GPU."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    with nullcontext() if CUDA else launchers_on_cpu():
        yield
    torch.use_deterministic_algorithms(False)


def test_op(case: SmokeCase, record_property: Recording) -> None:
    """Run forward and backward of an op through autograd, as a step calls it."""
    op, dtype = subjects.op_named(case.subject.op), DTYPES[case.dtype]
    problem = MODES[case.mode](subjects.posed(case.subject, DEVICE, dtype))
    truth = subjects.truth(op, problem)
    actual = run(op, problem)
    assert actual.keys() == truth.keys()
    if dtype == torch.float32:
        yardstick = derive(op, problem)
        off = {name: _by_element(actual[name], truth[name], yardstick[name]) for name in truth}
    else:
        off = {name: (_by_norm(actual[name], truth[name]), OF_NORM[dtype]) for name in truth}
        off |= {f"{name}, element": (_by_largest(actual[name], truth[name]), OF_LARGEST[dtype]) for name in truth}
    _judge(off, record_property)


def _by_element(actual: Tensor, truth: Tensor, yardstick: Tensor) -> tuple[float, float]:
    """Return the largest difference of two elements, and what is allowed of it."""
    error, usual = (float((x.double() - truth).abs().max()) for x in (actual, yardstick))
    return error, allowed(usual, float(truth.abs().max()), torch.float32, TIMES_AT_WIDTH)


def _by_largest(actual: Tensor, truth: Tensor) -> float:
    """Return the largest difference of two elements, of the largest element."""
    return float((actual.double() - truth).abs().max() / truth.abs().max())


def _by_norm(actual: Tensor, truth: Tensor) -> float:
    return float((actual.double() - truth).norm() / truth.norm())


def _judge(off: dict[str, tuple[float, float]], record_property: Recording) -> None:
    """Record error and allowance of each result, and see that none is beyond it; what is no number is."""
    record_property("off", off)
    beyond = {name: pair for name, pair in off.items() if not pair[0] <= pair[1]}
    said = ", ".join(f"{name} {error:.3g} ({error / most:.2f} x)" for name, (error, most) in beyond.items())
    assert not beyond, f"off by more than allowed: {said}"


# Smooth in the gradient: the sign of one that is nearly zero is rounding noise.
STEPS = {
    "lagged": SAPConfig(schedule="lagged", probe_update="normalised"),
    "fresh": SAPConfig(schedule="fresh", probe_update="normalised"),
    "captured": SAPConfig(schedule="lagged", probe_update="normalised", graph=True, check="deferred"),
}


@pytest.mark.parametrize(("name", "dtype"), [*((name, "bfloat16") for name in STEPS), ("lagged", "float32")])
def test_step(name: str, dtype: str, request: pytest.FixtureRequest, record_property: Recording) -> None:
    """Take three steps of a model of two layers: loss, gradients, and the probe that was found."""
    config, tiny = STEPS[name], request.config.getoption("--size") == "tiny"
    if config.graph and not CUDA:
        pytest.skip("CUDA graphs need a GPU")
    if tiny and dtype == "bfloat16":
        pytest.skip("Triton's interpreter does not multiply bfloat16 tiles")
    # Several run at once: of a whole vocabulary the float64 copies would not fit beside each other.
    base, tokenizer = models.tiny_base() if tiny else models.llama_base(LAYERS, vocab=VOCAB, dtype=DTYPES[dtype])
    model = models.with_lora(base, seed=0).to(DEVICE)
    wake(model)
    # The truth is at the weights as they are stored.
    exact = models.twin(model, torch.float64).double()
    given = _tiny_batches() if tiny else _batches(tokenizer)
    config = config.replace(probe_layers=(LAYERS - 2,), strength=0.05)
    found = _steps(model, *given, config)
    truth = _steps(exact, *given, config.replace(graph=False, check="now"))
    off = {}
    for i, (step, expected) in enumerate(zip(found, truth, strict=True), 1):
        off[f"loss {i}"] = abs(step.loss / expected.loss - 1), LOSS_GATE[DTYPES[dtype]]
        worst = max(_by_norm(step.gradients[name], g) for name, g in expected.gradients.items())
        off[f"worst gradient {i}"] = worst, GRADIENT_GATE[DTYPES[dtype]]
        cosine = torch.cosine_similarity(step.probe.double(), expected.probe.double(), dim=0)
        off[f"probe {i}, 1 - cosine"] = 1 - float(cosine), 1 - LEAST_COSINE[DTYPES[dtype]]
    _judge(off, record_property)


def _batches(tokenizer: Any) -> tuple[Batch, Batch]:
    """Make a task batch and pairs of the published sizes."""
    given = rows(tokenizer, models.examples(None), PUBLISHED, "real", DEVICE)
    return given.batch, given.pairs


def _tiny_batches() -> tuple[Batch, Batch]:
    """Make as few tokens as there is anything to compute on: the interpreter takes its time for each."""
    ids = torch.randint(3, 100, (2, 5))
    ids[1, :2] = ids[0, :2]
    labels = ids.clone()
    labels[:, :2] = -100
    return {"input_ids": ids[:1], "labels": labels[:1]}, {"input_ids": ids, "labels": labels}


class Found(NamedTuple):
    """Holds what a step has found: the gradients of all adapters by name, ``probe [m]`` of all layers."""

    loss: float
    gradients: dict[str, Tensor]
    probe: Tensor


def _steps(model: nn.Module, batch: Batch, pairs: Batch, config: SAPConfig) -> list[Found]:
    """Take three steps without an optimizer; the third of a captured one replays what the second has recorded."""
    weights, found = trained(model), []
    with sap_fast.attach(model, config) as sap:
        for _ in range(3):
            model.zero_grad()
            report = sap.step(batch, pairs)
            gradients = {name: p.grad for name, p in weights.items()}
            found.append(Found(float(report.loss), gradients, torch.cat([*sap.probe.values()])))
    return found
