"""A result records the command that made it, so that the run can be repeated."""

import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import benchmarks
from benchmarks.common import record

FOLDER = Path(benchmarks.__file__).parent
# Whatever has a main and is no part of a package's inner life.
COMMANDS = sorted(
    ".".join(path.relative_to(FOLDER.parent).with_suffix("").parts).removesuffix(".__main__")
    for path in FOLDER.rglob("*.py")
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("module", COMMANDS)
def test_a_command_is_recorded_as_it_is_spelled(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = FOLDER.parent / Path(*module.split("."))
    script = spec / "__main__.py" if spec.is_dir() else spec.with_suffix(".py")
    monkeypatch.setattr(sys, "argv", [str(script), "--json", "/some/where/found.json", "--rounds", "3"])
    assert record.environment()["command"] == f"python -m {module} --json found.json --rounds 3"


# Other tests may have imported it already, of which runpy warns.
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("module", COMMANDS)
def test_a_command_calls_itself_what_it_is_called_by(module: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["", "--help"])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(module, run_name="__main__", alter_sys=False)
    assert stopped.value.code == 0
    assert re.match(rf"usage: python -m {re.escape(module)}\s", capsys.readouterr().out)


def test_the_root_holds_commands_only() -> None:
    files = {path.stem for path in FOLDER.glob("*.py")} - {"__init__"}
    assert len(files) < 14
    assert {f"benchmarks.{name}" for name in files} <= set(COMMANDS)


def test_the_commit_is_this_checkouts() -> None:
    run = subprocess.run(["git", "-C", str(FOLDER), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    if run.returncode:
        # The sources were unpacked from an archive: there is no commit to compare with.
        pytest.skip("this is no checkout")
    assert record.environment()["commit"].rstrip("+") == run.stdout.strip()
