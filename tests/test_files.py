"""Reading rows and their formats: what is accepted, and what every refusal says."""

import json
from pathlib import Path
from typing import Any

import pytest

from sap_fast.data import read_table
from sap_fast.data.formats import Conversation, Text, read_pairs, read_task
from sap_fast.errors import DataError

ROWS = [{"prompt": "Say one", "completion": "One."}, {"prompt": "Say two", "completion": "Zwei, \u00e4h, two."}]


def write(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def save(folder: Path, kind: str) -> Path:
    """Save ``ROWS`` in a file of one kind."""
    path = folder / f"tasks.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    elif kind == "json":
        path.write_text(json.dumps(ROWS, indent=1))
    elif kind == "csv":
        path.write_text('prompt,completion\nSay one,One.\nSay two,"Zwei, \u00e4h, two."\n')
    else:
        parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    assert [dict(row) for row in read_table(save(tmp_path, kind))] == ROWS


def test_a_hugging_face_dataset_is_read() -> None:
    datasets = pytest.importorskip("datasets")
    assert [dict(row) for row in read_table(datasets.Dataset.from_list(ROWS))] == ROWS


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path: Path) -> None:
    path = write(tmp_path, "tasks.csv", b"\xef\xbb\xbfprompt,completion\na,b\n")
    assert list(read_table(path)[0]) == ["prompt", "completion"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", "", "a.jsonl is empty"),
        ("a.jsonl", "\n\n", "a.jsonl is empty"),
        ("a.json", "", "a.json is empty"),
        ("a.json", "[]", "a.json is empty"),
        ("a.csv", "prompt,completion\n", "a.csv is empty"),
        ("a.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt": \n', r"a.jsonl, line 2: not JSON .*column"),
        ("a.jsonl", '{"prompt": "a", "completion": "b"}\n["a"]\n', r"a.jsonl, line 2: expected a record .* list"),
        ("a.json", '[\n{"prompt": "a"},\n{"prompt" "b"}]', r"a.json, line 3: not JSON"),
        ("a.json", '{"prompt": "a"}\n{"prompt": "b"}', r"one record a line is the .jsonl format"),
        ("a.json", '{"prompt": "a"}', r"expected a list of records"),
        ("a.csv", "prompt,completion\na,b\na\n", r"a.csv, line 3: 1 cells, but the header names 2 columns"),
        ("a.csv", 'prompt,completion\na,"b\n', r"a.csv, line 2: not CSV"),
        ("a.csv", "prompt,prompt\na,b\n", r"names a column twice"),
        ("a.jsonl", b'{"prompt": "a"}\n\xff\xfe', r"a.jsonl, line 2: not UTF-8"),
        ("a.xlsx", "x", r"the ending '.xlsx' is not known; give a .jsonl"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(tmp_path: Path, name: str, text: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_table(write(tmp_path, name, text))


def test_a_file_that_is_not_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    with pytest.raises(DataError, match=r"a\.parquet: not Parquet"):
        read_table(write(tmp_path, "a.parquet", "no"))


@pytest.mark.parametrize(
    "name",
    ["missing.jsonl", "./missing", "/no/such/file.txt", "a/b/c", "tasks.txt", "tasks", "a/b.csv", "tests/missing"],
)
def test_a_missing_file_is_no_hub_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sap_fast.data.files._from_hub", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(DataError, match="no such file"):
        read_table(name)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder"):
        read_table(tmp_path)


def test_a_hub_name_is_asked_for_and_its_failure_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(name: str, split: str) -> Any:
        asked.append((name, split))
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=r"neither a file here nor a dataset .*no network"):
        read_table("owner/name")
    assert asked == [("owner/name", "train")]


def test_what_cannot_be_indexed_is_refused() -> None:
    with pytest.raises(DataError, match="cannot be indexed"):
        read_table(iter(ROWS))


def test_what_is_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'sap-fast\[data\]'"):
        read_table(write(tmp_path, "a.parquet", "x"))


def tasks(*rows: Any) -> list:
    return [read_task(place, row) for place, row in read_table(list(rows), name="data").items()]


def pairs(*rows: Any) -> list:
    return read_pairs(read_table(list(rows), name="data"))


USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
OTHER = {"role": "assistant", "content": "Go away"}


def test_task_formats() -> None:
    said = Conversation((USER, ASSISTANT), 1)
    assert tasks({"prompt": "Hi", "completion": "Hello"}) == [said]
    assert tasks({"prompt": [USER], "completion": [ASSISTANT], "id": 7}) == [said]
    assert tasks({"prompt": [USER], "completion": "Hello"}) == [said]
    assert tasks({"messages": [USER, ASSISTANT]}) == [Conversation((USER, ASSISTANT), 0)]
    assert tasks({"text": "once upon"}) == [Text("once upon")]


def test_pair_formats() -> None:
    wanted = [(Conversation((USER, ASSISTANT), 1), Conversation((USER, OTHER), 1))]
    assert pairs({"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"}) == wanted
    assert pairs({"prompt": [USER], "chosen": [ASSISTANT], "rejected": [OTHER]}) == wanted
    assert pairs({"chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]}) == wanted
    assert pairs({"prompt": None, "chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]}) == wanted


def test_plain_pairs_without_a_prompt_share_their_beginning_up_to_a_word() -> None:
    ((chosen, rejected),) = pairs({"chosen": "Q: Hi A: Surely not", "rejected": "Q: Hi A: Sure, go"})
    assert chosen.text[chosen.learned_from :] == "Surely not"
    assert rejected.text[rejected.learned_from :] == "Sure, go"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a", "answer": "b"}, r"row 0: expected prompt and completion; .* columns are"),
        ({"prompt": "a"}, r"expected prompt and completion"),
        ({"completion": "a"}, r"\['prompt'\] missing"),
        ({"prompt": "a", "completion": None}, r"\['completion'\] missing"),
        ({"prompt": "a", "completion": " "}, r"completion is empty"),
        ({"prompt": "a", "completion": 3}, r"completion must be a text or a list"),
        ({"prompt": "a", "completion": "b", "text": "c"}, r"there together; keep"),
        ({"messages": "Hi"}, r"messages must be a list"),
        ({"messages": [USER]}, r"no message of the assistant"),
        ({"messages": [ASSISTANT, USER]}, r"messages begin with the assistant"),
        ({"messages": [USER, {"role": "bot", "content": "x"}]}, r"messages\[1\] has the role 'bot'"),
        ({"messages": [USER, {"content": "x"}]}, r"messages\[1\] must have role and content"),
        ({"prompt": [USER], "completion": [USER]}, r"must answer with a message of the assistant"),
        ({"text": ""}, r"text is empty"),
    ],
)
def test_a_bad_task_row_is_refused_by_place(row: dict, message: str) -> None:
    with pytest.raises(DataError, match=rf"data, row 0: .*{message.removeprefix('row 0: ')}"):
        tasks(row)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, r"\['rejected'\] missing"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, r"chosen and rejected are equal"),
        ({"chosen": "one", "rejected": "two"}, r"do not begin alike; add a column prompt"),
        ({"chosen": "Q: x ", "rejected": "Q: x y"}, r"chosen has nothing beyond"),
        ({"chosen": [ASSISTANT], "rejected": [OTHER]}, r"do not begin with the same message"),
        ({"chosen": [USER], "rejected": [USER, OTHER]}, r"chosen must answer"),
        ({"chosen": "x", "rejected": [USER, OTHER]}, r"chosen must be a text or a list"),
    ],
)
def test_a_bad_pair_is_refused_by_place(row: dict, message: str) -> None:
    with pytest.raises(DataError, match=rf"data, row 0: .*{message}"):
        pairs(row)
