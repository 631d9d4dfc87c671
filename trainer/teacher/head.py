"""The output head of a teacher that stays in its blocks: logits of hidden states, decoded whole, or decoded in tiles.

Letters in shapes: M tokens, R rows of a tile, H hidden size, V rows of the head (its vocabulary, padding included).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from q4kd.trainer.loss.config import LastStep
from q4kd.trainer.teacher.forward import Forward


class PackedHead:
    """The head of a teacher that stays in its blocks.

    Args:
        logits: the teacher's ``head_logits``.
        forward: decodes the head.
        rows: V.
        dtype: the compute dtype.
    """

    def __init__(self, logits: Callable[[Tensor], Tensor], forward: Forward, rows: int, dtype: torch.dtype) -> None:
        self._logits, self._forward = logits, forward
        self.rows, self.dtype = rows, dtype
        # A scale of the logits is in the hidden states already.
        self.last_step = LastStep(cap=forward.config.logit_cap)

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
