"""Records a result: where it comes from, and the file that holds it."""

import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from sap_fast.atomic import write_text
from sap_fast.environment import device_name, package_version

ROOT = Path(__file__).resolve().parents[2]
Row = dict[str, Any]  # of a result: names and JSON values


def environment(device: str = "cpu") -> dict[str, Any]:
    """Tell where a result comes from: device, processor, versions, threads, command, date, commit."""
    packages = ("torch", "transformers", "peft", "triton")
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "cpu": device_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: package_version(name) for name in packages},
        "command": _command(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
    }


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result as JSON, a row a line."""
    fields = []
    for key, value in result.items():
        if isinstance(value, list):
            rows = ",\n".join(f"    {json.dumps(row)}" for row in value)
            fields.append(f"  {json.dumps(key)}: [\n{rows}\n  ]")
        else:
            fields.append(f"  {json.dumps(key)}: {json.dumps(value)}")
    write_text(path, "{\n" + ",\n".join(fields) + "\n}\n")


def _command() -> str:
    """Write the command line, with files by their names alone."""
    words = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    return shlex.join(["python", "-m", _module(Path(sys.argv[0])), *words])


def _module(script: Path) -> str:
    """Name what ``python -m`` was given by the file that it ran: a folder's is its ``__main__.py``."""
    script = script.resolve()
    parts = ("benchmarks", script.stem)
    if script.is_relative_to(ROOT):
        parts = script.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__main__")


def _commit() -> str | None:
    """Name the commit checked out; ``+`` if tracked files differ from it."""
    try:
        commit, changes = (
            subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True, check=True).stdout
            for command in (
                ["rev-parse", "--short", "HEAD"],
                ["status", "--porcelain", "--untracked-files=no"],
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.strip() + ("+" if changes.strip() else "")
