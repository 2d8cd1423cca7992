"""A whole step by every contender on a tiny model, and by some on SmolLM2 where its converted files lie in the cache.

    pytest benchmarks/step/bench_step.py -k "smollm2 and lagged"

Each is compared with float64 autograd before it is timed; ``--benchmark-disable`` does that alone. For contenders in
turns, in both orders, as a comparison wants them, there is ``python -m benchmarks.step``.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn

from benchmarks.common import models
from benchmarks.common.ceiling import Ceiling
from benchmarks.ops.bench_ops import CUDA, DEVICE, DTYPE, clock
from benchmarks.ops.peers import AbsentError
from benchmarks.step.bases import wake
from benchmarks.step.batches import SMALL, Given, lengths, rows
from benchmarks.step.check import Exact, check
from benchmarks.step.contenders import CONTENDERS
from benchmarks.step.own_floor import contender_floor
from benchmarks.step.rounds import run_period
from sap_fast.data.smollm2 import cache_dir

ROUNDS = {"tiny": 9, "smollm2": 30 if CUDA else 3}
ON_SMOLLM2 = ("tidy", "plain-sft", "own-sft", "lagged")
CASES = [("tiny", name) for name in CONTENDERS] + [("smollm2", name) for name in ON_SMOLLM2]
SMOLLM2 = cache_dir() / "SmolLM2-135M-Instruct"

pytestmark = pytest.mark.benchmark(timer=clock, disable_gc=True)


class Ground(NamedTuple):
    """Holds what all contenders on one model share."""

    model: nn.Module
    given: Given
    exact: Exact
    ceiling: Ceiling


@pytest.fixture(scope="module")
def grounds() -> Iterator[dict[str, Ground]]:
    """Keep grounds by model, made when first asked for."""
    yield {}


def ground(grounds: dict[str, Ground], name: str) -> Ground:
    if name not in grounds:
        if name == "smollm2" and not SMOLLM2.exists():
            pytest.skip("SmolLM2's converted files are not in the cache: make demo puts them there")
        base, tokenizer = models.tiny_base() if name == "tiny" else models.smollm2_base(SMOLLM2)
        model = models.with_lora(base).to(DEVICE)
        wake(model)
        model = models.twin(model, DTYPE)
        given = rows(tokenizer, models.examples(), SMALL, "real", DEVICE)
        grounds[name] = Ground(model, given, Exact(model), Ceiling(DEVICE, DTYPE))
    return grounds[name]


@pytest.mark.parametrize(("model_name", "name"), CASES, ids=[f"{model}-{name}" for model, name in CASES])
def test_step(benchmark: BenchmarkFixture, grounds: dict[str, Any], model_name: str, name: str) -> None:
    model, given, exact, ceiling = ground(grounds, model_name)
    contender, own = CONTENDERS[name], models.twin(model)
    try:
        with contender.opened(own, given) as run:
            check(name, own, run, exact)
            if run.settle is not None:
                run.settle()
            ceiling.visit()
            benchmark.group = f"step, {model_name}"
            period = partial(run_period, run, contender.period)
            benchmark.pedantic(period, rounds=ROUNDS[model_name], warmup_rounds=1)
            floor = contender_floor(contender, run, given, own, ceiling.device)
    except AbsentError as error:
        pytest.skip(str(error))
    info = benchmark.extra_info
    info["device"], info["threads"] = (torch.cuda.get_device_name() if CUDA else "cpu"), torch.get_num_threads()
    info["dtype"], info["torch"] = str(DTYPE), torch.__version__
    info["steps in a round"], info["task tokens"] = contender.period, sum(lengths(given.batch))
    info["floor ms"] = floor.ms
    if benchmark.stats is not None:  # not with --benchmark-disable
        seconds = benchmark.stats.stats.median / contender.period
        info["ms a step"], info["times its floor"] = 1e3 * seconds, 1e3 * seconds / floor.ms
        info["TFLOP/s"] = floor.flops / seconds / 1e12
