"""A teacher's output head as the fused loss takes it: logits of hidden states, decoded whole, or decoded in tiles.

Letters in shapes: M tokens, R rows of a tile, H hidden size, V rows of the head (its vocabulary, padding included).
"""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class TeacherHead(Protocol):
    """What the fused loss asks of a teacher's head; called, it gives logits."""

    @property
    def rows(self) -> int:
        """V."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the decoded weights, and of the hidden states in their products."""

    def __call__(self, hidden_MH: Tensor) -> Tensor:
        """Return logits ``[M, V]``."""

    def decoded(self) -> Tensor | None:
        """Return the whole head ``[V, H]`` decoded, or None where it is too large to be held."""

    def decode(self, start: int, stop: int, out_RH: Tensor) -> None:
        """Write rows ``start`` to ``stop`` to ``out_RH``, contiguous, of ``dtype``."""


class DenseHead:
    """A head that is held as a matrix.

    Args:
        weight_VH: float ``[V, H]``.
    """

    def __init__(self, weight_VH: Tensor) -> None:
        self._weight_VH = weight_VH.detach()

    @property
    def rows(self) -> int:
        """V."""
        return self._weight_VH.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self._weight_VH.dtype

    def __call__(self, hidden_MH: Tensor) -> Tensor:
        """Return logits ``[M, V]`` in the weights' type."""
        return hidden_MH.to(self.dtype) @ self._weight_VH.T

    def decoded(self) -> Tensor:
        """Return the matrix itself."""
        return self._weight_VH

    def decode(self, start: int, stop: int, out_RH: Tensor) -> None:
        """Copy rows ``start`` to ``stop``."""
        out_RH.copy_(self._weight_VH[start:stop])


class _HeadForward(Protocol):
    """The part of a forward pass that a packed head is made of; see ``teacher.Forward``."""

    def decoded_head(self) -> Tensor | None:
        """Return the decoded head, if it may be held."""

    def decode_head(self, start: int, stop: int, out_RH: Tensor) -> None:
        """Decode rows of the head."""


class _Logits(Protocol):
    def __call__(self, hidden_MH: Tensor) -> Tensor: ...


class PackedHead:
    """The head of a teacher that stays in its blocks.

    Args:
        logits: the teacher's ``head_logits``.
        forward: decodes the head.
        rows: V.
        dtype: the compute dtype.
    """

    def __init__(self, logits: _Logits, forward: _HeadForward, rows: int, dtype: torch.dtype) -> None:
        self._logits, self._forward = logits, forward
        self._rows, self._dtype = rows, dtype

    @property
    def rows(self) -> int:
        """V."""
        return self._rows

    @property
    def dtype(self) -> torch.dtype:
        """The teacher's compute dtype."""
        return self._dtype

    def __call__(self, hidden_MH: Tensor) -> Tensor:
        """Return float32 logits ``[M, V]``, detached."""
        return self._logits(hidden_MH)

    def decoded(self) -> Tensor | None:
        """Return the decoded head ``[V, H]``, or None where it is too large to be held.

        On CUDA it is held until the next forward pass, and counted in the teacher's ``scratch_bytes``; on the CPU it is
        the caller's.
        """
        return self._forward.decoded_head()

    def decode(self, start: int, stop: int, out_RH: Tensor) -> None:
        """Decode rows ``start`` to ``stop`` into ``out_RH``, bfloat16 rounded once from float32."""
        self._forward.decode_head(start, stop, out_RH)
