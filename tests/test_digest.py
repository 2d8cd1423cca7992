"""benchmarks.digest tries every setting, and tells bits apart."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from benchmarks import digest
from sap_fast import SAPConfig

DEFAULTS = SAPConfig()


def test_every_setting_is_tried_away_from_its_default() -> None:
    tried = [SAPConfig(**(digest.COMMON | settings)) for settings in digest.SETTINGS.values()]
    for field in fields(SAPConfig):
        assert any(getattr(config, field.name) != getattr(DEFAULTS, field.name) for config in tried), field.name


def test_the_same_steps_have_the_same_digest_and_others_another(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "before.json"
    run = ["--dtypes", "float32", "--settings", "fresh"]
    assert digest.main([*run, "--json", str(file)]) == 0
    assert digest.main([*run, "--against", str(file)]) == 0
    before = json.loads(file.read_text())
    assert len({row["digest"] for row in before["rows"]}) == len(digest.VARIANTS)
    before["rows"][1]["digest"] = before["rows"][0]["digest"]
    file.write_text(json.dumps(before | {"rows": before["rows"][:2]}))
    assert digest.main([*run, "--against", str(file)]) == 1
    # One has changed, one was not there before.
    told = capsys.readouterr().out.splitlines()[-2:]
    assert [line.strip() for line in told] == ["fresh, micro-batches, float32", "fresh, dropout, float32"]


def test_a_refused_setting_is_told() -> None:
    row = digest.digest({"float8": True}, "float32", "", "cpu")
    assert row["digest"] is None
    assert "float8" in str(row["problem"])
