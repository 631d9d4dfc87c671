"""Weight matrices of the teacher: packed ones decode a tile at a time into one bounded scratch, dense ones do not.

Letters in shapes: M tokens, R rows (outputs), K columns (inputs).
"""

from typing import Protocol

import torch
from torch import Tensor

from q4kd.trainer.model_file import PackedTensor
from q4kd.trainer.quant import decode_rows

DEFAULT_SCRATCH_BYTES = 8 << 20


class Scratch:
    """The only dense float32 storage for packed weights: one buffer, allocated once, reused by every product.

    Args:
        num_bytes: its size; a single row that needs more enlarges it once, which ``num_bytes`` then reports.
    """

    def __init__(self, num_bytes: int = DEFAULT_SCRATCH_BYTES) -> None:
        self._buffer = torch.empty(num_bytes // 4, dtype=torch.float32)

    @property
    def num_bytes(self) -> int:
        """Bytes held now."""
        return self._buffer.numel() * 4

    def rows(self, cols: int) -> int:
        """Return how many rows of ``cols`` weights fit (at least one)."""
        return max(1, self._buffer.numel() // cols)

    def tile(self, rows: int, cols: int) -> Tensor:
        """Return float32 ``[rows, cols]`` of uninitialised scratch; the previous tile is overwritten."""
        if rows * cols > self._buffer.numel():
            self._buffer = torch.empty(rows * cols, dtype=torch.float32)
        return self._buffer[: rows * cols].view(rows, cols)


class Matrix(Protocol):
    """A frozen weight matrix ``[R, K]``: ``source_type`` is its GGML type in the file, ``held_as`` that in memory."""

    source_type: str
    held_as: str
    rows: int
    cols: int

    @property
    def resident_bytes(self) -> int:
        """Bytes this matrix keeps in memory."""

    @property
    def is_dense(self) -> bool:
        """Whether the weights are held decoded."""

    def product(self, x_MK: Tensor) -> Tensor:
        """Return float32 ``x @ W.T``, ``[M, R]``."""

    def gather(self, row_ids: Tensor) -> Tensor:
        """Return float32 rows ``[len(row_ids), K]``."""


class PackedMatrix:
    """A matrix that stays in its GGML blocks (a view of the file's memory map)."""

    is_dense = False

    def __init__(self, tensor: PackedTensor, scratch: Scratch) -> None:
        self.source_type = self.held_as = tensor.type
        self.rows, self.cols = tensor.shape
        self._packed = torch.from_numpy(tensor.data)
        self._scratch = scratch

    @property
    def resident_bytes(self) -> int:
        """Packed bytes; the shared scratch is reported apart."""
        return self._packed.numel()

    def product(self, x_MK: Tensor) -> Tensor:
        """Return float32 ``x @ W.T`` ``[M, R]``, a tile of rows at a time."""
        out_MR = torch.empty(x_MK.shape[0], self.rows, dtype=torch.float32)
        step = self._scratch.rows(self.cols)
        for start in range(0, self.rows, step):
            stop = min(start + step, self.rows)
            tile_RK = self._scratch.tile(stop - start, self.cols)
            decode_rows(self.source_type, self._packed[start:stop], tile_RK)
            torch.mm(x_MK, tile_RK.T, out=out_MR[:, start:stop])
        return out_MR

    def gather(self, row_ids: Tensor) -> Tensor:
        """Decode only the rows asked for: int64 ``[n]`` to float32 ``[n, K]``."""
        out = torch.empty(len(row_ids), self.cols, dtype=torch.float32)
        return decode_rows(self.source_type, self._packed[row_ids], out)


class DenseMatrix:
    """A matrix decoded to float32 once, at load. Several times the file's size: only by explicit choice of backend."""

    is_dense = True
    held_as = "F32"

    def __init__(self, tensor: PackedTensor) -> None:
        self.source_type = tensor.type
        self.rows, self.cols = tensor.shape
        self._weight_RK = decode_rows(tensor.type, torch.from_numpy(tensor.data), torch.empty(tensor.shape))

    @property
    def resident_bytes(self) -> int:
        """Bytes of the decoded matrix."""
        return self._weight_RK.numel() * 4

    def product(self, x_MK: Tensor) -> Tensor:
        """Return float32 ``x @ W.T`` ``[M, R]``."""
        return x_MK @ self._weight_RK.T

    def gather(self, row_ids: Tensor) -> Tensor:
        """Return float32 rows ``[n, K]``."""
        return self._weight_RK[row_ids]


def build_matrix(backend: str, tensor: PackedTensor, scratch: Scratch) -> Matrix:
    """Make the weight matrix of one tensor for a backend: ``q4k`` keeps the blocks, ``dense`` decodes them now."""
    return PackedMatrix(tensor, scratch) if backend == "q4k" else DenseMatrix(tensor)


def decode_vector(tensor: PackedTensor) -> Tensor:
    """Return a norm or bias as float32 ``[length]`` (a copy: vectors are small and used at every step)."""
    out = torch.empty(1, tensor.shape[0], dtype=torch.float32)
    return decode_rows(tensor.type, torch.from_numpy(tensor.data).view(1, -1), out)[0]
