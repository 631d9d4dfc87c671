import contextlib
import gzip
import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from example_bundle import write_run
from hypothesis import given, settings
from hypothesis import strategies as st

from q4kd.harness.records.raw_run import RawRun, load_arrays, run_names, runs_of
from q4kd.harness.records.store import MAX_FILE, DirectoryStore, PrefixStore, TarStore, safe_name
from q4kd.trainer.errors import InputError


def tar(*members: tuple[str, bytes] | tarfile.TarInfo, compress: bool = True) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz" if compress else "w") as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    return buffer.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_a_folder_and_its_archive_read_alike(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "demo.a-seed1")
    folder = DirectoryStore(tmp_path)
    archive = TarStore(tar(*((name, folder.read(name)) for name in folder.names())))
    assert archive.names() == folder.names() and run_names(archive) == ["demo.a-seed1"]
    for store in (folder, archive):
        run = RawRun(store, "demo.a-seed1")
        assert run.argv["fault"] is None and run.fault is None and run.exit["returncode"] == 0
        assert run.event("done") == {"v": 1, "event": "done", "t": 102.0} and run.event("step") is None
        assert len(run.events_named("done")) == 1 and len(run.memory) == 40 and run.stdout == "done\n"
        assert run.harness_error is None
        assert list(runs_of("demo", {run.name: run, "demo2": run})) == ["demo.a-seed1"]


@pytest.mark.parametrize(
    "member",
    [
        special("a", tarfile.SYMTYPE, "/etc/passwd"),
        special("a", tarfile.LNKTYPE, "b"),
        special("a", tarfile.CHRTYPE),
        special("a", tarfile.FIFOTYPE),
        ("/etc/x", b""),
        ("../x", b""),
        ("a/../../x", b""),
        ("a\\b", b""),
        ("a\x1b[31m", b""),
    ],
)
def test_an_archive_that_could_escape_is_refused_whole(member: tuple[str, bytes] | tarfile.TarInfo) -> None:
    with pytest.raises(InputError):
        TarStore(tar(("good", b"x"), member))


def test_repeated_names_and_bombs_are_refused() -> None:
    with pytest.raises(InputError, match="twice"):
        TarStore(tar(("a", b"1"), ("a", b"2")))
    bomb = tar(("a", bytes(30 << 20)))
    assert len(bomb) < 1 << 20
    with pytest.raises(InputError, match="more bytes"):
        TarStore(bomb, max_total=10 << 20)
    with pytest.raises(InputError, match="at most"):
        TarStore(tar(("a", bytes(MAX_FILE + 1))))


def test_damaged_archives_are_refused() -> None:
    whole = tar(("a", os.urandom(5000)), ("b", os.urandom(5000)))
    for data in (b"", b"hello", whole[: len(whole) // 2], whole[:-200], gzip.compress(b"x" * 100)):
        with pytest.raises(InputError):
            TarStore(data)


@given(st.binary(max_size=600))
@settings(max_examples=60, deadline=None)
def test_any_bytes_are_an_archive_or_refused(data: bytes) -> None:
    for candidate in (data, gzip.compress(data), tar(("a", data), compress=False)[: 512 + len(data)]):
        with contextlib.suppress(InputError):
            TarStore(candidate).names()


def test_a_wrapping_folder_is_taken_as_the_root_but_runs_is_not_one() -> None:
    assert TarStore(tar(("bundle/a", b""), ("bundle/b/c", b""))).names() == ["a", "b/c"]
    assert TarStore(tar(("runs/x/argv.json", b""), ("runs/x/exit.json", b""))).names()[0] == "runs/x/argv.json"


def test_links_in_a_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "secret").write_text("s")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "secret")
    store = DirectoryStore(tmp_path / "in")
    with pytest.raises(InputError, match="links"):
        store.names()
    for name in ("link", "../secret", "none", "/etc/passwd"):
        with pytest.raises(InputError):
            store.read(name)
    (tmp_path / "in" / "link").unlink()
    (tmp_path / "in" / "sub").symlink_to(tmp_path)
    with pytest.raises(InputError):
        store.read("sub/secret")


def test_a_pipe_in_a_folder_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    store = DirectoryStore(tmp_path)
    with pytest.raises(InputError):
        store.names()
    with pytest.raises(InputError):
        store.read("pipe")


def test_reads_are_bounded(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    for store in (DirectoryStore(tmp_path), TarStore(tar(("a", b"12345")))):
        assert store.read("a", 5) == b"12345"
        with pytest.raises(InputError, match="at most 4"):
            store.read("a", 4)
    assert PrefixStore(TarStore(tar(("a/b", b"1"), ("ab", b"2"))), "a").names() == ["b"]


@pytest.mark.parametrize("name", ["", ".", "..", "a//b", "a/", "/a", "a/./b", "a\nb", "x" * 401])
def test_unsafe_names(name: str) -> None:
    with pytest.raises(InputError):
        safe_name(name, "o")


@pytest.mark.parametrize("line", ["{", "[]", '{"a": NaN}', '{"a": 1, "a": 2}', "nonsense"])
def test_a_malformed_line_is_an_error_and_never_skipped(tmp_path: Path, line: str) -> None:
    write_run(tmp_path / "runs" / "demo")
    path = tmp_path / "runs" / "demo" / "events.jsonl"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(InputError, match=r"events\.jsonl:3"):
        _ = RawRun(DirectoryStore(tmp_path), "demo").events


def npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def test_arrays_come_back_whole(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "demo")
    want = {"x": np.arange(12, dtype=np.float32).reshape(3, 4), "i": np.array([1, 2], np.int64), "s": np.array("q")}
    (tmp_path / "runs" / "demo" / "arrays" / "logits.npz").write_bytes(npz(**want))
    run = RawRun(DirectoryStore(tmp_path), "demo")
    for name in ("logits", "logits.npz", "arrays/logits.npz"):
        got = run.array(name)
        assert all((got[key] == value).all() and got[key].dtype == value.dtype for key, value in want.items())


def member(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


def header(shape: str, descr: str = "'<f4'") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (118 - len(text) - 1) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    "data",
    [
        npz(o=np.array([{}], dtype=object)),
        member("x.npy", header("(1000000000000,)")),
        member("x.npy", header("(-1,)")),
        member("x.npy", header("(2,)") + b"1234"),
        member("x.npy", header("(1,)", "[('a', '<f4')]") + b"1234"),
        member("x.npy", header("(1,)", "'|O'") + b"1234"),
        member("x.npy", b"not an array"),
        member("x.npy", header("__import__('os')")),
        member("big.npy", bytes(70 << 20)),
        b"PK\x03\x04",
        b"",
    ],
    # The bytes hold the time at which they were packed: names made of them would differ from worker to worker.
    ids=[
        *("object", "too many", "a negative size", "too few bytes", "a record", "an object by descr", "no array"),
        *("code for a shape", "70 MB", "a zip's first bytes", "nothing"),
    ],
)
def test_hostile_arrays_are_refused(data: bytes) -> None:
    with pytest.raises(InputError, match="npz of plain arrays"):
        load_arrays(data, "o.npz")


def test_an_array_file_over_eight_megabytes_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "demo")
    (tmp_path / "runs" / "demo" / "arrays" / "big.npz").write_bytes(bytes((8 << 20) + 1))
    with pytest.raises(InputError, match="at most"):
        RawRun(DirectoryStore(tmp_path), "demo").array("big")


def test_a_harness_error_is_seen(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "demo")
    (tmp_path / "runs" / "demo" / "harness_error.json").write_text(json.dumps({"stage": "collect", "error": "e"}))
    assert RawRun(DirectoryStore(tmp_path), "demo").harness_error == {"stage": "collect", "error": "e"}
