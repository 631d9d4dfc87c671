"""A file that is changed while it is mapped ends in one line and exit code 66, not in a bus error without a word."""

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from q4kd.trainer import mapped as mapped_files
from q4kd.trainer.errors import FileChangedError, InputError
from q4kd.trainer.mapped import MappedFile

_PAGES = 64 << 10


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(bytes(range(256)) * (_PAGES // 256))
    return path


def test_a_map_shows_the_file_and_never_writes_to_it(file: Path) -> None:
    before, mapped = file.read_bytes(), MappedFile(file)
    assert mapped.data.tobytes() == before
    mapped.data[:] = 0
    assert file.read_bytes() == before
    mapped.check_unchanged()


def test_a_file_that_is_cut_grown_or_written_is_named(file: Path) -> None:
    mapped = MappedFile(file)
    with file.open("ab") as more:
        more.write(b"x")
    with pytest.raises(FileChangedError, match=r"model\.gguf: expected the 65,536 bytes .* got 65,537"):
        mapped.check_unchanged()
    os.truncate(file, 5)
    with pytest.raises(FileChangedError, match="got 5"):
        mapped.check_unchanged()
    again = MappedFile(file)
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    with pytest.raises(FileChangedError, match="written since"):
        again.check_unchanged()
    assert again.change().exit_code == 66  # type: ignore[union-attr]


def test_a_file_that_was_only_touched_is_the_same_where_its_digest_is_known(file: Path) -> None:
    mapped, before = MappedFile(file), file.read_bytes()
    assert mapped.sha256() == hashlib.sha256(before).hexdigest()
    os.utime(file, ns=(0, 7))
    mapped.check_unchanged()
    file.write_bytes(before)  # as cp writes a file over itself
    mapped.check_unchanged()
    assert mapped.change() is None  # the new time is the known one, and nothing is read for it again
    # The time of another second is put back, as rsync and tar do, but one byte differs.
    file.write_bytes(before[:-1] + b"x")
    os.utime(file, ns=(0, 8))
    with pytest.raises(FileChangedError, match="the same number, written since"):
        mapped.check_unchanged()
    file.write_bytes(before)
    os.truncate(file, 5)
    with pytest.raises(FileChangedError, match="got 5"):
        mapped.check_unchanged()


def test_a_digest_taken_while_the_file_is_written_decides_nothing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mapped, digest = MappedFile(file), mapped_files.file_digest

    def meanwhile(*arguments: Any) -> Any:
        os.utime(file, ns=(0, 7))
        return digest(*arguments)

    with monkeypatch.context() as changed:
        changed.setattr(mapped_files, "file_digest", meanwhile)
        mapped.sha256()
    with pytest.raises(FileChangedError):
        mapped.check_unchanged()


def test_a_file_with_the_name_of_another_is_not_reopened(file: Path) -> None:
    mapped, before = MappedFile(file), file.read_bytes()
    with mapped.reopened() as again:
        assert again.read(9) == before[:9]
    other = file.with_name("other")
    other.write_bytes(before[::-1])
    other.replace(file)
    assert mapped.sha256() == hashlib.sha256(before).hexdigest()
    with pytest.raises(FileChangedError, match="got another file"), mapped.reopened():
        raise AssertionError


def test_a_file_that_is_replaced_or_removed_stays_as_it_was_mapped(file: Path) -> None:
    before, mapped = file.read_bytes(), MappedFile(file)
    other = file.with_name("other")
    other.write_bytes(b"another file")
    other.replace(file)
    mapped.check_unchanged()
    file.unlink()
    mapped.check_unchanged()
    assert mapped.data.tobytes() == before


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(InputError, match="an empty one"):
        MappedFile(tmp_path / "empty")


# How a page that is lost is met: by this thread, by another one, by threads of torch that Python does not know.
_READS = {
    "numpy": "mapped.data.sum()",
    "a thread": "import threading; t = threading.Thread(target=mapped.data.sum); t.start(); t.join()",
    "torch's threads": "import torch; torch.set_num_threads(2); torch.from_numpy(mapped.data).float().sum()",
}


def _after_a_cut(path: Path, read: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import os, sys; from pathlib import Path; import numpy as np; from q4kd.trainer.mapped import MappedFile\n"
        "path = Path(sys.argv[1]); mapped = MappedFile(path); other = path.with_name('other')\n"
        f"other.write_bytes(bytes(8192)); second = np.memmap(other, mode='r')\n{read}"
    )
    return subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(sys.platform != "linux", reason="the handler is set on Linux only")
@pytest.mark.parametrize("read", _READS.values(), ids=_READS)
def test_a_page_that_is_lost_ends_in_one_line(file: Path, read: str) -> None:
    pytest.importorskip("torch")
    ended = _after_a_cut(file.rename(file.with_name("a\x1b[31mb.gguf")), f"os.truncate(path, 4096)\n{read}")
    assert ended.returncode == 66, ended.stderr
    assert ended.stderr.startswith("q4kd: ") and ended.stderr.count("\n") == 1
    assert "a?[31mb.gguf: expected the 65,536 bytes that were opened, got 4,096" in ended.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="the handler is set on Linux only")
def test_a_page_of_another_file_is_told_and_ends_as_it_would(file: Path) -> None:
    ended = _after_a_cut(file, "os.truncate(other, 0)\nsecond.sum()")
    assert ended.returncode == -signal.SIGBUS
    assert ended.stderr.startswith("q4kd: bus error: a file that is read through a memory map was cut")


def test_data_are_no_copy(file: Path) -> None:
    assert isinstance(MappedFile(file).data.base, np.memmap)
