"""What a step is taught by, as the loss sees it: nobody, or a signal of a teacher that is online or cached.

Letters in shapes: M tokens, H hidden size, V vocabulary of the student.
"""

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from q4kd.trainer.kd_loss import KDLossConfig, LossTerms, kd_loss

if TYPE_CHECKING:
    from q4kd.trainer.batch import Batch


def cross_entropy(
    hidden_MH: Tensor, weight_VH: Tensor, labels_M: Tensor, *, num_targets: float, config: KDLossConfig
) -> LossTerms:
    """Return the loss without a teacher."""
    nobody = {"teacher_hidden": None, "teacher_head": None}
    return kd_loss(hidden_MH, weight_VH, labels_M, **nobody, num_targets=num_targets, config=config)


class TeacherSignal(Protocol):
    """The teacher's side of the loss on one micro-batch."""

    def loss(
        self, hidden_MH: Tensor, weight_VH: Tensor, labels_M: Tensor, *, num_targets: float, config: KDLossConfig
    ) -> LossTerms:
        """Return the loss of the student's hidden states ``[M, H]`` and head ``[V, H]`` against this teacher."""


class SignalSource(Protocol):
    """Where signals come from: ``Teacher``, which computes them, or ``CachedTeacher``, which reads them."""

    def signal(self, batch: "Batch") -> TeacherSignal:
        """Return the signal of every position of a batch, on the batch's device."""
