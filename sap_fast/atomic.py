"""Writing files and folders whole or not at all: made beside their place, then renamed into it."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def make_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Let ``make`` fill ``folder`` if it is not there yet.

    It fills a folder beside the target, which is then renamed: an interrupt or a kill leaves no half of it.
    """
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        make(scratch)
        scratch.chmod(0o755)
        try:
            scratch.rename(folder)
        except OSError:
            if not folder.exists():  # else another process has finished the same work first
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


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
    """Remove what :func:`set_aside` has kept."""
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
    """Write JSON beside the target and rename, so that a kill leaves the old file or the new one."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write beside the target and rename, so that a kill leaves the old file or the new one."""
    write_with(path, lambda scratch: scratch.write_text(text, encoding="utf-8"))


def write_with(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file beside the target and rename it, so that a kill leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(scratch)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
