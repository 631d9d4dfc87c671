"""What a step is taught by: an online teacher's hidden states and head, or its cached distribution over k tokens.

Letters in shapes: B sequences, T positions, M = B * T tokens, H hidden size, V vocabulary of the student.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from q4kd.trainer.errors import InputError
from q4kd.trainer.kd_loss import KDLossConfig, LossTerms, kd_loss
from q4kd.trainer.loss_topk import topk_kd_loss

if TYPE_CHECKING:
    from q4kd.trainer.batch import Batch
    from q4kd.trainer.cache_signal import Signal


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


@dataclass(frozen=True)
class OnlineSignal:
    """Hidden states of a teacher that is here.

    Attributes:
        hidden_BTH: final hidden states of the teacher.
        head: its ``TeacherHead``.
    """

    hidden_BTH: Tensor
    head: Callable[[Tensor], Tensor]

    def loss(
        self, hidden_MH: Tensor, weight_VH: Tensor, labels_M: Tensor, *, num_targets: float, config: KDLossConfig
    ) -> LossTerms:
        """Return the loss over the whole vocabulary; see ``kd_loss``."""
        return kd_loss(
            hidden_MH,
            weight_VH,
            labels_M,
            teacher_hidden=self.hidden_BTH.flatten(0, 1),
            teacher_head=self.head,
            num_targets=num_targets,
            config=config,
        )


@dataclass(frozen=True)
class CachedSignal:
    """A distribution over k tokens and the tail, read from a cache.

    Attributes:
        top: of M positions.
    """

    top: "Signal"

    def loss(
        self, hidden_MH: Tensor, weight_VH: Tensor, labels_M: Tensor, *, num_targets: float, config: KDLossConfig
    ) -> LossTerms:
        """Return the loss over k + 1 events; see ``topk_kd_loss``.

        Raises:
            InputError: when what was read is not a distribution over different tokens.
        """
        try:
            return topk_kd_loss(
                hidden_MH,
                weight_VH,
                labels_M,
                topk_ids_MK=self.top.ids_MK,
                topk_log_probs_MK=self.top.log_probs_MK,
                tail_log_prob_M=self.top.tail_M,
                num_targets=num_targets,
                config=config,
            )
        except ValueError as error:
            raise InputError(
                "teacher_cache",
                expected="signals that q4kd cache wrote",
                got=str(error)[:160],
                remedy="delete the cache's folder and make it anew",
            ) from error
