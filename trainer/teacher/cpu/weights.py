"""Weight matrices of the teacher: packed ones are decoded a tile at a time into one bounded scratch.

Letters in shapes: M tokens, R rows (outputs), K columns (inputs).
"""

import copy
import math
from typing import Self

import torch
from torch import Tensor

from q4kd.trainer.formats.blocks.decode import decode_rows
from q4kd.trainer.formats.model_file import PackedTensor
from q4kd.trainer.kernels.gemm import empty_huge, multiply

# The scratch holds the largest matrix of a model of hidden size 768 whole, so its product needs no second copy.
DEFAULT_SCRATCH_BYTES = 16 << 20
# A bfloat16 tile is decoded in float32 runs of this many weights (4 MiB, what the decoders take at once), then rounded
# once. Of runs half as long twice as many start the threads, which is slow where other programs keep the cores busy.
_RUN_WEIGHTS = 1 << 20
# So many rows are multiplied at once where a product is made in parts; each part is copied into the result from cache.
_TILE_ROWS = 1024


class Scratch:
    """The only dense storage for packed weights: one buffer, allocated once, reused by every product.

    Args:
        num_bytes: size in bytes; a single row that needs more enlarges it once, which ``num_bytes`` then reports.
    """

    def __init__(self, num_bytes: int = DEFAULT_SCRATCH_BYTES) -> None:
        self._buffer = _huge_floats(num_bytes // 4)

    @property
    def num_bytes(self) -> int:
        """Bytes held now."""
        return self._buffer.numel() * 4

    def rows(self, cols: int) -> int:
        """Return how many rows of ``cols`` weights fit (at least one), in float32 or bfloat16 alike."""
        return max(1, self._buffer.numel() // cols)

    def tile(self, rows: int, cols: int) -> Tensor:
        """Return float32 ``[rows, cols]`` of uninitialised scratch; the previous tile is overwritten."""
        return self._floats(rows * cols).view(rows, cols)

    def halves(self, rows: int, cols: int) -> tuple[Tensor, Tensor]:
        """Return bfloat16 ``[rows, cols]`` and, behind it, float32 ``[n, cols]`` of at least one row.

        The two do not overlap; the previous tile is overwritten.
        """
        half = (rows * cols + 1) // 2
        spare = self._floats(half + min(rows * cols, max(cols, self._buffer.numel() - half)))[half:]
        run_rows = min(max(1, _RUN_WEIGHTS // cols), spare.numel() // cols)
        tile = self._buffer[:half].view(torch.bfloat16)[: rows * cols].view(rows, cols)
        return tile, spare[: run_rows * cols].view(run_rows, cols)

    def _floats(self, count: int) -> Tensor:
        if count > self._buffer.numel():
            self._buffer = _huge_floats(count)
        return self._buffer[:count]


def _huge_floats(count: int) -> Tensor:
    """Return uninitialised float32 ``[count]`` in huge pages: small ones cost a tile more look-ups of addresses."""
    return empty_huge(1, count)[0]


class PackedMatrix:
    """A frozen matrix ``[R, K]`` that stays in its GGML blocks (a view of the file's memory map).

    ``source_type`` is its GGML type in the file, ``held_as`` the one in memory. Experts ``[E, R, K]`` lie after one
    another, as ``[E * R, K]``; ``part`` gives one of them.
    """

    is_dense = False

    def __init__(self, tensor: PackedTensor, scratch: Scratch) -> None:
        self.source_type = self.held_as = tensor.type
        self.rows, self.cols = math.prod(tensor.shape[:-1]), tensor.shape[-1]
        self._packed, self._scale = torch.from_numpy(tensor.data), tensor.scale
        self._scratch = scratch

    @property
    def resident_bytes(self) -> int:
        """Packed bytes, without the shared scratch."""
        return self._packed.numel()

    def part(self, start: int, stop: int) -> Self:
        """Return rows ``start`` to ``stop`` as a matrix of their own, over the same bytes and the same scratch."""
        part = copy.copy(self)
        part._packed, part.rows = self._packed[start:stop], stop - start
        return part

    def product(self, x_MK: Tensor) -> Tensor:
        """Return ``x @ W.T`` ``[M, R]`` in the dtype of ``x``, float32 or bfloat16, a tile of rows at a time."""
        if self._scratch.rows(self.cols) >= self.rows:
            return multiply(x_MK, self._decode(0, self.rows, x_MK.dtype))
        return self._tiled(x_MK, x_MK.new_empty(x_MK.shape[0], self.rows))

    def project(self, x_MK: Tensor, out_MR: Tensor | None = None) -> Tensor:
        """Return the product as float32 ``[M, R]``, in ``out_MR`` if given, whatever it is computed in."""
        return self._tiled(x_MK, empty_huge(x_MK.shape[0], self.rows) if out_MR is None else out_MR)

    def _tiled(self, x_MK: Tensor, out_MR: Tensor) -> Tensor:
        step = min(self._scratch.rows(self.cols), _TILE_ROWS)
        for start in range(0, self.rows, step):
            stop = min(start + step, self.rows)
            out_MR[:, start:stop] = multiply(x_MK, self._decode(start, stop, x_MK.dtype))
        return out_MR

    def _decode(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return rows ``start`` to ``stop`` in the scratch; bfloat16 is rounded once from the float32 values."""
        packed = self._packed[start:stop]
        if dtype == torch.float32:
            return decode_rows(self.source_type, packed, self._scratch.tile(stop - start, self.cols), self._scale)
        tile_RK, run = self._scratch.halves(stop - start, self.cols)
        for part, target in zip(torch.split(packed, len(run)), torch.split(tile_RK, len(run)), strict=True):
            target.copy_(decode_rows(self.source_type, part, run[: len(part)], self._scale))
        return tile_RK

    def decode(self, start: int, stop: int, out_RK: Tensor) -> None:
        """Write rows ``start`` to ``stop`` to ``out_RK``, a scratch at a time; bfloat16 is rounded once."""
        for first in range(start, stop, self._scratch.rows(self.cols)):
            last = min(first + self._scratch.rows(self.cols), stop)
            out_RK[first - start : last - start] = self._decode(first, last, out_RK.dtype)

    def gather(self, row_ids: Tensor) -> Tensor:
        """Decode only the rows asked for: int64 ``[n]`` to float32 ``[n, K]``."""
        out = torch.empty(len(row_ids), self.cols, dtype=torch.float32)
        return decode_rows(self.source_type, self._packed[row_ids], out, self._scale)


class DenseMatrix:
    """A frozen matrix ``[R, K]`` decoded once, at load, to float32 or bfloat16 (one rounding).

    It takes several times its size in the file; only the ``dense`` backend makes one.
    """

    is_dense = True

    def __init__(self, tensor: PackedTensor, dtype: torch.dtype = torch.float32) -> None:
        self.source_type = tensor.type
        self.held_as = "F32" if dtype == torch.float32 else "BF16"
        self.rows, self.cols = math.prod(tensor.shape[:-1]), tensor.shape[-1]
        self._weight_RK = torch.empty(self.rows, self.cols, dtype=dtype)
        packed = torch.from_numpy(tensor.data)
        step = max(1, _RUN_WEIGHTS // self.cols)
        for part, target in zip(torch.split(packed, step), torch.split(self._weight_RK, step), strict=True):
            target.copy_(decode_rows(tensor.type, part, torch.empty(target.shape), tensor.scale))

    @property
    def resident_bytes(self) -> int:
        """Bytes of the decoded matrix."""
        return self._weight_RK.nbytes

    def part(self, start: int, stop: int) -> Self:
        """Return rows ``start`` to ``stop`` as a matrix of their own, over the same memory."""
        part = copy.copy(self)
        part._weight_RK, part.rows = self._weight_RK[start:stop], stop - start
        return part

    def product(self, x_MK: Tensor) -> Tensor:
        """Return ``x @ W.T`` ``[M, R]`` in the dtype that the matrix is held in."""
        return multiply(x_MK.to(self._weight_RK.dtype), self._weight_RK)

    def project(self, x_MK: Tensor, out_MR: Tensor | None = None) -> Tensor:
        """Return the product as float32 ``[M, R]``, in ``out_MR`` if given."""
        out_MR = empty_huge(x_MK.shape[0], self.rows) if out_MR is None else out_MR
        for start in range(0, self.rows, _TILE_ROWS):
            rows = slice(start, start + _TILE_ROWS)
            out_MR[:, rows] = multiply(x_MK.to(self._weight_RK.dtype), self._weight_RK[rows])
        return out_MR

    def decode(self, start: int, stop: int, out_RK: Tensor) -> None:
        """Copy rows ``start`` to ``stop`` to ``out_RK``."""
        out_RK.copy_(self._weight_RK[start:stop])

    def gather(self, row_ids: Tensor) -> Tensor:
        """Return float32 rows ``[n, K]``."""
        return self._weight_RK[row_ids].float()


Matrix = PackedMatrix | DenseMatrix


def build_matrix(backend: str, tensor: PackedTensor, scratch: Scratch, dtype: torch.dtype = torch.float32) -> Matrix:
    """Make the weight matrix of one tensor for a backend: ``q4k`` keeps the blocks, ``dense`` decodes them now."""
    return PackedMatrix(tensor, scratch) if backend == "q4k" else DenseMatrix(tensor, dtype)


def decode_vector(tensor: PackedTensor) -> Tensor:
    """Return a norm or bias as float32 ``[length]``, or the biases of experts or a convolution's taps, two-dimensional.

    It is a copy: vectors are small and used at every step.
    """
    out = torch.empty(math.prod(tensor.shape[:-1]), tensor.shape[-1], dtype=torch.float32)
    return decode_rows(tensor.type, torch.from_numpy(tensor.data).view(len(out), -1), out).view(tensor.shape)
