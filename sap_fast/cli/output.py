"""The output folder of a run: what may be written where, and writing it whole or not at all."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sap_fast.cli.errors import CommandError


def claim(folder: Path, *, overwrite: bool) -> None:
    """Check that a run may write to ``folder``; nothing is made yet.

    Raises:
        CommandError: it is a file, or it holds something and ``overwrite`` is not set.
    """
    if folder.exists() and not folder.is_dir():
        raise CommandError(f"{folder} is a file; name a folder with --output_dir")
    if folder.is_dir() and not overwrite:
        held = sorted(path.name for path in folder.iterdir())
        if held:
            some = ", ".join(held[:4]) + (", ..." if len(held) > 4 else "")
            raise CommandError(
                f"{folder} is not empty ({some}); name another folder with --output_dir, or give --overwrite to "
                "replace an earlier run there"
            )


# What a run writes to its output folder, and what may lie in those folders.
_WRITTEN = {
    "adapter": re.compile(
        r"adapter_(config\.json|model\.safetensors)|README\.md|.*token.*\.json|.*\.(model|jinja)|vocab\..*|merges\.txt"
    ),
    "checkpoints": re.compile(r"checkpoint-\d+"),
}


def claim_run(folder: Path, *, overwrite: bool) -> None:
    """As :func:`claim`, for a run, which replaces ``adapter/`` and ``checkpoints/`` as a whole.

    Raises:
        CommandError: also if one of these holds what no run has written.
    """
    claim(folder, overwrite=overwrite)
    for name, known in _WRITTEN.items():
        place = folder / name
        held = sorted(path.name for path in place.iterdir()) if place.is_dir() else []
        if other := [entry for entry in held if not known.fullmatch(entry)]:
            raise CommandError(f"{place} holds {', '.join(other[:4])}, which no run has written; move it elsewhere")


def set_aside(folder: Path) -> Path | None:
    """Rename ``folder``, if it holds something, to a free name beside it; give that to :func:`discard` in the end."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    number, aside = 1, folder.with_name(f"{folder.name}.old")
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{folder.name}.old-{number}")
    return folder.rename(aside)


def discard(folder: Path | None) -> None:
    """Remove what :func:`set_aside` kept."""
    if folder is None:
        return
    if folder.is_dir():
        shutil.rmtree(folder)
    else:
        folder.unlink()


def replace(source: Path, target: Path) -> None:
    """Put ``source`` in the place of ``target``, file or folder.

    An error or an interrupt leaves the old one in its place; a kill between the two renames leaves it beside, as .old.
    """
    old = None
    try:
        old = set_aside(target)
        source.rename(target)
    except BaseException:
        if old is not None and not target.exists():
            old.rename(target)
        raise
    discard(old)


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a folder beside the target, then :func:`replace` the target: never a mixture of both."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        write(scratch)
        scratch.chmod(0o755)
        replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """As :func:`write_text`."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write beside the target and rename, so that a kill leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
