"""Weight matrices on a CUDA device: packed blocks, or decoded once; ``stream.py`` decodes packed ones as they are used.

A *group* is a set of matrices that share their input (Q, K and V; gate and up) and are multiplied by one GEMM.

Letters in shapes: M tokens, R rows (outputs), K columns (inputs).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from q4kd.trainer.kernels.teacher_kernels import Kernels


# The largest batch for which reading packed weights in the product beats decoding them first.
FUSED_MAX_TOKENS = 16
_FUSED_LAYOUTS = ("Q4_K", "Q6_K_SOA")
_DTYPE_NAMES = {torch.bfloat16: "BF16", torch.float32: "F32"}


@dataclass(frozen=True)
class DeviceTensor:
    """One tensor of a model file on the device, in the file's own bytes."""

    name: str  # GGUF name
    type: str  # GGML type name
    shape: tuple[int, ...]  # (rows, cols) or (length,)
    packed: Tensor  # uint8 [rows, row_bytes], contiguous; one row for a vector
    scale: float = 1.0  # of the whole tensor; only NVFP4 has one


class CudaMatrix:
    """A frozen weight matrix ``[R, K]``, packed in its blocks or decoded once.

    Q6_K blocks are 210 bytes, never aligned: ``repack`` moves their fields into aligned planes within the same bytes.
    """

    def __init__(self, tensor: DeviceTensor, kernels: "Kernels") -> None:
        self.source_type = self.held_as = tensor.type
        self.rows, self.cols = tensor.shape
        self.is_dense = False
        self._kernels, self._layout = kernels, tensor.type
        self._data = tensor.packed
        self._scale = {} if tensor.scale == 1.0 else {"scale": tensor.scale}
        if tensor.type == "Q6_K":
            # Copied back over the file's bytes: the allocation stays the same, the copy is freed at once.
            self._data.view(-1).copy_(kernels.repack_q6_k(self._data).view(-1))
            self._layout = "Q6_K_SOA"

    @property
    def resident_bytes(self) -> int:
        """Bytes that this matrix keeps on the device."""
        return self._data.nbytes

    @property
    def is_fusable(self) -> bool:
        """Return whether ``multiply_few`` can read it: packed in a type that has a small-batch kernel."""
        return not self.is_dense and self._layout in _FUSED_LAYOUTS

    def densify(self, out_RK: Tensor) -> None:
        """Decode into ``out_RK``, bfloat16 or float32 ``[R, K]``, keep that and drop the packed bytes."""
        self.decode(0, self.rows, out_RK)
        self.hold(out_RK)

    def hold(self, decoded: Tensor) -> None:
        """Keep the decoded weights, bfloat16 or float32, and drop the packed bytes."""
        self._data, self.is_dense, self.held_as = decoded, True, _DTYPE_NAMES[decoded.dtype]

    def decode(self, start: int, stop: int, out: Tensor) -> None:
        """Write rows ``start`` to ``stop`` to ``out``, bfloat16 or float32 ``[stop - start, K]``, contiguous."""
        if self.is_dense:
            out.copy_(self._data[start:stop])
        else:
            self._kernels.decode(self._layout, self._data, start, stop, self.cols, out, **self._scale)

    def gather(self, row_ids: Tensor, out: Tensor) -> None:
        """Write the rows of int64 ids ``[n]`` to ``out``, float32 ``[n, K]``."""
        if self.is_dense:
            out.copy_(self._data[row_ids])
        else:
            self._kernels.gather(self._layout, self._data, self.cols, row_ids, out)

    def multiply_few(self, x_MK: Tensor, out_MR: Tensor) -> None:
        """Write ``x @ W.T`` of at most ``FUSED_MAX_TOKENS`` rows from the packed bytes, by the small-batch kernel."""
        self._kernels.matvec(self._layout, self._data, x_MK, self.rows, out_MR)


class Group:
    """Matrices that share their input, rows stacked in the given order."""

    def __init__(self, matrices: Sequence[CudaMatrix]) -> None:
        self.matrices = tuple(matrices)
        self.rows = sum(matrix.rows for matrix in matrices)
        self.cols = matrices[0].cols
        self.resident: Tensor | None = None

    @property
    def is_fusable(self) -> bool:
        """Return whether every matrix has a small-batch kernel."""
        return all(matrix.is_fusable for matrix in self.matrices)

    def densify(self, dtype: torch.dtype, device: torch.device) -> None:
        """Decode every matrix into one resident ``[R, K]``."""
        self.resident = torch.empty(self.rows, self.cols, dtype=dtype, device=device)
        row = 0
        for matrix in self.matrices:
            matrix.densify(self.resident[row : row + matrix.rows])
            row += matrix.rows

    def multiply_few(self, x_MK: Tensor, out_MR: Tensor) -> None:
        """Write ``x @ W.T`` of a small batch, one fused product per matrix."""
        row = 0
        for matrix in self.matrices:
            matrix.multiply_few(x_MK, out_MR[:, row : row + matrix.rows])
            row += matrix.rows
