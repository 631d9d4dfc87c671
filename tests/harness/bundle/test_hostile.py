"""A bundle comes from someone else: whatever it holds, the answer is a result or one line, and never a crash."""

import gzip
import hashlib
import io
import json
import lzma
import os
import random
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from example_bundle import CONTRACT, PAIR, PROSE, build, register

from q4kd.harness.__main__ import main
from q4kd.harness.bundle.exporters import write_interchange
from q4kd.harness.bundle.verify import verify_bundle, verify_store
from q4kd.harness.bundle.writer import MANIFEST, manifest_of, manifest_text, seal
from q4kd.harness.records.packing import xz_bytes
from q4kd.harness.records.store import MemoryStore, TarStore, open_store, parse_shallow, snapshot
from q4kd.trainer.errors import InputError

END = bytes(1024)


@pytest.fixture(autouse=True)
def checks(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return build(tmp_path, text=CONTRACT + PROSE + PAIR, samples=4)


def header(name: str, size: int = 0, kind: bytes = b"0", **fields: Any) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def with_size(block: bytes, field: bytes) -> bytes:
    """Replace the size field of a header, and set its checksum right."""
    block = block[:124] + field + block[136:]
    total = sum(block[:148]) + sum(block[156:]) + 8 * 32
    return block[:148] + b"%06o\0 " % total + block[156:]


def pax(*records: bytes) -> bytes:
    data = b"".join(b"%d %b" % (len(record) + 4, record + b"\n") for record in records)
    return header("pax", len(data), b"x") + padded(data)


GOOD = header("good", 1) + padded(b"x")


@pytest.mark.parametrize(
    "archive",
    [
        b"".join(header("././@LongLink", 2, b"L") + padded(b"a\0") for _ in range(3000)) + GOOD + END,
        header("pax", 60_000, b"x") + padded(b"1" * 60_000) + GOOD + END,
        header("pax", 1 << 20, b"x") + padded(b"1" * (1 << 20)) + GOOD + END,
        pax(b"path=../../etc/passwd") + GOOD + END,
        pax(b"path=/etc/passwd") + GOOD + END,
        pax(b"GNU.sparse.map=0,1") + GOOD + END,
        pax(b"size=999999999999") + GOOD + END,
        pax(b"path=a", b"path=\xff\xfe") + GOOD + END,
        header("pax", 13, b"g") + padded(b"13 path=safe\n") + GOOD + END,
        header("x", 9, b"S") + padded(b"x" * 9) + END,
        header("x", 0, b"1", linkname="good") + END,
        header("x", 0, b"2", linkname="/etc/passwd") + END,
        header("x", 0, b"3") + END,
        header("x", 0, b"6") + END,
        header("x", 0, b"7") + END,
        header("../up", 0, b"5") + END,
        header("folder/", 512, b"5") + bytes(512) + END,
        header("name/") + END,
        with_size(header("x"), b"\xff" * 11 + b"\0") + END,
        with_size(header("x"), b"\x80" + bytes(10) + b"\x09") + padded(b"x" * 9) + END,
        with_size(header("x"), b"-0000000001\0") + END,
        GOOD[:512].replace(b"good", b"evil") + GOOD[512:] + END,  # the checksum no longer fits
        GOOD[:513] + b"\1" * 511 + END,  # bytes hidden in the padding
        GOOD + END + b"hidden".ljust(512, b"\0"),
        GOOD,
        GOOD + END[:500],
        header("././@LongLink", 2, b"L") + padded(b"a\0") + END,
        GOOD + header("good", 1) + padded(b"y") + END,
    ],
)  # fmt: skip
@pytest.mark.parametrize("compress", [bytes, lambda data: gzip.compress(data, 1), xz_bytes], ids=["tar", "gz", "xz"])
def test_an_archive_made_to_harm_is_refused_quickly(archive: bytes, compress: Callable[[bytes], bytes]) -> None:
    packed = compress(archive)
    started = time.perf_counter()
    with pytest.raises(InputError):
        TarStore(packed)
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize("change", ["cut", "flipped", "followed", "second"])
def test_a_damaged_xz_archive_is_refused(change: str) -> None:
    whole = xz_bytes(GOOD + END)
    assert TarStore(whole).files == {"good": b"x"}
    changed = {
        "cut": whole[:-5],
        "flipped": whole[:-30] + bytes([whole[-30] ^ 1]) + whole[-29:],
        "followed": whole + b"hidden",
        "second": whole + whole,
    }[change]
    with pytest.raises(InputError):
        TarStore(changed)


def test_an_xz_archive_may_ask_for_little_memory() -> None:
    """A dictionary of 1.5 GB is announced in a few bytes; a reader that believes it allocates that much."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 64 << 20}]
    assert TarStore(lzma.compress(GOOD + END, lzma.FORMAT_XZ, filters=filters)).files == {"good": b"x"}
    data = bytearray(xz_bytes(GOOD + END))
    # The block header: one filter, LZMA2 (0x21), one byte of properties with the dictionary's size, then a CRC-32.
    at = data.index(b"\x21\x01", 12) + 2
    data[at] = 37
    length = (data[12] + 1) * 4
    data[12 + length - 4 : 12 + length] = zlib.crc32(data[12 : 12 + length - 4]).to_bytes(4, "little")
    with pytest.raises(InputError, match=r"[Mm]emory"):
        TarStore(bytes(data))


def test_an_xz_archive_that_unpacks_to_more_than_allowed_is_left_early() -> None:
    with pytest.raises(InputError, match="bounded archive"):
        TarStore(xz_bytes(bytes(8 << 20)), "bomb", 1 << 20)


def test_archives_of_other_tools_are_read(tmp_path: Path) -> None:
    (tmp_path / "b" / ("deep-" * 30)).mkdir(parents=True)
    (tmp_path / "b" / ("deep-" * 30) / "a").write_bytes(b"1")
    (tmp_path / "b" / "e").write_bytes(b"")
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz", format=form) as archive:
            archive.add(tmp_path / "b", "./b")
        assert TarStore(buffer.getvalue()).files == {f"{'deep-' * 30}/a": b"1", "e": b""}


def test_the_checksum_at_the_end_of_an_archive_is_looked_at() -> None:
    data = bytearray(gzip.compress(GOOD + END))
    assert TarStore(bytes(data)).files == {"good": b"x"}
    data[-6] ^= 1
    with pytest.raises(InputError, match="CRC"):
        TarStore(bytes(data))


def test_a_folder_is_bounded_in_files_and_bytes(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(InputError, match="at most 9 files"):
        patch.setattr("q4kd.harness.records.store.MAX_FILES", 9)
        verify_bundle(bundle)
    with monkeypatch.context() as patch, pytest.raises(InputError, match="at most 5000 bytes"):
        patch.setattr("q4kd.harness.records.store.MAX_TOTAL", 5000)
        verify_bundle(bundle)


@pytest.mark.parametrize("kind", ["link", "folder", "pipe", "itself"])
def test_a_folder_with_anything_but_files_is_refused(bundle: Path, tmp_path: Path, kind: str) -> None:
    place = bundle / "runs" / "demo" / "extra.json"
    if kind == "pipe":
        os.mkfifo(place)
    else:
        place.symlink_to({"link": tmp_path / "secret", "folder": "/etc", "itself": bundle}[kind])
    with pytest.raises(InputError, match=r"links|plain files"):
        verify_bundle(bundle)
    with pytest.raises(InputError, match=r"links|plain files"):
        seal(bundle)


def replace_archive(bundle: Path, raw: bytes) -> str:
    (bundle / "sabotage" / "ballast--demo.tar.gz").write_bytes(raw)
    kills = json.loads((bundle / "sabotage" / "kills.json").read_text())
    kills["records"]["r1"]["raw_sha256"] = hashlib.sha256(raw).hexdigest()
    (bundle / "sabotage" / "kills.json").write_text(json.dumps(kills))
    seal(bundle)
    result = verify_bundle(bundle)
    assert result.status == "mismatch"
    return "\n".join(result.problems)


def test_an_archive_within_the_bundle_is_no_safer(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("q4kd.harness.bundle.recheck.MAX_UNPACKED", 4 << 20)
    assert "plain files" in replace_archive(bundle, header("a", kind=b"2", linkname="/etc/passwd") + END)
    assert "inside the bundle" in replace_archive(bundle, header("../a") + END)
    bomb = gzip.compress(header("a", 8 << 20) + bytes(8 << 20) + END)
    assert len(bomb) < 20_000 and "bounded archive" in replace_archive(bundle, bomb)
    assert "evidence is incomplete" in _with_raw(bundle, "../findings.json")


def test_archives_within_the_bundle_share_one_bound(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [TarStore(path).unpacked for path in (bundle / "sabotage").glob("*.tar.gz")]
    monkeypatch.setattr("q4kd.harness.bundle.recheck.MAX_UNPACKED", sum(sizes))
    assert len(sizes) == 2 and verify_bundle(bundle).status == "consistent"
    monkeypatch.setattr("q4kd.harness.bundle.recheck.MAX_UNPACKED", sum(sizes) - 1)
    assert any("bounded archive" in problem for problem in verify_bundle(bundle).problems)


def _with_raw(bundle: Path, raw: str) -> str:
    kills = json.loads((bundle / "sabotage" / "kills.json").read_text())
    kills["records"]["r1"]["raw"] = raw
    (bundle / "sabotage" / "kills.json").write_text(json.dumps(kills))
    seal(bundle)
    return "\n".join(verify_bundle(bundle).problems)


def test_the_profile_cannot_name_a_path(bundle: Path) -> None:
    for name in ("../../../etc/passwd", "/etc/passwd", "cpu\x1b[31m", ""):
        findings = json.loads((bundle / "findings.json").read_text())
        findings["profile"] = name
        (bundle / "findings.json").write_text(json.dumps(findings))
        seal(bundle)
        assert verify_bundle(bundle).status == "unverifiable"


@pytest.mark.parametrize("field", ["key", "contract", "id", "scope", "reason", "experiment", "select", "profile"])
@pytest.mark.parametrize("value", [3, ["a"], {"a": 1}, True])
def test_a_plan_is_text(bundle: Path, field: str, value: Any) -> None:
    plan = json.loads((bundle / "plan.json").read_text())
    (plan if field in ("select", "profile") else plan["entries"][0])[field] = value
    (bundle / "plan.json").write_text(json.dumps(plan))
    seal(bundle)
    result = verify_bundle(bundle)
    assert result.status == "unverifiable" and "text in every field" in result.problems[0]


def test_json_is_bounded_in_depth_by_its_nesting_only() -> None:
    deep = b"[" * 64 + b"]" * 64
    assert parse_shallow(deep, "a.json") is not None
    with pytest.raises(InputError, match="at most 64 levels"):
        parse_shallow(b"[" + deep + b"]", "a.json")
    assert parse_shallow(b'["' + b"[{" * 500 + b'"]', "a.json")
    assert parse_shallow(b"[" + b"[]," * 500 + b"1]", "a.json")


VALUES: list[Any] = [
    None, True, 0, -1, 10**30, 1e308, "", "x" * 5000, "\x1b[31m\u202e", "../x", [], {}, [[]], {"a": {}}, [None, 1],
]  # fmt: skip
RAW = [
    '{"a": NaN}',
    '{"a": 1e999}',
    '{"a": 1, "a": 2}',
    "[" * 100_000,
    '{"a":' * 70 + "1" + "}" * 70,
    "\ufeff{}",
    "9" * 5000,
]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    value[path[0]] = put(value[path[0]], path[1:], new)
    return value


def test_random_json_in_a_bundle_never_breaks_verification(bundle: Path) -> None:
    files = snapshot(open_store(bundle), "bundle").files
    names = [name for name in files if name.endswith((".json", ".jsonl"))]
    draw = random.Random(7)
    for number in range(400):
        changed, name = dict(files), draw.choice(names)
        if draw.random() < 0.1:
            text = draw.choice(RAW)
        else:
            lines = files[name].decode().splitlines() if name.endswith("l") else [files[name].decode()]
            at = draw.randrange(len(lines))
            value = json.loads(lines[at])
            where = draw.choice(list(places(value)))
            lines[at] = json.dumps(put(value, where, draw.choice(VALUES)))
            text = "\n".join(lines)
        changed[name] = text.encode()
        changed[MANIFEST] = manifest_text(manifest_of(MemoryStore(changed, "bundle")))
        result = verify_store(MemoryStore(changed, "bundle"))
        assert not any("cannot be judged:" in problem for problem in result.problems), (number, name, result.problems)
        assert all(problem.isprintable() for problem in result.problems)


NASTY = "\x1b]0;owned\x07\x1b[31m\u202eevil\x9b\r"


def test_control_characters_never_reach_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = CONTRACT.replace("rule: the peak stays low", f"rule: {json.dumps('a ' + NASTY)}")
    old, new = build(tmp_path / "a", samples=4), build(tmp_path / "b", text=text, samples=4)
    findings = json.loads((new / "findings.json").read_text())
    row = findings["findings"][0]
    row.update(verdict="inconclusive", reason=NASTY, key=f"demo-v1::{NASTY}", runs=[NASTY])
    row["checks"][0].update(measured=NASTY, bound=NASTY)
    (new / "findings.json").write_text(json.dumps(findings))
    environment = json.loads((new / "environment.json").read_text())
    environment["packages"][NASTY] = NASTY
    (new / "environment.json").write_text(json.dumps(environment))
    write_interchange(new, open_store(new))
    seal(new)
    monkeypatch.setenv("FORCE_COLOR", "")
    odd = build(tmp_path / "c", samples=4)
    findings = json.loads((odd / "findings.json").read_text())
    (odd / "findings.json").write_text(json.dumps({**findings, "profile": NASTY}))
    seal(odd)
    for words in (["verify", new], ["diff", old, new], ["diff", new, odd], ["verify", odd], ["report", new]):
        main(["evidence", *map(str, words)])
    (new / f"x{NASTY}".replace("\r", "")).write_text("")
    main(["evidence", "verify", str(new)])
    main(["evidence", "verify", str(tmp_path / f"none{NASTY}")])
    said = capsys.readouterr()
    assert "inconclusive" in said.out
    bad = [char for char in said.out + said.err if not char.isprintable() and char != "\n"]
    assert not bad, bad


def test_thousands_of_problems_are_not_all_printed(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(300):
        (bundle / f"extra-{number}").write_text("")
    assert main(["evidence", "verify", str(bundle)]) == 1
    said = capsys.readouterr().out
    assert "250 more problems" in said and len(said.splitlines()) < 60
