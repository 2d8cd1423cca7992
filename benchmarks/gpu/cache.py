"""Triton's cache of compiled kernels as one file that travels: packed at the end of a run, unpacked before the next.

A kernel is found again by the same release of Triton alone: its key hashes the installed package. Only what is loaded
travels, machine code and its description, not the stages of compilation beside it, which are most of the cache.
"""

import json
import os
import tarfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

NAME = "cache.tar"
_LOADED = {".cubin", ".hsaco", ".json", ".so"}
# Triton's index of the files of one kernel, by absolute paths.
_INDEX = "__grp__"
# Bytes of the file, at the most; what is left out is compiled again.
MOST = 15 * 2**20


def default_folder() -> Path:
    """Return where Triton keeps its cache, unless told otherwise."""
    return Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")


def kernels(folder: Path) -> int:
    """Count the kernels that a cache holds."""
    return sum(1 for _ in folder.glob(f"*/{_INDEX}*"))


def pack(folder: Path, target: Path) -> str:
    """Write the cache to ``target``, compressed, the newest kernels first; says what was packed."""
    entries = sorted(folder.glob("*/"), key=lambda entry: entry.stat().st_mtime, reverse=True)
    temporary = target.with_suffix(".new")
    packed, left_out = 0, 0
    with tarfile.open(temporary, "w:gz", compresslevel=6) as tar:
        for entry in entries:
            if temporary.stat().st_size > MOST:
                left_out += 1
                continue
            for file in _loaded(entry.iterdir()):
                with suppress(FileNotFoundError):  # another process's temporary file
                    tar.add(file, f"{entry.name}/{file.name}", recursive=False)
            packed += 1
    temporary.replace(target)
    return f"{packed} entries, {target.stat().st_size / 2**20:.1f} MiB" + (f"; {left_out} left out" * bool(left_out))


def unpack(source: Path, folder: Path) -> int:
    """Add what a packed cache holds to a cache; returns how many files."""
    count = 0
    with tarfile.open(source, "r:*") as tar:
        for member in tar:
            parts = Path(member.name).parts
            content = tar.extractfile(member) if member.isfile() else None
            if content is None or len(parts) != 2 or ".." in parts or Path(member.name).is_absolute():
                continue
            target = folder.joinpath(*parts)
            if target.exists():
                continue
            data = content.read()
            if target.name.startswith(_INDEX):
                data = _moved(data, target.parent)
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f"{target.name}.{os.getpid()}.new")
            temporary.write_bytes(data)
            temporary.replace(target)
            count += 1
    return count


def _loaded(files: Iterable[Path]) -> list[Path]:
    return sorted(file for file in files if file.is_file() and file.suffix in _LOADED)


def _moved(index: bytes, folder: Path) -> bytes:
    """Rewrite an index so that its paths are in ``folder``, of the files that travel."""
    names = [name for name in json.loads(index)["child_paths"] if Path(name).suffix in _LOADED]
    return json.dumps({"child_paths": {name: str(folder / name) for name in names}}).encode()
