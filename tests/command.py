"""The command ``sap-fast`` on a tiny model: what its tests share."""

import json
from pathlib import Path
from typing import Any

from chat import save_chat_model

from sap_fast.cli.main import main

ROWS = [{"prompt": f"Say {i}", "completion": f"It is {i}."} for i in range(8)]
PAIRS = [{"prompt": f"Do harm {i}", "chosen": f"I cannot, not {i}.", "rejected": "Sure:"} for i in range(4)]


def prepare(folder: Path) -> Path:
    """Make a working folder with a model, data and pairs."""
    save_chat_model(folder / "model")
    write(folder / "data.jsonl", ROWS)
    write(folder / "pairs.jsonl", PAIRS)
    return folder


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


FLAGS = ["--model", "model", "--data", "data.jsonl", "--pairs", "pairs.jsonl", "--output_dir", "out"]
SMALL = ["--max_steps", "3", "--per_device_train_batch_size", "2", "--safety_batch_size", "2", "--use_cpu"]
QUIET = ["--disable_tqdm", "true", "--report_to", "none"]


def train(*more: str) -> int:
    return main(["train", *FLAGS, *SMALL, *QUIET, *more])


def refused(capsys: Any, here: Path, *more: str, command: str = "train") -> str:
    """Return what a run says that is refused, having left nothing behind."""
    capsys.readouterr()
    before = sorted(here.rglob("*"))
    code = main([command, *FLAGS, *SMALL, *QUIET, *more] if command == "train" else [command, *more])
    assert code == 1
    assert sorted(here.rglob("*")) == before
    return capsys.readouterr().err
