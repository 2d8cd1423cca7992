"""The scaling runs measure what they say, once a point, and draw it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from test_benchmarks import read

from benchmarks import scaling
from benchmarks.common import ceiling, models
from benchmarks.common.line_chart import Panel, figure
from benchmarks.step import peers, scaling_points
from benchmarks.step.batches import Given
from benchmarks.step.contenders import CONTENDERS, Contender
from benchmarks.step.run import Run
from benchmarks.step.scaling_points import FULL, SMALL, TARGETS, Point, points, random_rows, spread
from sap_fast.batch.rows import pack, pack_pairs

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceiling, "MATRIX", {"cpu": 64})
    monkeypatch.setattr(ceiling, "COPIED", {"cpu": 2**16})


# The command


def test_every_axis_has_its_rows_and_its_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "result.json"
    sizes = ["--tokens", "128", "256", "--lengths", "16", "128", "--probes", "1", "99"]
    assert scaling.main(["--model", "tiny", *sizes, "--rounds", "1", "--json", str(path)]) == 0
    result, said = read(path), capsys.readouterr().out.splitlines()
    assert len(said) == len(result["rows"]) + 1 == 28
    by_axis = {axis: [row for row in result["rows"] if row["axis"] == axis] for axis in scaling_points.AXES}
    assert [len(rows) for rows in by_axis.values()] == [6, 6, 6, 9]
    assert [row["tokens"] for row in by_axis["tokens"]] == [128] * 3 + [256] * 3
    assert [row["length"] for row in by_axis["length"]] == [16] * 3 + [128] * 3
    assert [row["probes"] for row in by_axis["probes"]] == [1] * 3 + [4] * 3  # all there are
    assert [len(row["targets"]) for row in by_axis["targets"]] == [2] * 3 + [4] * 3 + [7] * 3
    for row in result["rows"]:
        assert row["us_per_token"] == pytest.approx(1e3 * row["ms"] / row["tokens"])
        assert row["ms_over_floor"] == pytest.approx(row["ms"] / row["floor_ms"])
        assert row["peak_memory"] > row["bytes_per_token"] * row["tokens"] > 0
    # A point on several axes is the same measurement.
    shared = [by_axis["tokens"][:3], by_axis["length"][3:], by_axis["probes"][:3], by_axis["targets"][:3]]
    assert len({tuple(row["ms"] for row in rows) for rows in shared}) == 1
    # Pairs stay, so that the lagged step needs less for each token the more there are; own steps nearly as much.
    memory = {(row["contender"], row["tokens"]): row["bytes_per_token"] for row in by_axis["tokens"]}
    assert memory["lagged", 256] < 0.6 * memory["lagged", 128]
    assert memory["own-sft", 256] == pytest.approx(memory["own-sft", 128], rel=0.1)
    for axis in scaling_points.AXES:
        root = ElementTree.fromstring((tmp_path / f"result-{axis}.svg").read_text())
        assert len(root.findall(f".//{SVG}polyline")) == 6  # three lines of time, three of memory
    assert not result["refused"] and result["settings"]["ranges"]["lengths"] == [16, 128]


def test_a_wrong_contender_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong contender is refused by its name, and the others are measured."""

    @contextmanager
    def wrong(model: torch.nn.Module, given: Given) -> Iterator[Run]:
        with peers.plain(model, given) as run:
            yield replace(run, step=lambda: 1.5 * run.step())

    monkeypatch.setitem(CONTENDERS, "own-sft", Contender(wrong))
    path = tmp_path / "result.json"
    arguments = ["--model", "tiny", "--axes", "tokens", "--tokens", "128", "--rounds", "1", "--json", str(path)]
    assert scaling.main(arguments) == 1
    result = read(path)
    assert [row["contender"] for row in result["rows"]] == ["plain-sft", "lagged"]
    (refused,) = result["refused"]
    assert (refused["contender"], refused["probes"]) == ("own-sft", 1)
    assert refused["reason"] == "own-sft, step 1: the loss is off by 0.5 of itself"


def test_a_size_without_memory_has_a_row_without_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    base = models.tiny_base()[0].requires_grad_(False)
    bench = scaling.Bench(base, "cpu", "float32", 1, (1, 16), False)
    point = Point(32, 16, 1, TARGETS[0])

    def full(model: torch.nn.Module, given: object) -> object:
        raise torch.OutOfMemoryError

    right = bench._checked(bench._adapted(point.targets), point)
    right["plain-sft"] = Contender(full)
    found = {row["contender"]: row for row in bench.measure(point)}
    assert found["plain-sft"]["ms"] is None and found["own-sft"]["ms"] > 0
    assert found["own-sft"]["ratio_to_plain_sft"] is None
    assert scaling.line({"axis": "tokens", **found["plain-sft"]}).endswith("out of memory")
    drawn = ElementTree.fromstring(scaling.drawing([{"axis": "tokens", **row} for row in found.values()], "tokens"))
    assert len(drawn.findall(f".//{SVG}title")) == 4


def test_sizes_that_make_no_sense_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = {
        "--tokens must be multiples of 128, but there is 100": ["--tokens", "100"],
        "--lengths must be at least 2 and divide 100, but there is 30": ["--lengths", "30", "100"],
        "--probes must be at least 1": ["--probes", "0"],
        "--rounds must be at least 1": ["--rounds", "0"],
        "a smaller model": ["--model", "llama-2-7b"],
    }
    for reason, arguments in wrong.items():
        with pytest.raises(SystemExit, match="2"):
            scaling.main([*arguments, "--json", str(tmp_path / "result.json")])
        assert reason in capsys.readouterr().err


# Points and rows


def test_the_full_ranges_go_from_end_to_end() -> None:
    assert (FULL.tokens[0], FULL.tokens[-1], FULL.lengths[0], FULL.lengths[-1]) == (256, 32 * 1024, 128, 8 * 1024)
    for ranges in (FULL, SMALL):
        assert ranges.replaced(None, None, None) == ranges
        probes = [point.probes for point in points("probes", ranges, 32)]
        assert (probes[0], probes[-1]) == (1, 32)
        assert [len(point.targets) for point in points("targets", ranges, 32)] == [2, 4, 7]
        everywhere = [point for axis in scaling_points.AXES for point in points(axis, ranges, 8)]
        assert all(point.tokens % point.length == 0 for point in everywhere)


def test_probes_spread_evenly() -> None:
    assert [spread(n, 8) for n in (1, 2, 8, 99)] == [(4,), (2, 6), tuple(range(8)), tuple(range(8))]
    for depth in (2, 7, 30, 32):
        for count in range(1, depth + 1):
            layers = spread(count, depth)
            assert len({*layers}) == count and layers[-1] < depth


def test_random_rows_are_full_and_half_scored() -> None:
    given = random_rows(500, 3, 10, 2, 8, "cpu")
    assert (given.batch["input_ids"].shape, given.pairs["input_ids"].shape) == ((3, 10), (4, 8))
    sizes = {"vocab_size": 500, "device": torch.device("cpu")}
    assert (pack(given.batch, **sizes).scored, pack_pairs(given.pairs, **sizes).scored) == (15, 16)
    chosen, rejected = given.pairs["input_ids"].chunk(2)
    assert torch.equal(chosen[:, :4], rejected[:, :4]) and not torch.equal(chosen[:, 4:], rejected[:, 4:])


# Charts


def test_a_chart_places_points_by_their_logarithm() -> None:
    drawn = figure([Panel("title <1>", "x", "y", {"a": [(1, 0.0), (10, 30.0), (100, 61.0)], "b": []})])
    root = ElementTree.fromstring(drawn)
    line = root.find(f".//{SVG}polyline")
    assert line is not None
    (x0, y0), (x1, y1), (x2, y2) = (tuple(map(float, point.split(","))) for point in line.get("points", "").split())
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    # Its axis ends at 80: places are rounded to a tenth of a pixel.
    assert (y0 - y2) / (y0 - y1) == pytest.approx(61 / 30, abs=0.01)
    said = {text.text for text in root.iter(f"{SVG}text")}
    assert {"title <1>", "0", "20", "80", "10", "100", "a", "b"} <= said
    inside = [float(p) for mark in root.iter(f"{SVG}circle") for p in (mark.get("cx", ""), mark.get("cy", ""))]
    assert all(0 < p < 380 for p in inside)


def test_a_chart_places_names_in_order() -> None:
    root = ElementTree.fromstring(figure([Panel("t", "x", "y", {"a": [("q, v", 1.0), ("all", 1.0)]})] * 2))
    places = [line.get("points", "").split() for line in root.iter(f"{SVG}polyline")]
    assert len(places) == 2 and places[0] == places[1]
    assert [float(p.split(",")[0]) for p in places[0]] == sorted(float(p.split(",")[0]) for p in places[0])


def test_a_figure_that_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a panel"):
        figure([])
    with pytest.raises(ValueError, match="room for 4 lines"):
        figure([Panel("t", "x", "y", {str(i): [] for i in range(5)})])
    assert ElementTree.fromstring(figure([Panel("t", "x", "y", {})])).tag == f"{SVG}svg"
