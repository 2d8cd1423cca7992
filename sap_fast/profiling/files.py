"""The output folder of a profile: whether it may be written to, and what is written there."""

import json
from pathlib import Path
from typing import Any

from sap_fast import atomic

_WRITTEN = ("profile.html", "profile.json", "trace.json")


def why_taken(folder: Path, *, overwrite: bool) -> str | None:
    """Say why a profile may not be written to ``folder``, or return None if it may.

    Only an earlier profile may be replaced, and only with ``overwrite``.
    """
    if folder.exists() and not folder.is_dir():
        return f"{folder} is a file; name a folder"
    held = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if other := [name for name in held if name not in _WRITTEN]:
        return f"{folder} holds {', '.join(other[:4])}, which no profile has written; name another folder"
    if held and not overwrite:
        return (
            f"{folder} is not empty ({', '.join(held)}); name another folder, or ask to overwrite the earlier profile "
            "there (--overwrite, overwrite=True)"
        )
    return None


def write(content: dict[str, Any], page: str, trace: str | None, folder: Path, *, overwrite: bool) -> None:
    """Write a profile's files: all of them, or none.

    Args:
        content: what ``profile.json`` is to hold.
        page: what ``profile.html`` is to hold.
        trace: what ``trace.json`` is to hold; None for no such file.
        folder: where the files are to lie.
        overwrite: whether an earlier profile there may be replaced.

    Raises:
        FileExistsError: the folder may not be written to, for the reason that :func:`why_taken` gives.
    """
    if reason := why_taken(folder, overwrite=overwrite):
        raise FileExistsError(reason)

    def fill(scratch: Path) -> None:
        (scratch / "profile.json").write_text(_json(content), encoding="utf-8")
        (scratch / "profile.html").write_text(page, encoding="utf-8")
        if trace is not None:
            (scratch / "trace.json").write_text(trace, encoding="utf-8")

    atomic.write_folder(folder, fill)


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
