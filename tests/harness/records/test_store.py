"""Stores: a part of a folder is read without looking at what lies beside it."""

from pathlib import Path

import pytest

from q4kd.harness.records.store import DirectoryStore, MemoryStore, PrefixStore
from q4kd.trainer.errors import InputError


def test_a_part_is_listed_without_looking_at_its_neighbours(tmp_path: Path) -> None:
    """A run that has ended is judged while the next one still makes and removes its files."""
    for name in ("runs/done/exit.json", "runs/done/arrays/a.npz", "runs/going/stdout.log"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "runs" / "going" / "half").symlink_to(tmp_path)
    store = DirectoryStore(tmp_path)
    assert PrefixStore(store, "runs/done").names() == ["arrays/a.npz", "exit.json"]
    assert store.names("runs/done/arrays/") == ["runs/done/arrays/a.npz"]
    assert store.names("runs/none/") == []
    with pytest.raises(InputError, match="no links"):
        store.names()


def test_a_part_behind_a_link_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "exit.json").write_text("x")
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "runs").symlink_to(tmp_path / "elsewhere")
    assert DirectoryStore(tmp_path / "bundle").names("runs/") == []
    with pytest.raises(InputError):
        DirectoryStore(tmp_path / "bundle").names("../elsewhere/")


def test_every_store_lists_the_same_part(tmp_path: Path) -> None:
    files = {"runs/a/exit.json": b"1", "runs/ab/exit.json": b"2", "findings.json": b"3"}
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    for store in (DirectoryStore(tmp_path), MemoryStore(files, "a test")):
        assert store.names() == sorted(files)
        assert store.names("runs/a/") == ["runs/a/exit.json"]
        assert PrefixStore(store, "runs").names("ab/") == ["ab/exit.json"]
