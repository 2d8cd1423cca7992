"""Rows from a file, a Hugging Face dataset or a list, each with a name to call it by in an error.

JSONL, JSON, CSV and Parquet by the file's ending. The well-kept readers do the reading (json, csv, pyarrow,
datasets); what is added is that every refusal says which line.
"""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sap_fast.errors import DataError

SourceRow = Mapping[str, Any]
_READS = "a .jsonl, .json, .csv or .parquet file, or the name of a dataset on the Hugging Face hub"


@dataclass(frozen=True)
class Table(Sequence[SourceRow]):
    """Holds rows, and what each is called in an error (``tasks.jsonl, line 3``)."""

    name: str
    rows: Sequence[SourceRow]
    places: Sequence[str]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def items(self) -> Iterator[tuple[str, SourceRow]]:
        """Return each row with its place."""
        return zip(self.places, self.rows, strict=True)


def read_table(source: Any, *, name: str = "the dataset", split: str = "train") -> Table:
    """Read every row of ``source``.

    Args:
        source: the path of a file; the name of a dataset on the hub, which is fetched; a ``datasets.Dataset``; or
            any sequence of dicts.
        name: what errors call a source that is not a file.
        split: which part of a dataset from the hub.

    Raises:
        DataError: no such file; an ending that is not known; a file that is empty, is not text, or breaks its
            format (with the line); rows that are not records.
        ModuleNotFoundError: Parquet or the hub without the package ``datasets``.
    """
    if isinstance(source, (str, Path)):
        table = _read(source, split)
    else:
        if isinstance(source, Mapping):
            raise DataError(f"{name} is a mapping of {sorted(source)}; give one of its parts (a split)")
        if not (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
            raise DataError(
                f"{name} is a {type(source).__name__}, which cannot be indexed (a streaming dataset?); give a list of "
                "dicts or a datasets.Dataset that is not streaming"
            )
        rows = [source[i] for i in range(len(source))]
        table = Table(name, rows, [f"{name}, row {i}" for i in range(len(rows))])
    if not len(table):
        raise DataError(f"{table.name} is empty: there is nothing to train on")
    for place, row in table.items():
        if not isinstance(row, Mapping):
            raise DataError(f"{place}: expected a record with named fields, but found {_short(row)}")
    return table


def _read(source: str | Path, split: str) -> Table:
    path = Path(source)
    if path.is_file():
        reader = _READERS.get(path.suffix.lower())
        if reader is None:
            raise DataError(f"{path}: the ending {path.suffix!r} is not known; give {_READS}")
        rows, places = [], []
        for place, row in reader(path):
            rows.append(row)
            places.append(f"{path}, {place}")
        return Table(str(path), rows, places)
    if path.is_dir():
        raise DataError(f"{path} is a folder; give {_READS}")
    # Anything but owner/name was meant as a path.
    if not is_hub_name(str(source)) or path.suffix.lower() in _READERS:
        raise DataError(f"{path}: no such file; give {_READS}, which has the form owner/name")
    return _from_hub(str(source), split)


def is_hub_name(name: str) -> bool:
    """Tell whether ``name`` can only be meant for the Hugging Face hub: owner/name, and no folder here is the owner."""
    path = Path(name)
    return len(path.parts) == 2 and not path.is_absolute() and name[0] not in "~." and not path.parent.is_dir()


def _from_hub(name: str, split: str) -> Table:
    datasets = _need("datasets", f"reading {name!r} from the Hugging Face hub")
    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # of many kinds: network, authentication, no such name, no such split
        raise DataError(
            f"{name!r} is neither a file here nor a dataset that the Hugging Face hub would give ({error})"
        ) from error
    return Table(name, rows, [f"{name}, row {i}" for i in range(len(rows))])


def _jsonl(path: Path) -> Iterator[tuple[str, SourceRow]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error.msg} at column {error.colno})") from None


def _json(path: Path) -> Iterator[tuple[str, SourceRow]]:
    text = "".join(line for _, line in _lines(path))
    if not text.strip():
        return
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        hint = " (one record a line is the .jsonl format)" if error.msg == "Extra data" else ""
        raise DataError(f"{path}, line {error.lineno}: not JSON, {error.msg}{hint}") from None
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a list of records, but found {_short(rows)}")
    yield from ((f"record {i}", row) for i, row in enumerate(rows, 1))


def _csv(path: Path) -> Iterator[tuple[str, SourceRow]]:
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise DataError(f"{path}, line 1: the header {header} names a column twice")
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{path}, line {reader.line_num}: {len(cells)} cells, but the header names {len(header)} columns "
                    f"{header}"
                )
            yield f"line {reader.line_num}", dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not CSV ({error}); JSONL has no such limits") from None


def _parquet(path: Path) -> Iterator[tuple[str, SourceRow]]:
    pyarrow = _need("pyarrow", "reading Parquet")
    parquet = _need("pyarrow.parquet", "reading Parquet")
    try:
        rows = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not Parquet ({error})") from None
    yield from ((f"row {i}", row) for i, row in enumerate(rows))


_READERS: dict[str, Callable[[Path], Iterable[tuple[str, SourceRow]]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number the lines of a UTF-8 text, without the mark that some editors put at its beginning."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{path}, line {number}: not UTF-8 text ({error.reason})") from None


def _need(module: str, purpose: str) -> Any:
    from importlib import import_module

    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise ModuleNotFoundError(f"{purpose} needs {error.name}: pip install 'sap-fast[data]'") from None


def _short(value: Any) -> str:
    text = f"{type(value).__name__} {value!r}"
    return text if len(text) <= 80 else f"{text[:77]}..."
