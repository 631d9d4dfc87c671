"""Safetensors files of our own writing: read by the library, with the digest of what is on the disk."""

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from q4kd.trainer.files import sha256_file
from q4kd.trainer.formats import safetensors_writer
from q4kd.trainer.formats.safetensors_writer import WriteFigures, write_tensors


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "a|exp_avg": torch.randn(7, 5),
        'ünicode "quoted"': torch.randn(3, 4).bfloat16(),
        "counter": torch.tensor(3.0),
        "transposed": torch.randn(4, 6).T,
        "empty": torch.zeros(0, 3),
        "table": torch.arange(256, dtype=torch.uint8),
        "whole": torch.arange(5),
        "flags": torch.tensor([True, False, True]),
    }


def test_the_library_reads_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_writer, "_PIECE_BYTES", 16)  # several pieces for a tensor
    monkeypatch.setattr(safetensors_writer, "_SYNC_BYTES", 64)
    synced: list[int] = []
    sync = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: (synced.append(descriptor), sync(descriptor))[1])
    given, figures = tensors(), WriteFigures()
    digest = write_tensors(tmp_path / "a.safetensors", given, figures)
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == given.keys()
    for name, tensor in given.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    assert synced and len(set(synced)) == 1
    assert digest == sha256_file(tmp_path / "a.safetensors")
    assert figures.bytes == (tmp_path / "a.safetensors").stat().st_size
    assert min(figures.digest_s, figures.write_s, figures.sync_s) > 0
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        # Every tensor lies at a multiple of its element's size, as those that map the file need it.
        assert file.get_slice(file.offset_keys()[0]).get_dtype() == "I64"


def test_a_file_that_is_there_or_a_dtype_that_is_not_is_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a", tensors())
    with pytest.raises(FileExistsError):
        write_tensors(tmp_path / "a", tensors())
    with pytest.raises(ValueError, match=r"safetensors has no torch\.complex64"):
        write_tensors(tmp_path / "b", {"a": torch.zeros(1, dtype=torch.complex64)})


def test_a_disk_that_fails_beside_the_writing_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(safetensors_writer, "_SYNC_BYTES", 64)
    monkeypatch.setattr(os, "fdatasync", broken)
    with pytest.raises(OSError, match="Input/output error"):
        write_tensors(tmp_path / "a", tensors())


def test_a_full_disk_is_an_error_of_the_system() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    original = Path.open
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Path, "open", lambda self, _mode, **options: original(self, "r+b", **options))
        with pytest.raises(OSError, match="No space left") as caught:
            write_tensors(Path("/dev/full"), tensors())
    assert caught.value.errno == errno.ENOSPC
