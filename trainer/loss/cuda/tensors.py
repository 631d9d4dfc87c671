"""What a call of the CUDA loss works on, and the product that makes its logits.

Letters in shapes: P unmasked tokens, C tokens of a chunk, R columns of a tile, H hidden size, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from q4kd.trainer.kernels.numerics import multiply
from q4kd.trainer.loss.config import KDLossConfig


@dataclass(frozen=True)
class LossTensors:
    """A call's tensors on the device, masked positions left out, in the types of their products."""

    hidden: Tensor  # [P, H]
    weight: Tensor  # [V, H]
    labels: Tensor  # [P]
    positions: Tensor  # [P]
    teacher_hidden: Tensor | None  # [P, H']
    teacher_head: Any  # a TeacherHead, or a function to logits
    config: KDLossConfig
    logits_type: torch.dtype

    @property
    def kind(self) -> str:
        """Which kernels serve: a divergence's, or ``ce`` for the cross-entropy alone."""
        return "ce" if self.teacher_hidden is None else self.config.divergence

    def logits(self, rows: int, columns: int) -> Tensor:
        """Return a new buffer of logits."""
        return torch.empty(rows, columns, dtype=self.logits_type, device=self.hidden.device)


def project(x_CH: Tensor, weight_RH: Tensor, out_CR: Tensor) -> None:
    """Write ``x @ W.T`` to ``out``, also where cuBLAS cannot write the type of ``out``."""
    if out_CR.dtype in (x_CH.dtype, torch.float32):
        multiply(x_CH, weight_RH, out_CR)
    else:
        out_CR.copy_(x_CH @ weight_RH.T)
