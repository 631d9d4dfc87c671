"""Fields of a JSON object: exactly those, each of its type; and files that are written as the umask says."""

import os
from pathlib import Path

import pytest

from q4kd.trainer.files import check_fields, share_mode, write_json

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


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_the_umask_says_who_may_read_what_is_written(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_json(tmp_path / "a.json", {})
        (tmp_path / "weights").write_bytes(b"")
        (tmp_path / "weights").chmod(0o600)
        share_mode(tmp_path, "a.json")
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {"a.json": mode, "weights": mode}
