"""What the pages show runs as it stands, but for the model's folder; their figures are those of the recorded runs."""

import importlib.util
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from chat import save_chat_model

from sap_fast.cli.main import main
from sap_fast.data import read_table
from sap_fast.data.files import Table
from sap_fast.data.formats import read_pairs, read_task

README = Path(__file__).parents[1] / "README.md"
EVIDENCE = README.parent / "benchmarks" / "README.md"
DATA = README.parent / "sap_fast" / "data" / "README.md"
RESULTS = EVIDENCE.parent / "results"
MODEL = "path/to/a/chat/model"


def blocks(page: Path, language: str) -> list[tuple[str, str]]:
    """``(what follows the language, content)`` of a page's code blocks."""
    return re.findall(rf"```{language}\b *([^\n]*)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def recorded(name: str) -> Any:
    """Find the run that the page of evidence names, of those whose names begin so."""
    named = set(re.findall(rf"benchmarks/results/({name}[\w.-]*\.json)", EVIDENCE.read_text(encoding="utf-8")))
    assert len(named) == 1, named
    return json.loads((RESULTS / named.pop()).read_text())


def anchors(page: Path) -> list[str]:
    """List what links to headings of a page end with: words in small letters, hyphens between them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder with everything that the pages name."""
    save_chat_model(tmp_path / MODEL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks.jsonl").write_text(blocks(DATA, "jsonl")[0][1])
    pairs = "".join(content for kind, content in blocks(DATA, "jsonl") if kind == "pairs")
    (tmp_path / "pairs.jsonl").write_text(pairs.splitlines()[0])
    (tmp_path / "held_out.jsonl").write_text(pairs.splitlines()[0])
    (settings,) = (content for _, content in blocks(DATA, "yaml"))
    (tmp_path / "run.yaml").write_text(settings)
    return tmp_path


@pytest.mark.parametrize("number", range(len(blocks(README, "python"))))
def test_the_python_examples_run(here: Path, capsys: Any, number: int) -> None:
    code = blocks(README, "python")[number][1]
    assert MODEL in code
    exec(compile(code, str(README), "exec"), {})
    printed = capsys.readouterr().out
    if "attach" in code:
        pattern = r"loss \d+\.\d+  margin [+-]\d+\.\d+  steering [+-]\d+\.\d+"
        assert [bool(re.fullmatch(pattern, line)) for line in printed.splitlines()] == [True] * 3
        assert "adapter_model.safetensors" in os.listdir("adapter")
    else:
        assert all(key in printed for key in re.findall(r"sap/\w+", code))
        assert "adapter_model.safetensors" in os.listdir("runs/trainer/adapter")


@pytest.mark.parametrize("page", [README, DATA], ids=["README", "data"])
def test_the_commands_run(here: Path, capsys: Any, page: Path) -> None:
    lines = [line for _, content in blocks(page, "sh") for line in content.splitlines()]
    assert lines
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "sap-fast"
        assert main(arguments) == 0, capsys.readouterr().err


def test_the_formats_are_read(tmp_path: Path) -> None:
    def read_tasks(table: Table) -> list:
        return [read_task(place, row) for place, row in table.items()]

    readers = {"tasks": read_tasks, "pairs": read_pairs, "look_alikes": len}
    found = blocks(DATA, "jsonl")
    assert {kind for kind, _ in found} == readers.keys()
    for kind, content in found:
        (tmp_path / "x.jsonl").write_text(content)
        assert readers[kind](read_table(tmp_path / "x.jsonl"))


def test_the_page_is_short_and_shows_code_early() -> None:
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 160
    assert "```python" in lines[:40]


PAGES = pytest.mark.parametrize("page", [README, EVIDENCE], ids=["README", "evidence"])


@PAGES
def test_the_make_targets_are_there(page: Path) -> None:
    makefile = (README.parent / "Makefile").read_text()
    targets = re.findall(r"(?:^|`)make (\w[\w-]*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@PAGES
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    relative = [link for link in links if not re.match(r"https?:", link)]
    assert relative
    for link in relative:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@PAGES
def test_the_named_runs_are_there(page: Path) -> None:
    named = re.findall(r"benchmarks/results/([\w.-]*\w)", page.read_text(encoding="utf-8"))
    assert [name for name in named if not (RESULTS / name).is_file()] == []
    assert named or page == README


def test_the_commands_of_the_evidence_are_there() -> None:
    modules = set(re.findall(r"python -m (benchmarks[\w.]*\w)", EVIDENCE.read_text(encoding="utf-8")))
    assert modules
    for module in modules:
        assert importlib.util.find_spec(module), module


def test_the_figures_are_those_of_the_results() -> None:
    """The tables' dual and published rows, cell by cell, against the runs that the page names."""
    text = EVIDENCE.read_text(encoding="utf-8")
    rows = [row for row in recorded("fidelity-cpu")["rows"] if row["truth"] == "float32 weights"]
    for start, gradient, dtype, radius in (
        ("| **finite difference, bfloat16, 2e-5", "finite difference", "bfloat16", 2e-5),
        ("| **dual batch, bfloat16", "dual", "bfloat16", None),
        ("| dual batch, float32", "dual", "float32", None),
    ):
        (line,) = [line for line in text.splitlines() if line.startswith(start)]
        wanted = [row for row in rows if (row["gradient"], row["dtype"], row["radius"]) == (gradient, dtype, radius)]
        cells = [f"{row['cosine']:.3f} ({row['length_ratio']:.3g}×)" for row in wanted]
        assert [cell.strip().replace("**", "") for cell in line.split("|")[2:-1]] == cells
    for row in recorded("steering-cpu")["rows"]:
        assert re.search(rf"\| {row['strength']:g} \| {row['task_loss']:.3f} \| \{row['slope_change']:+.3f}", text)


def test_speed_on_the_cpu_is_that_of_the_recorded_runs() -> None:
    text = EVIDENCE.read_text(encoding="utf-8")
    step, ops = recorded("step-cpu-float32"), recorded("ops-cpu")
    for row in step["rows"]:
        ratios = f"{row['ratio_to_plain_sft']:.2f} | {row['ratio_to_published_tidy']:.2f}"
        rest = f"{row['peak_memory'] / 2**30:.2f} GiB | {row['ms_over_floor']:.2f} | {row['launches']:g} |"
        assert f"| {row['ms'] / 1e3:.2f} s | {ratios} | {rest}" in text
    (lagged,) = (row for row in step["rows"] if row["contender"] == "lagged")
    tokens = [lagged["task_tokens"], lagged["task_rows"], lagged["pair_tokens"], lagged["pair_rows"]]
    assert "{} tokens of tasks are {} rows, and {} tokens of pairs {}".format(*tokens) in " ".join(text.split())
    for row in ops["rows"]:
        if row["dtype"] == "float32" and row["op"] != "linear_cross_entropy":  # which has changed since
            faster = row["times_faster_than"]
            (line,) = [line for line in text.splitlines() if line.startswith(f"| `{row['op']}` {row['pass']} |")]
            assert f"| {faster['eager']:.1f} | {faster['reference']:.1f} |" in line


def test_what_options_cost_is_that_of_the_recorded_run() -> None:
    text = EVIDENCE.read_text(encoding="utf-8")
    for row in recorded("options-cpu")["summary"]:
        keys = ("direction", "probe_gradient", "probe", "update", "effect")
        assert "| " + " | ".join(f"{row[key]['mean']:.2f}" for key in keys) + " |" in text


def test_the_demonstration_is_the_recorded_run() -> None:
    """Its table, row by row, and what the page says of equal task loss."""
    text = EVIDENCE.read_text(encoding="utf-8")
    run = recorded("demo-cpu")
    for row, figures in run["measured"].items():
        cells = [
            f"{figures['margin_trained']:+.3f}",
            f"{figures['margin_unseen']:+.3f}",
            f"{figures['prefers_refusal']:.0%}",
            f"{figures['look_alikes_answered']:.0%}",
            f"{figures['task_loss']:.3f}",
            f"{figures['seconds_per_step']:.1f}" if row != "start" else "",
        ]
        assert "| " + " | ".join([row, *cells]).strip() in text
    assert run["base_model"] in text
    start = run["measured"]["start"]
    assert start["prefers_refusal"] >= 0.9
    assert start["look_alikes_answered"] >= 0.8
    assert all(line in text for line in run["verdict"].splitlines())


def test_the_steps_on_a_gpu_are_those_of_the_recorded_run() -> None:
    """The README's table, row by row, what it says of the hosts, and what the page of evidence says of Liger."""
    text = README.read_text(encoding="utf-8")
    rows = {row["contender"]: row for row in recorded(r"step-h200-\d")["rows"]}
    for row in rows.values():
        ratios = [f"{row['ratio_to_plain_sft']:.2f}", f"{row['ratio_to_published_tidy']:.2f}"]
        cells = [f"{row['ms']:.0f}", *ratios, f"{row['peak_memory'] / 2**30:.2f} GiB", f"{row['ms_over_floor']:.2f}"]
        assert "| " + " | ".join(cells) + " |" in text.replace("**", "")
    prose = " ".join(text.split())
    graph, eager, plain = (rows[name] for name in ("graph", "lagged", "plain-sft"))
    assert f"plain PEFT's floor is {plain['floor_ms']:.0f} ms of its {plain['ms']:.0f}" in prose
    launches = f"{eager['launches']:,.0f} launches cost this host {eager['ms']:.0f} ms"
    assert f"{launches}, replayed as a graph they take {graph['ms']:.0f}" in prose
    run = recorded("step-h200-liger")
    (liger,) = (row for row in run["rows"] if row["contender"] == "liger-sft")
    (ratio,) = (row["value"] for row in run["targets"] if "graph, ms over liger-sft's" in row["target"])
    wanted = f"the graph takes {ratio:.2f} of the time ({liger['ms']:.0f} ms)"
    assert wanted in " ".join(EVIDENCE.read_text(encoding="utf-8").split())
