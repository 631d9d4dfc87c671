"""Writes safetensors files without a copy of the tensors; their digest is computed beside the writing.

safetensors' own writer makes all tensors into bytes first, and a digest of the file would then read it again. Here one
thread hashes what another writes, and a third has the disk take it meanwhile, since a machine with much memory
would begin with that when all is written. All three leave the interpreter to others.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")
# Names of https://github.com/huggingface/safetensors#format; the order of a file is by size of element, then by name.
_DTYPES = {
    torch.float64: "F64", torch.int64: "I64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_PIECE_BYTES = 16 << 20
# Bytes that are written before the disk is asked to take them.
_SYNC_BYTES = 256 << 20


@dataclass
class WriteFigures:
    """What writing took so far, seconds of each part; those of files that are written at one time are added, too.

    Attributes:
        bytes: bytes written.
        digest_s: computing digests, in a thread beside the writing.
        write_s: handing bytes to the kernel, and copying them from a device where they were still there.
        sync_s: waiting, after the last is written, until all are on the disk.
    """

    bytes: int = 0
    digest_s: float = 0.0
    write_s: float = 0.0
    sync_s: float = 0.0

    def add(self, other: "WriteFigures") -> None:
        """Add what another file took."""
        self.bytes += other.bytes
        self.digest_s += other.digest_s
        self.write_s += other.write_s
        self.sync_s += other.sync_s


def write_tensors(path: Path, tensors: Mapping[str, Tensor], figures: WriteFigures | None = None) -> str:
    """Write tensors of any device as a new safetensors file, until it is on the disk; return its SHA-256.

    At most two tensors of a device are on the host at one time. Nobody may change the tensors meanwhile.

    Raises:
        OSError: when it cannot be written.
        ValueError: for a dtype that safetensors does not have.
    """
    figures = figures if figures is not None else WriteFigures()
    digest, hashing, syncing = hashlib.sha256(), _done(0.0), _done(None)
    unsynced = 0
    started = time.monotonic()

    def hashed(piece: memoryview) -> float:
        begun = time.monotonic()
        digest.update(piece)
        return time.monotonic() - begun

    # The threads end before the file is closed.
    with (
        path.open("xb", buffering=0) as file,
        ThreadPoolExecutor(1, "digest") as hasher,
        ThreadPoolExecutor(1, "sync") as syncer,
    ):
        for data in _content(tensors):
            before, hashing = hashing, hasher.submit(hashed, data)
            written = 0
            while written < len(data):
                size = file.write(data[written : written + _PIECE_BYTES])
                written, unsynced = written + size, unsynced + size
                if unsynced >= _SYNC_BYTES and syncing.done():
                    syncing.result()
                    syncing, unsynced = syncer.submit(os.fdatasync, file.fileno()), 0
            figures.bytes += len(data)
            figures.digest_s += before.result()
        figures.digest_s += hashing.result()
        ended = time.monotonic()
        figures.write_s += ended - started
        syncing.result()
        os.fsync(file.fileno())
        figures.sync_s += time.monotonic() - ended
    return digest.hexdigest()


def _done(value: _T) -> "Future[_T]":
    future = Future[_T]()
    future.set_result(value)
    return future


def _content(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    """Yield the header, then the bytes of each tensor."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{name}: safetensors has no {tensor.dtype}")
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {}
    offset = 0
    for name in names:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    said = json.dumps(header, separators=(",", ":")).encode()
    said += b" " * (-len(said) % 8)
    yield memoryview(len(said).to_bytes(8, "little") + said)
    for name in names:
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            yield flat.view(torch.uint8).numpy().data
