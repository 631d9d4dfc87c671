"""Loads a model file's tensors: reads them in parallel into pinned buffers and copies these while it reads the next.

All tensors share one allocation (the *arena*), each at a multiple of 256 bytes, so the device holds the file's tensor
bytes and at most 255 more per tensor. Reading goes through ``preadv`` rather than the memory map: a page fault for
every few KiB would cost more than the copy. Host memory: two pinned buffers of ``CHUNK_BYTES`` per reading thread.
"""

import contextlib
import math
import mmap
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from q4kd.trainer.device.allocation import allocate_bytes
from q4kd.trainer.device.devices import Allocation
from q4kd.trainer.errors import InputError
from q4kd.trainer.formats.blocks.layout import block_format
from q4kd.trainer.formats.blocks.scales import BAD_BLOCKS, FLOATS, LARGEST
from q4kd.trainer.formats.model_file import ModelFile, PackedTensor
from q4kd.trainer.formats.tensor_shapes import ROPE_FACTORS
from q4kd.trainer.kernels.teacher_kernels import Kernels
from q4kd.trainer.mapped import MappedFile
from q4kd.trainer.teacher.cuda.forward import CudaForward
from q4kd.trainer.teacher.cuda.weights import DeviceTensor

ALIGNMENT = 256
CHUNK_BYTES = 8 << 20
MAX_THREADS = 8
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class FileChunk:
    """A run of ``num_bytes`` bytes at ``file_offset`` of the ``file``-th file that goes to ``arena_offset``."""

    file: int
    file_offset: int
    arena_offset: int
    num_bytes: int


def arena_layout(tensors: Mapping[str, PackedTensor]) -> tuple[dict[str, int], int]:
    """Return each tensor's offset in the arena, and the arena's bytes."""
    offsets, end = {}, 0
    for name, tensor in tensors.items():
        offsets[name] = end
        end += -(-tensor.num_bytes // ALIGNMENT) * ALIGNMENT
    return offsets, end


def _map_of(array: Any) -> Any:
    """Return the array of the memory map that an array is a view of, or the array that owns its bytes."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def file_offset(tensor: PackedTensor) -> int:
    """Return where a tensor's bytes start in its file, from its place in the memory map.

    Raises:
        InputError: when its data is no contiguous view of a memory-mapped file.
    """
    root = _map_of(tensor.data)
    owner: Any = root.base
    if not (isinstance(root, np.memmap) and isinstance(owner, mmap.mmap) and tensor.data.flags.c_contiguous):
        expected = "a view of the file's memory map"
        raise InputError(f"tensor {tensor.name}", expected=expected, got="a copy", remedy="use --device cpu")
    return int(tensor.data.ctypes.data - root.ctypes.data + root.offset)


def file_chunks(model: ModelFile, offsets: Mapping[str, int], chunk_bytes: int = CHUNK_BYTES) -> list[FileChunk]:
    """Cut all tensors into chunks of at most ``chunk_bytes``, in the order of the files."""
    numbers = {id(_map_of(file.data)): number for number, file in enumerate(model.files)}
    chunks = []
    for name, tensor in model.tensors.items():
        start = file_offset(tensor)
        file = numbers[id(_map_of(tensor.data))]
        for done in range(0, tensor.num_bytes, chunk_bytes):
            size = min(chunk_bytes, tensor.num_bytes - done)
            chunks.append(FileChunk(file, start + done, offsets[name] + done, size))
    return sorted(chunks, key=lambda chunk: (chunk.file, chunk.file_offset))


class Copier(Protocol):
    """Moves chunks from host buffers to the arena; one per reading thread."""

    def buffer(self) -> Tensor:
        """Return a uint8 host buffer that no copy reads any more."""

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Start copying ``source``, part of the last ``buffer()``, to ``target``."""

    def finish(self) -> None:
        """Return when every copy has ended."""


class PinnedCopier:
    """Copies from two pinned buffers in turn on a stream of its own; one is filled while the other is copied."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._buffers = [torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._copied = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]
        self._turn = 0
        # The arena's memory may still be in use by work queued on the current stream before it was allocated.
        self._stream.wait_stream(torch.cuda.current_stream(device))

    def buffer(self) -> Tensor:
        """Return the buffer whose copy was started longest ago, once that is done."""
        self._turn = 1 - self._turn
        self._copied[self._turn].synchronize()
        return self._buffers[self._turn]

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Start the copy and mark its end."""
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            self._copied[self._turn].record(self._stream)

    def finish(self) -> None:
        """Wait for both buffers' copies."""
        self._stream.synchronize()


def read_into(descriptor: int, chunk: FileChunk, buffer: Tensor) -> Tensor:
    """Read a chunk into the start of ``buffer``; return that part.

    Raises:
        InputError: when the file ends early: it was cut since it was opened.
    """
    view = memoryview(buffer.numpy().data)[: chunk.num_bytes]
    done = 0
    while done < chunk.num_bytes:
        count = os.preadv(descriptor, [view[done:]], chunk.file_offset + done)
        if count == 0:
            expected = f"{chunk.num_bytes} bytes at byte {chunk.file_offset}"
            got = f"{done} bytes: it was cut while it was read"
            remedy = "restore the file, and do not change a model file that is in use"
            raise InputError("model file", expected=expected, got=got, remedy=remedy)
        done += count
    return buffer[: chunk.num_bytes]


def fill_arena(
    files: Sequence[MappedFile], chunks: Sequence[FileChunk], arena: Tensor, new_copier: Callable[[], Copier]
) -> None:
    """Read every chunk of the files into the uint8 arena, by up to ``MAX_THREADS`` threads with a copier each.

    ``new_copier`` makes a copier; it is called once per thread, on the calling thread.

    Raises:
        InputError: when a file cannot be read as it was when it was opened.
        FileChangedError: when another file has its name by now.
    """
    threads = max(1, min(MAX_THREADS, os.cpu_count() or 1, len(chunks)))
    queue = iter(chunks)
    lock = threading.Lock()

    def work(descriptors: Sequence[int], copier: Copier) -> None:
        while True:
            with lock:
                chunk = next(queue, None)
            if chunk is None:
                break
            source = read_into(descriptors[chunk.file], chunk, copier.buffer())
            copier.copy(source, arena[chunk.arena_offset : chunk.arena_offset + chunk.num_bytes])
        copier.finish()

    with contextlib.ExitStack() as opened:
        descriptors = [opened.enter_context(file.reopened()).fileno() for file in files]
        pool = opened.enter_context(ThreadPoolExecutor(threads))
        copiers = [new_copier() for _ in range(threads)]
        for future in [pool.submit(work, descriptors, copier) for copier in copiers]:
            future.result()


def scale_fields(type_name: str, packed: Tensor) -> Tensor:
    """Return a view of the scales of packed blocks, or of the weights themselves of a type without blocks."""
    form = block_format(type_name)
    blocks = packed.view(-1, form.block_bytes)
    if not form.is_quantized:
        return blocks.view(_FLOATS[type_name])
    offsets, *_ = FLOATS[type_name]
    return blocks[:, offsets[0] : offsets[-1] + 2].view(torch.float16)


def all_finite(type_name: str, packed: Tensor) -> Tensor:
    """Return whether every scale is finite and every weight below ``LARGEST``, by its scale: a bool tensor ``[]``."""
    if type_name in BAD_BLOCKS:
        bad: Tensor = BAD_BLOCKS[type_name](packed.view(-1, block_format(type_name).block_bytes))
        return ~bad.any()
    fields = scale_fields(type_name, packed)
    if block_format(type_name).is_quantized:
        return fields.isfinite().all()
    low, high = torch.aminmax(fields)  # both are NaN where one weight is
    return (low > -LARGEST) & (high < LARGEST)


def check_finite(path: Path, tensors: Mapping[str, DeviceTensor]) -> None:
    """Refuse a file with a block scale or weight that is NaN, infinite or too large: it would poison every output.

    Divisors of rotary frequencies were checked when the file was opened; those of pairs that do not turn are 1e30.

    Raises:
        InputError: naming the first such tensor.
    """
    names = [name for name in tensors if name != ROPE_FACTORS]
    finite = [all_finite(tensors[name].type, tensors[name].packed) for name in names]
    bad = (~torch.stack(finite)).nonzero().flatten().tolist()  # one answer for all: a single wait for the device
    if bad:
        subject, got = f"{path}: tensor {names[bad[0]]}", f"NaN, infinity or more in {len(bad)} tensors"
        expected, remedy = f"finite scales, and weights below {LARGEST:.2g}", "download or quantise the model again"
        raise InputError(subject, expected=expected, got=got, remedy=remedy)


def load_tensors(model: ModelFile, arena: Tensor, new_copier: Callable[[], Copier]) -> dict[str, DeviceTensor]:
    """Fill ``arena``, uint8 of at least ``arena_layout``'s bytes, with a model's tensors and check them.

    Returns:
        Every tensor of the file, as views of the arena.

    Raises:
        InputError: when the file was changed, or holds a scale that is not finite.
    """
    offsets, _ = arena_layout(model.tensors)
    fill_arena(model.files, file_chunks(model, offsets), arena, new_copier)
    loaded = {}
    for name, tensor in model.tensors.items():
        packed = arena[offsets[name] : offsets[name] + tensor.num_bytes]
        rows = math.prod(tensor.shape[:-1])
        loaded[name] = DeviceTensor(name, tensor.type, tensor.shape, packed.view(rows, -1), tensor.scale)
    check_finite(model.path, loaded)
    return loaded


def load_forward(
    model: ModelFile,
    backend: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    allocation: Allocation = "device",
    overlap: bool = True,
    graphs: bool = True,
    **bounds: int,
) -> CudaForward:
    """Load a model file onto the current CUDA device; ``bounds`` are those of ``CudaForward`` that are given.

    Raises:
        InputError: as ``load_tensors``, and when the kernels cannot be compiled.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    _, num_bytes = arena_layout(model.tensors)
    arena = allocate_bytes(num_bytes, allocation)
    tensors = load_tensors(model, arena, lambda: PinnedCopier(device))
    kernels = Kernels(device)
    forward = CudaForward(
        model.config, tensors, backend, kernels, dtype=dtype, overlap=overlap, graphs=graphs, **bounds
    )
    del tensors, arena
    # What repacking and a dense backend freed goes back to the driver before the first pass.
    torch.cuda.empty_cache()
    return forward
