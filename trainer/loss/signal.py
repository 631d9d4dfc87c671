"""The teacher as the loss sees it: none, or the signal of a teacher that is online or cached.

Letters in shapes: M tokens, H hidden size, V vocabulary of the student.
"""

from typing import NotRequired, Protocol, TypedDict, Unpack

from torch import Tensor

from q4kd.trainer.loss.config import KDLossConfig
from q4kd.trainer.loss.fused import kd_loss
from q4kd.trainer.loss.sums import LossTerms


class LossOptions(TypedDict):
    """What every loss is told beside its tensors; see ``kd_loss``."""

    num_targets: float
    config: KDLossConfig
    positions_P: NotRequired[Tensor | None]  # int64, the positions that have a label where the host knows them


class TeacherSignal(Protocol):
    """The teacher's side of the loss on one micro-batch."""

    def loss(self, hidden_MH: Tensor, weight_VH: Tensor, labels_M: Tensor, **options: Unpack[LossOptions]) -> LossTerms:
        """Return the loss of the student's hidden states ``[M, H]`` and head ``[V, H]`` against this teacher."""


def cross_entropy(hidden_MH: Tensor, weight_VH: Tensor, labels_M: Tensor, **options: Unpack[LossOptions]) -> LossTerms:
    """Return the loss without a teacher."""
    return kd_loss(hidden_MH, weight_VH, labels_M, teacher_hidden=None, teacher_head=None, **options)
