"""Small bundles that stand for very many objects or bytes are refused before anything of them is built."""

import gzip
import lzma
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
from example_bundle import build, register

from q4kd.harness.bundle.verify import verify_bundle
from q4kd.harness.bundle.writer import pack
from q4kd.harness.records import store
from q4kd.harness.records.packing import tar_bytes
from q4kd.harness.records.store import MemoryStore, TarStore
from q4kd.trainer.errors import InputError
from q4kd.trainer.files import MAX_ITEMS, count_items, parse_json

EVENTS = "runs/demo/events.jsonl"


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    register(monkeypatch)
    return build(tmp_path)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("findings.json", b"[" + b"[]," * 600_000 + b"[]]"),
        ("plan.json", b"[" * 2_000_000),
        ("environment.json", b"[" + b"1," * 1_200_000 + b"1]"),
        ("inputs.json", b'{"a":' + b'{"b":' * 1_100_000),
        (EVENTS, b'{"event":"x","t":1}\n' * 500_000),
        (EVENTS, b"\n" * 2_000_000),
    ],
)
def test_too_many_items_are_refused_before_they_are_made(bundle: Path, name: str, data: bytes) -> None:
    (bundle / name).write_bytes(data)
    files = {str(path.relative_to(bundle)): path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    packed = gzip.compress(tar_bytes(MemoryStore(files, "bomb")))
    for read in (lambda: TarStore(packed), lambda: verify_bundle(bundle)):
        started = time.process_time()
        with pytest.raises(InputError, match="at most 1000000 items"):
            read()
        assert time.process_time() - started < 5


def test_items_are_counted_over_all_files(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    total = sum(count_items(path.read_bytes()) for path in bundle.rglob("*") if path.suffix in (".json", ".jsonl"))
    monkeypatch.setattr(store, "MAX_ALL_ITEMS", total)
    assert verify_bundle(bundle).status == "consistent"
    monkeypatch.setattr(store, "MAX_ALL_ITEMS", total - 1)
    with pytest.raises(InputError, match="items in all JSON files"):
        verify_bundle(bundle)


@pytest.mark.parametrize("suffix", ["gz", "xz"])
def test_an_archive_is_not_much_larger_than_what_it_is_packed_in(tmp_path: Path, suffix: str) -> None:
    files = {f"runs/{number}/stdout.log": bytes(store.MAX_FILE) for number in range(3)}
    data = tar_bytes(MemoryStore(files, "zeros"))
    path = tmp_path / f"zeros.tar.{suffix}"
    path.write_bytes(gzip.compress(data, 1) if suffix == "gz" else lzma.compress(data, preset=0))
    # In a process of its own, whose memory is limited: 192 MB of zeros are never held.
    code = "import sys; from q4kd.harness.__main__ import main; sys.exit(main(['evidence', 'verify', sys.argv[1]]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30)),
    )
    assert done.returncode == 2 and "expected a bounded archive" in done.stderr


def test_a_real_bundle_is_far_from_the_bounds(bundle: Path, tmp_path: Path) -> None:
    assert verify_bundle(pack(bundle, tmp_path / "b.tar.xz")).status == "consistent"
    assert parse_json(b"[" + b"0," * (MAX_ITEMS // 8) + b"0]", "numbers")[-1] == 0
    with pytest.raises(InputError, match="brackets, commas and lines"):
        parse_json(b"[" + b"0," * MAX_ITEMS + b"0]", "numbers")
