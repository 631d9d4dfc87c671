"""Fields of a JSON object: exactly those, each of its type. Files written with the mode that the umask says."""

import hashlib
import os
from pathlib import Path

import pytest

from q4kd.trainer import files
from q4kd.trainer.errors import InputError
from q4kd.trainer.files import apply_umask, check_fields, file_digest, read_bounded, write_json

FIELDS = {"version": 2, "name": str, "size": int, "mass": float, "note": dict | None, "done": bool}
GOOD = {"version": 2, "name": "a", "size": 3, "mass": 0.5, "note": None, "done": True}


def test_fields_of_the_right_types_are_returned_as_they_are() -> None:
    assert check_fields(GOOD, FIELDS) is GOOD
    assert check_fields({**GOOD, "note": {}}, FIELDS)["note"] == {}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 1}, "version 1"),
        ({"version": True}, "version True"),
        ({"version": 2.0}, r"version 2\.0"),
        ({"name": 3}, "name 3"),
        ({"size": "3"}, "size '3'"),
        ({"size": True}, "size True"),
        ({"size": 3.0}, r"size 3\.0"),
        ({"mass": 1}, "mass 1"),
        ({"mass": float("inf")}, "mass inf"),
        ({"mass": float("nan")}, "mass nan"),
        ({"note": []}, r"note \[\]"),
        ({"done": 1}, "done 1"),
        ({"more": 1}, "an unknown field 'more'"),
    ],
)
def test_another_type_is_refused_without_conversion(change: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_fields(GOOD | change, FIELDS)


@pytest.mark.parametrize("document", [None, [], "x", 3, {name: GOOD[name] for name in list(GOOD)[:-1]}])
def test_what_is_no_such_object_is_refused(document: object) -> None:
    with pytest.raises(ValueError, match=r"in place of an object|no done"):
        check_fields(document, FIELDS)


def test_a_file_of_just_the_bytes_that_it_may_have_is_read(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"x" * 100)
    assert read_bounded(path, 100) == b"x" * 100
    with pytest.raises(InputError, match="expected at most 99 bytes, got a larger file"):
        read_bounded(path, 99)


@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o600), (0o022, 0o644), (0o002, 0o664)])
def test_files_of_every_writer_have_the_mode_that_the_umask_says(tmp_path: Path, umask: int, mode: int) -> None:
    import torch
    from safetensors.torch import save_file

    (tmp_path / "elsewhere").write_text("")
    (tmp_path / "elsewhere").chmod(0o640)
    folder = tmp_path / "model"
    folder.mkdir()
    before = os.umask(umask)
    try:
        write_json(folder / "a.json", {})
        save_file({"w": torch.ones(1)}, folder / "b.safetensors")
        (folder / "c.txt").write_text("")
        (folder / "link").symlink_to(tmp_path / "elsewhere")
        apply_umask(folder)
    finally:
        os.umask(before)
    modes = {path.name: path.lstat().st_mode & 0o777 for path in folder.iterdir() if not path.is_symlink()}
    assert modes == dict.fromkeys(("a.json", "b.safetensors", "c.txt"), mode)
    assert (tmp_path / "elsewhere").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 1000])
def test_a_digest_is_of_all_that_is_left(tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_DIGEST_BYTES", 100)
    data = os.urandom(size)
    (tmp_path / "f").write_bytes(data)
    with (tmp_path / "f").open("rb") as file:
        assert file_digest(file, "sha256") == hashlib.sha256(data).hexdigest()
        assert file_digest(file, "sha256") == hashlib.sha256(b"").hexdigest()
        file.seek(size // 2)
        assert file_digest(file, "sha256") == hashlib.sha256(data[size // 2 :]).hexdigest()
