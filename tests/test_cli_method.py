"""The method's flags: made from SAPConfig's fields, and laid over a preset."""

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from sap_fast.cli.arguments import parse
from sap_fast.cli.errors import CommandError
from sap_fast.cli.main import main
from sap_fast.cli.method import PRESETS, MethodArguments
from sap_fast.config import SAPConfig

SETTINGS = fields(SAPConfig)
SWITCHES = ["per_token", "probe_in_safety_pass", "share_prefixes", "delayed_direction", "float8", "graph"]


def config(*argv: str) -> SAPConfig:
    return parse("train", (MethodArguments,), argv, "")[0].config()


@pytest.mark.parametrize("command", ["train", "profile"])
def test_every_setting_is_a_flag_whose_help_is_the_settings_and_ends_with_its_default(
    command: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "2000")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    explained = " ".join((SAPConfig.__doc__ or "").split())
    for setting in SETTINGS:
        words, default = setting.metadata["help"], getattr(SAPConfig(), setting.name)
        assert words, setting.name
        assert f" {setting.name}: {words}." in explained  # in help(SAPConfig) too
        (shown,) = re.findall(rf" --{setting.name}[ ,][^()]*? {re.escape(words)} \(default: (.*?)\)", printed)
        assert shown == ("the function paper_layers" if callable(default) else str(default)), setting.name


@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_not_given_is_the_presets(preset: str) -> None:
    assert config("--preset", preset) == PRESETS[preset]()
    assert config() == SAPConfig()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    ("flags", "changes"),
    [
        (["--strength", "0.5"], {"strength": 0.5}),
        (["--radius=1e-3"], {"radius": 1e-3}),
        (["--temperature", "2"], {"temperature": 2.0}),
        (["--counter", "0", "--guard", "counter"], {"counter": 0.0, "guard": "counter"}),
        (["--probe_every", "3", "--direction-every", "6"], {"probe_every": 3, "direction_every": 6}),
        (["--direction_min_cosine", "-0.5"], {"direction_min_cosine": -0.5}),
        (["--tangent_fraction", "0.5", "--pairs_per_step", "2"], {"tangent_fraction": 0.5, "pairs_per_step": 2}),
        (["--probe_layers", "9", "18"], {"probe_layers": [9, 18]}),
        (["--schedule", "lagged"], {"schedule": "lagged"}),
        (["--schedule", "fresh", "--restart", "store"], {"schedule": "fresh", "restart": "store"}),
        (["--gradient", "finite_difference"], {"gradient": "finite_difference"}),
        (["--probe_update", "sign"], {"probe_update": "sign"}),
        (["--strength_unit", "relative"], {"strength_unit": "relative"}),
        (["--safety-loss", "logsigmoid"], {"safety_loss": "logsigmoid"}),
        (["--attention", "own"], {"attention": "own"}),
        (["--check", "deferred"], {"check": "deferred"}),
        (["--float8", "emulated"], {"float8": "emulated"}),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_a_flag_wins_over_the_preset(preset: str, flags: list[str], changes: dict[str, Any]) -> None:
    assert config("--preset", preset, *flags) == PRESETS[preset](**changes)


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_is_on_off_or_the_presets(name: str, start: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    check = {"check": "deferred"} if name == "graph" else {}
    monkeypatch.setitem(PRESETS, "default", lambda **given: SAPConfig(**{name: start, **check, **given}))
    assert getattr(config(), name) is start
    for on in ([f"--{name}"], [f"--{name}", "true"], [f"--{name}", "True"], [f"--{name}=yes"]):
        assert getattr(config(*on), name) is True
    dashed = name.replace("_", "-")
    for off in ([f"--{name}", "false"], [f"--{name}=0"], [f"--no_{name}"], [f"--no-{dashed}"]):
        assert getattr(config(*off), name) is False
    assert getattr(config(f"--no_{name}", f"--{dashed}"), name) is True  # the last one holds


def test_every_switch_is_tested() -> None:
    assert [x.name for x in SETTINGS if isinstance(x.default, bool)] == SWITCHES


def test_a_graph_brings_the_deferred_check_with_it() -> None:
    assert config("--graph") == config("--graph", "--check", "deferred") == SAPConfig(graph=True, check="deferred")
    assert config("--no_graph").check == "now"
    with pytest.raises(CommandError, match="graph=True needs check='deferred', but check is 'now'"):
        config("--graph", "--check", "now")


@pytest.mark.parametrize("kind", ["yaml", "json"])
def test_a_file_of_flags(tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"run.{kind}"

    def told(settings: dict[str, Any], *argv: str) -> SAPConfig:
        text = "".join(f"{k}: {json.dumps(v)}\n" for k, v in settings.items())
        file.write_text(json.dumps(settings) if kind == "json" else text)
        return config(str(file), *argv)

    settings = {"preset": "released", "per_token": True, "share-prefixes": False, "float8": "emulated"}
    changes = {"per_token": True, "share_prefixes": False, "float8": "emulated"}
    assert told(settings) == SAPConfig.released(**changes)
    assert told({**settings, "float8": False, "probe_layers": [9, 18], "graph": True}) == SAPConfig.released(
        **changes | {"float8": False, "probe_layers": [9, 18], "graph": True, "check": "deferred"}
    )
    # null is what the preset has, which for a number that may be None is None.
    nothing = dict.fromkeys((x.name for x in SETTINGS), None)
    for preset, made in PRESETS.items():
        assert told({"preset": preset, **nothing}) == made()
        assert made().pairs_per_step is None and made().direction_min_cosine is None
    assert told({"preset": None}) == SAPConfig()
    # The command line wins over a file, in whatever spelling.
    assert told({"share_prefixes": None, "strength": None}, "--no_share_prefixes", "--strength=1") == SAPConfig(
        share_prefixes=False, strength=1.0
    )
    assert told({"share_prefixes": False, "graph": True}, "--share_prefixes", "--no_graph") == SAPConfig()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preset", "released", "--temperature", "0"], "temperature must be positive and finite, but is 0.0"),
        (["--strength", "nan"], "strength must be finite and not negative, but is nan"),
        (["--pairs_per_step", "0"], "pairs_per_step must be a whole number of at least 1, but is 0"),
        (["--preset", "paper", "--delayed_direction"], "delayed_direction needs schedule='lagged', but schedule is"),
        (["--gradient", "finite_difference", "--float8", "emulated"], "float8 belongs to gradient='dual'"),
        (["--graph", "--direction_min_cosine", "0.5"], "graph=True and direction_min_cosine do not go together"),
    ],
)
def test_refused_in_the_configs_words(flags: list[str], message: str) -> None:
    with pytest.raises(CommandError, match=message):
        config(*flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preset", "published"], "argument --preset: invalid choice: 'published'"),
        (["--guard", "nothing"], "argument --guard: invalid choice: 'nothing'"),
        (["--check", "later"], "argument --check: invalid choice: 'later'"),
        (["--graph", "maybe"], "argument --graph: invalid choice: 'maybe'"),
        (["--graph", "emulated"], "argument --graph: invalid choice: 'emulated'"),
        (["--float8", "e5m2"], "argument --float8: invalid choice: 'e5m2'"),
        (["--probe_layers", "middle"], "invalid int value: 'middle'"),
        (["--probe_every", "1.5"], "invalid int value: '1.5'"),
    ],
)
def test_refused_by_the_parser(flags: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        config(*flags)
    assert message in capsys.readouterr().err
