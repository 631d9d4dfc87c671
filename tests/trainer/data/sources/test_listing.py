"""What is read of a folder, and what is said of the rest."""

import gzip
import os
from pathlib import Path

import pytest

from q4kd.trainer.data import readers
from q4kd.trainer.data.documents import SourceSettings
from q4kd.trainer.data.readers import list_files, read_documents
from q4kd.trainer.data.sources.account import SourceAccount
from q4kd.trainer.errors import InputError


def write(root: Path, **files: str) -> Path:
    for name, content in files.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def read(folder: Path, pattern: str = "**/*") -> tuple[list[str], SourceAccount]:
    account = SourceAccount()
    documents = read_documents(folder, settings=SourceSettings(pattern=pattern), account=account)
    return [document.name for document in documents], account


def test_every_file_is_read_or_named(tmp_path: Path) -> None:
    data = write(
        tmp_path / "data",
        small_dot_txt="one",
        _dot_git__config="git",
        deep___dot_cache__x="cache",
        other_dot_json="{}",
    )
    (data / "latin.txt").write_bytes(b"caf\xe9")
    (data / "utf16.txt").write_bytes("text".encode("utf-16-le"))
    (data / "more.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}'))
    (tmp_path / "outside.txt").write_text("secret")
    (data / "out.txt").symlink_to(tmp_path / "outside.txt")
    (data / "gone.txt").symlink_to(tmp_path / "nothing")
    (data / "folder").symlink_to(tmp_path)
    os.mkfifo(data / "pipe")
    names, account = read(data)
    assert names == ["other.json", "small.txt"]
    assert account.read == 2
    assert account.as_text == ["other.json"]
    assert {name: reason.split(" (")[0] for name, reason in account.left_out.items()} == {
        ".git/": "hidden",
        "deep/.cache/": "hidden",
        "folder/": "links to folders",
        "gone.txt": "links to nothing",
        "latin.txt": "not UTF-8 text",
        "more.jsonl.gz": "compressed",
        "out.txt": "links out of the folder",
        "pipe": "no regular files",
        "utf16.txt": "not UTF-8 text",
    }
    said = "\n".join(account.lines())
    assert all(name in said for name in (*account.left_out, "other.json"))
    assert account.to_json()["num_left_out"] == 9


def test_a_card_is_no_data_beside_records_but_is_text_by_itself(tmp_path: Path) -> None:
    data = write(tmp_path, README_dot_md="card", LICENSE="free", data__train_dot_jsonl='{"text": "x"}\n')
    names, account = read(data)
    assert names == ["data/train.jsonl:1"]
    assert set(account.left_out) == {"LICENSE", "README.md"}
    assert read(data, "**/README.md")[0] == ["README.md"]
    (data / "data" / "train.jsonl").rename(data / "train.json")
    assert read(data)[0] == ["train.json:1"]
    (data / "train.json").unlink()
    assert read(data)[0] == ["LICENSE", "README.md"]


def test_a_hidden_name_that_was_asked_for_is_read(tmp_path: Path) -> None:
    data = write(tmp_path, _dot_notes__a_dot_txt="x")
    assert read(data)[0] == []
    assert read(data, ".notes/*.txt")[0] == [".notes/a.txt"]


def test_a_snapshot_of_a_hub_cache_is_read_through_its_links(tmp_path: Path) -> None:
    cache = tmp_path / ".cache" / "datasets--x"
    write(cache / "blobs", one='{"text": "x"}\n')
    write(tmp_path, elsewhere='{"text": "secret"}\n')
    data = cache / "snapshots" / "abc" / "data"
    data.mkdir(parents=True)
    (data / "train.jsonl").symlink_to("../../../blobs/one")
    (data / "evil.jsonl").symlink_to(tmp_path / "elsewhere")
    for folder, name in ((data, "train.jsonl:1"), (data.parent, "data/train.jsonl:1")):
        names, account = read(folder)
        assert names == [name]
        assert len(account.left_out) == 1
    lone = tmp_path / "snapshots" / "a"
    lone.mkdir(parents=True)
    (lone / "train.jsonl").symlink_to(tmp_path / "elsewhere")
    assert read(lone)[0] == []


def test_a_text_that_is_too_large_is_refused_in_a_folder_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write(tmp_path, big_dot_txt="x" * 100, small_dot_txt="y")
    monkeypatch.setattr(readers, "MAX_TEXT_BYTES", 50)
    with pytest.raises(InputError, match=r"big\.txt: expected text files of at most 50"):
        read(data)


def test_compressed_and_other_encodings_given_by_name_are_refused_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"{}"))
    (tmp_path / "b.txt").write_bytes("text".encode("utf-16-le"))
    for name, remedy in (("a.jsonl.gz", "unpack"), ("b.txt", "iconv")):
        with pytest.raises(InputError, match=remedy):
            list(read_documents(tmp_path / name))


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfx")
    (document,) = read_documents(tmp_path / "a.txt")
    assert document.text == "x"
    (document,) = read_documents(tmp_path)
    assert document.text == "x"


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_a_folder_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0)
    with pytest.raises(InputError, match="locked"):
        read(tmp_path)


def test_what_was_left_out_is_told_to_a_caller_alone(tmp_path: Path) -> None:
    write(tmp_path, _dot_x="x", a_dot_txt="y")
    assert [name for _, name in list_files(tmp_path, SourceSettings())] == ["a.txt"]


@pytest.mark.parametrize("name", ["train.txt", "train.jsonl", "train.parquet", "train.json"])
def test_a_pointer_of_git_lfs_is_no_data(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    for source in (tmp_path, tmp_path / name):
        with pytest.raises(InputError, match="git lfs pull"):
            list(read_documents(source))


def test_a_table_is_text_and_named(tmp_path: Path) -> None:
    write(tmp_path, a_dot_csv="x,y", b_dot_txt="z")
    names, account = read(tmp_path)
    assert names == ["a.csv", "b.txt"]
    assert account.as_text == ["a.csv"]
    assert account.lines() == ["data: read as text, as they are: a.csv"]
