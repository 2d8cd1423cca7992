"""What the profiler writes, and its command."""

import json
from collections import Counter as Multiset
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from command import prepare, refused
from profiles import profiled, stopping
from steps import CONFIG

from sap_fast import Profile, SAPConfig
from sap_fast.cli.main import main
from sap_fast.cli.method import MethodArguments
from sap_fast.profiling.phases import PHASES


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Profile, Path]:
    """Write a profile of steps of two kinds; return it, and its folder."""
    folder = tmp_path_factory.mktemp("profiles") / "deep" / "profile"
    return profiled(CONFIG.replace(probe_every=2), output_dir=folder, peak_flops=1e12), folder


# What is written


class Page(HTMLParser):
    """Reads a page as strictly as a browser would have to."""

    VOID = ("meta", "br")

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: Multiset[str] = Multiset()
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_files(written: tuple[Profile, Path]) -> None:
    found, folder = written
    assert sorted(path.name for path in folder.iterdir()) == ["profile.html", "profile.json", "trace.json"]
    assert sorted(path.name for path in folder.parent.iterdir()) == ["profile"]

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    content = json.loads((folder / "profile.json").read_text(), parse_constant=refuse)
    assert content == json.loads(json.dumps(found.to_dict()))
    assert "trace" not in content
    assert content["phases"]["sap"][0].keys() >= {"phase", "seconds", "share", "flops", "bytes", "times_floor"}
    assert content["settings"]["probe_layers"] == [1, 2]

    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    spans = [event for event in events if event.get("cat") == "sap_fast"]
    labels = {phase.label for phase in PHASES}
    assert {span["name"] for span in spans} == labels
    assert all(span["dur"] >= 0 for span in spans)
    lines = {e["tid"]: e["args"]["name"] for e in events if e.get("name") == "thread_name" and e["pid"] == 1 << 30}
    assert set(lines.values()) == {"sft", "peft", "sap-1", "sap-2"}
    assert any(event.get("name") == "sap_fast::lora_linear" for event in events)


def test_the_page_needs_nothing_else(written: tuple[Profile, Path]) -> None:
    found, folder = written
    text = (folder / "profile.html").read_text()
    assert text == found.html()
    page = Page(text)
    assert not page.open
    assert not page.tags.keys() & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    assert not {name for _, name, _ in page.attributes} & {"src", "href", "srcset", "action", "onload", "onclick"}
    for reference in ("http", "//", "url(", "@import", "xlink"):
        assert reference not in text
    assert ("meta", "name", "viewport") in page.attributes
    assert "@media print" in text and "@media screen and (max-width" in text
    said = "".join(page.text)
    for title in ("Whole steps", "What would cut it", "How it was measured", "SAP, the average step"):
        assert title in said
    # A bar for each step, on one scale: the longest reaches across, and none leaves the figure.
    assert page.tags["svg"] == len(found.phases) == 5
    places = [
        float(value.rstrip("%")) for tag, name, value in page.attributes if tag == "rect" and name in ("x", "width")
    ]
    ends = [x + width for x, width in zip(places[::2], places[1::2], strict=True)]
    assert max(ends) == pytest.approx(100, abs=0.05)
    assert page.tags["rect"] == sum(len(costs) for costs in found.phases.values())
    for note in found.notes:
        assert note in said


def test_a_page_shows_text_as_text(written: tuple[Profile, Path]) -> None:
    found = replace(written[0], notes=['<script>alert(1)</script> & "more"'])
    page = Page(found.html())
    assert "script" not in page.tags
    assert '<script>alert(1)</script> & "more"' in page.text


def test_the_summary_has_every_phase_and_says_what_is_predicted() -> None:
    found = profiled(steps=2)
    said = found.summary()
    for costs in found.phases.values():
        for cost in costs:
            assert next(phase.label for phase in PHASES if phase.key == cost.phase) in said
    assert said.startswith(f"A step of SAP takes {found.ratios['sap/sft'].median:.2f}x plain SFT by the same library")
    assert "(quartiles " in said and "over 2 rounds" in said
    assert found.advice and "predictions from the phase times above, not measured" in said
    assert "times floor" not in said  # nothing was given to know it by


def test_the_distance_to_the_floor_is_shown_where_it_is_known(written: tuple[Profile, Path]) -> None:
    assert "times floor" in written[0].summary()


def test_an_output_folder_that_is_taken(written: tuple[Profile, Path], tmp_path: Path) -> None:
    found, folder = written[0], tmp_path / "out"
    seen: list[str] = []

    def refused(where: Path, message: str, *, overwrite: bool = False) -> None:
        with pytest.raises(FileExistsError, match=message):
            profiled(output_dir=where, overwrite=overwrite, tell=seen.append)
        with pytest.raises(FileExistsError, match=message):
            found.write(where, overwrite=overwrite)
        assert not seen  # nothing was run

    found.write(folder)
    refused(folder, r"out is not empty \(profile.html, profile.json, trace.json\); name another folder, or ask to")
    replace(found, notes=["another"]).write(folder, overwrite=True)
    assert json.loads((folder / "profile.json").read_text())["notes"] == ["another"]
    (folder / "thesis.txt").write_text("mine")
    refused(folder, r"out holds thesis.txt, which no profile has written", overwrite=True)
    (tmp_path / "file").write_text("mine")
    refused(tmp_path / "file", "file is a file", overwrite=True)
    assert (folder / "thesis.txt").read_text() == (tmp_path / "file").read_text() == "mine"


def test_a_profile_replaces_an_earlier_one(tmp_path: Path) -> None:
    (tmp_path / "profile.json").write_text("{}")
    found = profiled(output_dir=tmp_path, overwrite=True)
    assert json.loads((tmp_path / "profile.json").read_text())["settings"] == found.settings


def test_a_failure_while_writing_leaves_the_earlier_profile(
    written: tuple[Profile, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, folder = written
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    real = Path.write_text

    def interrupted(self: Path, *given: Any, **more: Any) -> int:
        if self.name == "profile.html":  # the second file
            raise KeyboardInterrupt
        return real(self, *given, **more)

    monkeypatch.setattr(Path, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        found.write(folder, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert sorted(path.name for path in folder.parent.iterdir()) == ["profile"]


# The command


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return prepare(tmp_path)


FLAGS = ["--model", "model", "--data", "data.jsonl", "--pairs", "pairs.jsonl"]
SMALL = ["--steps", "1", "--warmup", "1", "--batch", "2", "--pairs_per_batch", "2", "--device", "cpu"]


def test_the_command(here: Path, capsys: Any) -> None:
    options = ["--probe_every", "2", "--probe_layers", "1", "2", "--lora_r", "4", "--peak_tflops", "0.1"]
    assert main(["profile", *FLAGS, *SMALL, *options, "--output_dir", "out", "--gradient_checkpointing"]) == 0
    printed = capsys.readouterr().out
    assert "A step of SAP takes" in printed and "Page: out/profile.html" in printed
    assert "tasks: 8 rows; 0 cut at 1024 tokens, 0 dropped" in printed
    found = json.loads((here / "out" / "profile.json").read_text())
    assert found["settings"]["probe_every"] == 2 and found["settings"]["probe_layers"] == [1, 2]
    assert found["settings"]["peak_flops"] == 0.1e12 and found["settings"]["bandwidth"] is None
    assert found["settings"]["checkpointing"] is True
    assert found["settings"]["trained_weights"] == 4 * 4 * (32 + 32 + 32 + 16)
    assert found["tokens"]["sequences"] == found["tokens"]["pairs"] == 2
    assert found["weights"] == {"sap-1": 0.5, "sap-2": 0.5}
    assert main(["profile", *FLAGS, *SMALL, "--output_dir", "out"]) == 1
    assert "out is not empty" in capsys.readouterr().err


def test_the_command_takes_the_methods_settings() -> None:
    options = MethodArguments(preset="paper", strength=0.5, probe_every=3, direction_every=6, pairs_per_step=2)
    expected = SAPConfig.paper(strength=0.5, probe_every=3, direction_every=6, pairs_per_step=2)
    assert options.config() == expected
    assert MethodArguments().config() == SAPConfig()
    captured = MethodArguments(graph=True, delayed_direction=True, share_prefixes=False, attention="own").config()
    assert captured == SAPConfig(
        graph=True, check="deferred", delayed_direction=True, share_prefixes=False, attention="own"
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "0"], "--steps must be at least 1, but is 0"),
        (["--pairs_per_batch", "-1"], "--pairs_per_batch must be at least 1"),
        (["--bandwidth_gbs", "0"], "--bandwidth_gbs must be positive and finite"),
        (["--probe_every", "0"], "probe_every must be a whole number of at least 1"),
        (["--guard", "project", "--tangent_fraction", "0.5"], "guard='project' has no probe"),
        (["--probe_layers", "9"], "probe_layers holds 9; the model has layers 0 to 3"),
        (["--model", "nowhere"], "no model folder nowhere"),
        (["--pairs", "data.jsonl"], "data.jsonl, line 1: ['chosen', 'rejected'] missing"),
        (["--output_dir", "model"], "which no profile has written"),
        (["--output_dir", "data.jsonl"], "data.jsonl is a file"),
        (["--device", "cuda"], "torch finds no GPU here"),
    ],
)
def test_the_command_refuses(here: Path, capsys: Any, flags: list[str], message: str) -> None:
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("refusing --device cuda can be seen only where there is no GPU, and here is one")
    assert message in refused(capsys, here, *FLAGS, *SMALL, *flags, command="profile")


def test_the_command_does_not_take_an_adapter(here: Path, capsys: Any) -> None:
    (here / "model" / "adapter_config.json").write_text("{}")
    assert "model is an adapter" in refused(capsys, here, *FLAGS, *SMALL, command="profile")


def test_an_interrupt_of_the_command_leaves_nothing(here: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stopping(monkeypatch, 5, KeyboardInterrupt())
    assert main(["profile", *FLAGS, *SMALL, "--output_dir", "out"]) == 130
    assert not (here / "out").exists()


def test_help(capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["profile", "--help"])
    assert stopped.value.code == 0
    assert main(["--help"]) == 0
    assert "  profile see where the time" in capsys.readouterr().out
