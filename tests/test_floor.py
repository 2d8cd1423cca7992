"""The floor is what one computes by hand, and follows the steps that the library takes."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.floor import __main__ as floor
from benchmarks.floor.__main__ import Scenario, table
from benchmarks.floor.step import BatchShape, Device, Method, step_floor
from benchmarks.floor.work import Shape, Tokens, Work
from sap_fast import SAPConfig
from sap_fast.method.rhythm import Rhythm

LLAMA, H200 = floor.MODELS["llama-2-7b"], Device("H200", 790e12, 4.3e12)
SMALL = Shape(hidden=48, inner=80, layers=5, vocab=100, heads=4, kv_heads=2, head_dim=16)
BATCH = BatchShape(Tokens(60, 12, 25), Tokens(90, 15, 40), pair_count=3)


# By hand, for Llama-2-7B's shape: 60% of rows are real, 35% of a pair's tokens prompt, half of the task's labelled

HIDDEN, INNER, VOCAB, DEPTH, ABOVE = 4096, 11008, 32000, 32, 20
ROWS, REAL, PAIRS = 1280, 768, 0.6 * 4096
PACKED, LABELLED, LABELLED_PAIRS = PAIRS * (1 - 0.35 / 2), 384, 0.65 * PAIRS


def by_hand(
    *parts: tuple[float, float, float, float, float, float], head: float, fp8: tuple[float, float] = (0, 0)
) -> float:
    """Milliseconds on an H200, from counts of rows times the layers that they go through.

    Args:
        parts: how often it is done, length of the sequences, then primal rows forward and backward and tangent rows
            forward and backward, each times the layers they go through.
        head: rows through the head, forward and backward together.
        fp8: rows times layers of FP8, and how many times faster it is.
    """
    linear = 2 * (4 * HIDDEN**2 + 3 * HIDDEN * INNER)
    flops = 2 * HIDDEN * VOCAB * head
    moved = 0.0
    for times, length, forward, backward, forward_dot, backward_dot in parts:
        flops += times * linear * (forward + backward + forward_dot + backward_dot)
        flops += times * HIDDEN * (length + 1) * (2 * forward + 5 * backward + 4 * forward_dot + 10 * backward_dot)
        moved += times * 2 * (16 * HIDDEN + 3 * INNER) * (forward + forward_dot)
        moved += times * 2 * (24 * HIDDEN + 5 * INNER) * (backward + backward_dot)
    if fp8[0]:
        flops -= linear * fp8[0] * (1 - 1 / fp8[1])
    return 1e3 * (flops / 790e12 + moved / 4.3e12)


def contrast(rows: float, length: float = 0.6 * 256, times: float = 1.0) -> tuple[float, ...]:
    return times, length, DEPTH * rows, DEPTH * rows, 0, 0


def lagged(share: float = 1.0) -> tuple[float, ...]:
    return 1, 0.6 * 128, DEPTH * REAL, DEPTH * REAL, DEPTH * share * REAL, ABOVE * share * REAL


PASS, TO_PROBE = (1, 128, DEPTH * ROWS, DEPTH * ROWS, 0, 0), (1, 128, DEPTH * ROWS, ABOVE * ROWS, 0, 0)
PLAIN = (1, 0.6 * 128, DEPTH * REAL, DEPTH * REAL, 0, 0)
TANGENTS, OF_PAIRS = (DEPTH + ABOVE) * REAL, 2 * DEPTH * PACKED
# Each row's milliseconds, to a tenth and by hand.
EXPECTED: dict[str, tuple[float, float]] = {
    "A": (47.8, by_hand(PASS, head=2 * ROWS)),
    "A'": (28.4, by_hand(PLAIN, head=2 * LABELLED)),
    "B1": (163.4, by_hand(contrast(2048, 256), TO_PROBE, PASS, head=2 * 2048 + 4 * ROWS)),
    "B2": (240.2, by_hand(contrast(4096, 256), TO_PROBE, PASS, head=2 * 4096 + 4 * ROWS)),
    "B3": (279.0, by_hand(contrast(4096, 256), TO_PROBE, TO_PROBE, PASS, head=2 * 4096 + 6 * ROWS)),
    "F": (126.9, by_hand(contrast(PACKED), lagged(), head=2 * LABELLED_PAIRS + 4 * LABELLED)),
    "F'": (
        144.8,
        by_hand(
            contrast(PACKED),
            (1, 0.6 * 128, (DEPTH + ABOVE) * REAL, (ABOVE + DEPTH) * REAL, DEPTH * REAL, ABOVE * REAL),
            head=2 * LABELLED_PAIRS + 6 * LABELLED,
        ),
    ),
    "G": (70.3, by_hand(contrast(PACKED, times=1 / 4), lagged(), head=LABELLED_PAIRS / 2 + 4 * LABELLED)),
    "H": (109.7, by_hand(contrast(PACKED), lagged(1 / 4), head=2 * LABELLED_PAIRS + 2.5 * LABELLED)),
    "I": (53.0, by_hand(contrast(PACKED, times=1 / 4), lagged(1 / 4), head=LABELLED_PAIRS / 2 + 2.5 * LABELLED)),
    "J": (51.4, by_hand(lagged(), head=4 * LABELLED)),
    "L": (
        94.3,
        by_hand(contrast(PACKED), lagged(), head=2 * LABELLED_PAIRS + 4 * LABELLED, fp8=(OF_PAIRS + TANGENTS, 1.6)),
    ),
    "M": (70.3, by_hand(contrast(PACKED / 4), lagged(), head=LABELLED_PAIRS / 2 + 4 * LABELLED)),
    "N": (
        56.4,
        by_hand(
            contrast(PACKED, times=1 / 4),
            lagged(),
            head=LABELLED_PAIRS / 2 + 4 * LABELLED,
            fp8=(OF_PAIRS / 4 + TANGENTS, 1.6),
        ),
    ),
}


@pytest.mark.parametrize("letter", EXPECTED)
def test_llama_on_an_h200_is_as_by_hand_and_to_a_tenth_as_written(letter: str) -> None:
    stated, expected = EXPECTED[letter]
    found = table(LLAMA, H200, Scenario())[letter][1].ms
    assert found == pytest.approx(expected, rel=1e-12)
    assert round(found, 1) == stated


def test_the_table_without_padding_prompts_or_options_repeats_its_rows() -> None:
    same = Scenario(
        real=1, prompt=0, labelled=1, probe_every=1, direction_every=1, tangent_fraction=1, pairs_per_step=8, float8=1
    )
    ms = {letter: found.ms for letter, (_, found) in table(LLAMA, H200, same).items()}
    assert ms["A"] == ms["A'"]
    assert ms["C3"] == ms["F'"]
    assert all(ms[letter] == ms["C2"] for letter in "DEFGHILMNO")
    assert ms["J"] < ms["C1"] < ms["C2"] < ms["C3"]


# The methods


def work(name: str, batch: BatchShape = BATCH, shape: Shape = SMALL, **options: Any) -> Work:
    options = {"lowest_probe": 2, **options}
    return step_floor(shape, H200, batch, Method(name=name, **options)).work  # type: ignore[arg-type]


TASK_ALONE = BatchShape(BATCH.task)


@pytest.mark.parametrize("name", ["lagged", "fresh"])
@pytest.mark.parametrize(("probe_every", "direction_every"), [(1, 1), (1, 4), (4, 1), (4, 6), (3, 2), (8, 8)])
def test_work_is_the_mean_over_the_steps_that_the_library_takes(
    name: str, probe_every: int, direction_every: int
) -> None:
    config = SAPConfig(probe_every=probe_every, direction_every=direction_every)
    rhythm, steps, directions, probes = Rhythm.of(config), 96, 0, 0
    for _ in range(steps):
        directed = rhythm.finds_direction(config)
        directions, probes = directions + directed, probes + rhythm.finds_probe(config)
        rhythm = rhythm.after(directed=directed)
    guarded, plain = work(name, TASK_ALONE), work("sft", TASK_ALONE)
    direction = work(name).flops - guarded.flops
    expected = directions * direction + probes * guarded.flops + (steps - probes) * plain.flops
    found = work(name, probe_every=probe_every, direction_every=direction_every)
    assert found.flops == pytest.approx(expected / steps, rel=1e-12)


def test_a_fresh_step_spares_the_sequences_without_tangents_the_inner_pass() -> None:
    """It is counted by rows times layers, for probes from layer 2 of 0 to 4, 2 of which are above."""
    share, rows, linear = 0.25, BATCH.task.rows, 2 * SMALL.layer_weights
    inner = 2 * share * rows * (5 + 2)
    outer = rows * 2 + (1 - share) * rows * 3 + rows * 5
    found = work("fresh", TASK_ALONE, tangent_fraction=share)
    assert found.linear == pytest.approx(linear * (inner + outer))
    assert found.head == pytest.approx(2 * SMALL.head_weights * BATCH.task.head_rows * (4 * share + 2))


def test_methods_read_the_pairs_that_they_need() -> None:
    def of_pairs(name: str, **options: Any) -> float:
        return work(name, **options).head - work(name, TASK_ALONE, **options).head

    everything = 2 * 2 * SMALL.head_weights * 40
    assert of_pairs("sft") == 0
    for name in ("published", "literal", "lagged", "fresh"):
        assert of_pairs(name) == pytest.approx(everything)
    assert of_pairs("released") == pytest.approx(everything / 2)
    assert of_pairs("lagged", pairs_per_step=2) == pytest.approx(everything * 2 / 3)
    assert of_pairs("lagged", pairs_per_step=5) == pytest.approx(everything)  # there are 3


def test_the_lowest_probe_decides_how_far_the_second_half_goes_back() -> None:
    linear = 2 * SMALL.layer_weights * BATCH.task.rows
    for lowest, above in ((0, 4), (2, 2), (4, 0)):
        # Forward and backward of one half, forward of the other, and its backward above the probe.
        for name in ("lagged", "published"):
            found = work(name, TASK_ALONE, lowest_probe=lowest)
            assert found.linear == pytest.approx(linear * (5 + 5 + 5 + above))
    # The published step reads the weights in four traversals, the dual one in two and a little.
    assert work("published", TASK_ALONE).weights > 1.7 * work("lagged", TASK_ALONE).weights


def test_float8_spares_time_and_no_flops() -> None:
    plain, fast = work("lagged"), work("lagged", float8=2.0)
    assert fast.flops == plain.flops and plain.spared == 0
    of_pairs = plain.linear - work("lagged", TASK_ALONE).linear
    of_tangents = plain.linear - of_pairs - work("sft").linear
    assert fast.spared == pytest.approx((of_pairs + of_tangents) / 2)


# The time


def test_time_is_of_flops_or_of_bytes() -> None:
    found = step_floor(SMALL, Device("slow memory", 1e18, 1e9), BATCH, Method(name="sft"))
    assert found.ms == pytest.approx(found.bytes / 1e6)
    found = step_floor(SMALL, Device("slow products", 1e9, 1e18), BATCH, Method(name="sft"))
    assert found.ms == pytest.approx(found.flops / 1e6)
    both = step_floor(LLAMA, H200, BatchShape(Tokens(1024, 128)), Method(name="sft"))
    assert both.ms == both.matrix_ms + both.rowwise_ms > 1e3 * both.bytes / 4.3e12


def test_lora_takes_the_longer_of_its_flops_and_its_bytes() -> None:
    batch, ranks = BatchShape(Tokens(1024, 128)), (8, 16, 256, 512)
    ms = [step_floor(replace(LLAMA, rank=rank), H200, batch, Method(name="sft")).rowwise_ms for rank in ranks]
    assert ms[0] == ms[1] < ms[2]
    per_rank = 1024 * 32 * 6 * LLAMA.lora_widths / 790e9
    assert ms[3] - ms[2] == pytest.approx(256 * per_rank)


def test_bytes_follow_the_dtype() -> None:
    wide = work("lagged", shape=replace(SMALL, dtype_bytes=4))
    assert wide.bytes == 2 * work("lagged").bytes
    assert wide.flops == work("lagged").flops


# What is refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Device("d", -1.0, 1.0), "peak of a device must be positive"),
        (lambda: Device("d", 1.0, math.nan), "bandwidth of a device"),
        (lambda: Device("d", 1.0, math.inf), "bandwidth of a device"),
        (lambda: Method(name="sgd"), "name of a method"),  # type: ignore[arg-type]
        (lambda: Method(name="lagged", probe_every=0), "probe_every of a method"),
        (lambda: Method(name="lagged", pairs_per_step=0), "pairs_per_step of a method"),
        (lambda: Method(name="lagged", tangent_fraction=1.5), "tangent_fraction must be at most 1"),
        (lambda: Method(name="lagged", tangent_fraction=0), "tangent_fraction of a method"),
        (lambda: Method(name="lagged", float8=0.5), "float8 at least 1"),
        (lambda: Method(name="published", probe_every=2), r"\['probe_every'\] belong to .* lagged and fresh"),
        (
            lambda: work("lagged", lowest_probe=5),
            "lowest_probe of the method 'lagged' must be one of layers 0 to 4, .* is 5",
        ),
        (lambda: work("published", lowest_probe=-1), "lowest_probe"),
        (lambda: work("fresh", lowest_probe=None), "lowest_probe of the method 'fresh' .* is None"),
        (lambda: work("lagged", BatchShape(BATCH.task, BATCH.pairs), pairs_per_step=1), "pair_count"),
        (lambda: Scenario(real=1.2), "real must be more than 0 and at most 1, but is 1.2"),
        (lambda: Scenario(prompt=1), "prompt must be at least 0 and less than 1"),
        (lambda: Scenario(task=(0, 128)), "sequences of task"),
    ],
)
def test_refuses(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# The command


WIDTHS = ["--hidden", "48", "--inner", "80", "--layers", "5", "--vocab", "100", "--heads", "4"]


def test_the_command_prints_and_writes_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "floor.json"
    assert floor.main(["--json", str(path)]) == 0
    printed = capsys.readouterr().out
    rows = {row["row"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    assert rows.keys() == table(LLAMA, H200, Scenario()).keys() >= EXPECTED.keys()
    for letter, (stated, _) in EXPECTED.items():
        assert round(rows[letter]["floor_ms"], 1) == stated
        line = next(line for line in printed.splitlines() if line.split()[:1] == [letter])
        assert line.split()[-5] == f"{stated}"
    assert rows["F"]["over_A"] == pytest.approx(rows["F"]["floor_ms"] / rows["A"]["floor_ms"])
    assert rows["F"]["B2_over"] == pytest.approx(rows["B2"]["floor_ms"] / rows["F"]["floor_ms"])
    exact, plain = rows["F"]["floor_ms"], rows["A'"]["floor_ms"]
    assert rows["O"]["floor_ms"] == pytest.approx((exact + 7 * plain) / 8)


def test_the_command_takes_any_shape(tmp_path: Path) -> None:
    path = tmp_path / "floor.json"
    options = ["--kv-heads", "2", "--rank", "4", "--targets", "q_proj", "down_proj", "--dtype-bytes", "4"]
    data = ["--task", "4x64", "--pairs", "4x96", "--real", "0.5", "--prompt", "0.2", "--labelled", "0.9"]
    device = ["--device", "cpu", "--peak", "0.1", "--bandwidth", "20", "--lowest-probe", "3"]
    assert floor.main([*WIDTHS, *options, *data, *device, "--json", str(path)]) == 0
    result = json.loads(path.read_text(encoding="utf-8"))
    shape = Shape(
        hidden=48, inner=80, layers=5, vocab=100, heads=4, kv_heads=2, head_dim=12, rank=4, dtype_bytes=4,
        targets=("q_proj", "down_proj"),
    )  # fmt: skip
    scenario = Scenario(task=(4, 64), pairs=(4, 96), real=0.5, prompt=0.2, labelled=0.9, lowest_probe=3)
    assert result["rows"] == floor.as_rows(table(shape, Device("cpu", 0.1e12, 20e9), scenario))


@pytest.mark.parametrize("model", floor.MODELS)
def test_the_command_knows_models(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert floor.main(["--model", model]) == 0
    depth = floor.MODELS[model].layers
    assert f"lowest_probe={round(11 / 32 * depth)}," in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peak", "-1"], "peak of a device must be positive"),
        (["--bandwidth", "0"], "bandwidth of a device must be positive"),
        (["--lowest-probe", "32"], "lowest_probe .* must be one of layers 0 to 31"),
        (["--task", "10by128"], "give sequences x length, as in 10x128"),
        (["--pairs", "0x128"], "sequences of pairs"),
        (["--model", "smollm2-135m", "--hidden", "48"], "give --model, or widths without it"),
        (["--hidden", "48", "--heads", "4"], r"\['inner', 'layers', 'vocab'\] are missing"),
        ([*WIDTHS, "--layers", "0"], "layers of a shape"),
        ([*WIDTHS, "--heads", "0"], "heads of a shape"),
        (["--labelled", "0"], "labelled must be more than 0"),
        (["--targets", "wq"], "targets of LoRA must be some of"),
    ],
)
def test_the_command_refuses(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        floor.main(arguments)
    assert stopped.value.code == 2
    capture = capsys.readouterr()
    assert re.search(message, capture.err)
    assert not capture.out


def test_the_floor_is_arithmetic_alone() -> None:
    code = (
        "import sys, benchmarks.floor.__main__; assert not {'torch', 'transformers', 'sap_fast'} & sys.modules.keys()"
    )
    root = Path(floor.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
