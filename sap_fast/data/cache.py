"""The user's cache: what the library can make again, made once and whole."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_dir() -> Path:
    """The folder in which the library keeps what can be made again: ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sap_fast"


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
