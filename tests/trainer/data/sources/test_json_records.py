"""Records in JSON files, however they are laid out."""

import json
from pathlib import Path

import pytest

from q4kd.trainer.data.readers import read_documents

RECORDS = [{"text": "one"}, {"text": "two"}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bom.json", "\ufeff" + json.dumps(RECORDS)),
        ("bom-lines.json", "\ufeff" + "\n".join(map(json.dumps, RECORDS))),
        ("list.json", json.dumps(RECORDS, indent=2)),
        ("after-another.json", "\n\n".join(json.dumps(record, indent=2) for record in RECORDS)),
        ("joined.json", "".join(map(json.dumps, RECORDS))),
        ("lines.ndjson", "\n".join(map(json.dumps, RECORDS))),
        ("lines.jsonlines", "\n".join(map(json.dumps, RECORDS))),
        ("bom.jsonl", "\ufeff" + "\n".join(map(json.dumps, RECORDS))),
        ("UPPER.JSONL", "\n".join(map(json.dumps, RECORDS))),
    ],
)
def test_every_layout_gives_the_records(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    for source in (tmp_path, tmp_path / name):
        assert [document.text for document in read_documents(source)] == ["one", "two"]


def test_one_record_over_several_lines(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"text": "one", "id": 3}, indent=4))
    for source in (tmp_path, tmp_path / "a.json"):
        assert [document.text for document in read_documents(source)] == ["one"]


def test_a_first_record_beyond_what_is_looked_at_first(tmp_path: Path) -> None:
    long = "word " * 300_000
    (tmp_path / "list.json").write_text(json.dumps([{"text": long}, {"text": "two"}]))
    (tmp_path / "lines.json").write_text(json.dumps({"text": long}) + "\n" + json.dumps({"text": "two"}))
    for name in ("list.json", "lines.json"):
        assert [document.text for document in read_documents(tmp_path / name)] == [long, "two"]
    assert len(list(read_documents(tmp_path))) == 4
