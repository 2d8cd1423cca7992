"""The output folder of a run: what may be written where, and writing it whole or not at all."""

import re
from pathlib import Path

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
    """Check that a run may write to ``folder``, where it replaces ``adapter/`` and ``checkpoints/`` as a whole.

    Raises:
        CommandError: also if one of these holds what no run has written.
    """
    claim(folder, overwrite=overwrite)
    for name, known in _WRITTEN.items():
        place = folder / name
        held = sorted(path.name for path in place.iterdir()) if place.is_dir() else []
        if other := [entry for entry in held if not known.fullmatch(entry)]:
            raise CommandError(f"{place} holds {', '.join(other[:4])}, which no run has written; move it elsewhere")
