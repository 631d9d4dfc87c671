"""What the fused loss asks of a teacher's output head, and a head that is held as a matrix.

Letters in shapes: M tokens, R rows of a tile, H hidden size, V rows of the head (its vocabulary, padding included).
"""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from q4kd.trainer.loss.config import LastStep


@runtime_checkable
class TeacherHead(Protocol):
    """What the fused loss asks of a teacher's head; called, it gives logits."""

    @property
    def rows(self) -> int:
        """Return the vocabulary size."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of the decoded weights, and of the hidden states in their products."""

    @property
    def last_step(self) -> LastStep:
        """What its products are still to go through before they are logits; a call has done it."""

    def __call__(self, hidden_MH: Tensor) -> Tensor:
        """Return logits ``[M, V]``."""

    def decoded(self) -> Tensor | None:
        """Return the whole head ``[V, H]`` decoded, or None where it is too large to be held."""

    def decode(self, start: int, stop: int, out_RH: Tensor) -> None:
        """Write rows ``start`` to ``stop`` to ``out_RH``, contiguous, of ``dtype``."""


class DenseHead:
    """A head that is held as a float matrix ``[V, H]``; its products are the logits."""

    last_step = LastStep()

    def __init__(self, weight_VH: Tensor) -> None:
        self._weight_VH = weight_VH.detach()
        self.rows, self.dtype = len(weight_VH), weight_VH.dtype

    def __call__(self, hidden_MH: Tensor) -> Tensor:
        """Return logits ``[M, V]`` in the weights' type."""
        return hidden_MH.to(self.dtype) @ self._weight_VH.T

    def decoded(self) -> Tensor:
        """Return the matrix itself."""
        return self._weight_VH

    def decode(self, start: int, stop: int, out_RH: Tensor) -> None:
        """Copy rows ``start`` to ``stop``."""
        out_RH.copy_(self._weight_VH[start:stop])
