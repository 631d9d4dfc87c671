"""What a step is taught by: an online teacher's hidden states and head, or its cached distribution over k tokens.

Letters in shapes: B sequences, T positions, M = B * T tokens, H hidden size, V vocabulary of the student.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NotRequired, Protocol, TypedDict, Unpack

import torch
from torch import Tensor

from q4kd.trainer.errors import InputError
from q4kd.trainer.kd_loss import kd_loss
from q4kd.trainer.loss_config import KDLossConfig
from q4kd.trainer.loss_sums import LossTerms
from q4kd.trainer.loss_topk import check_distributions, topk_kd_loss

if TYPE_CHECKING:
    from q4kd.trainer.cache_signal import Signal


class LossOptions(TypedDict):
    """What every form of the loss is told beside its tensors; see ``kd_loss``."""

    num_targets: float
    config: KDLossConfig
    positions_P: NotRequired[Tensor | None]


def cross_entropy(hidden_MH: Tensor, weight_VH: Tensor, labels_M: Tensor, **options: Unpack[LossOptions]) -> LossTerms:
    """Return the loss without a teacher."""
    return kd_loss(hidden_MH, weight_VH, labels_M, teacher_hidden=None, teacher_head=None, **options)


class TeacherSignal(Protocol):
    """The teacher's side of the loss on one micro-batch."""

    def loss(self, hidden_MH: Tensor, weight_VH: Tensor, labels_M: Tensor, **options: Unpack[LossOptions]) -> LossTerms:
        """Return the loss of the student's hidden states ``[M, H]`` and head ``[V, H]`` against this teacher."""


@dataclass(frozen=True)
class OnlineSignal:
    """Hidden states of a teacher that is here.

    Attributes:
        hidden_BTH: final hidden states of the teacher.
        head: its ``TeacherHead``.
    """

    hidden_BTH: Tensor
    head: Callable[[Tensor], Tensor]

    def loss(self, hidden_MH: Tensor, weight_VH: Tensor, labels_M: Tensor, **options: Unpack[LossOptions]) -> LossTerms:
        """Return the loss over the whole vocabulary; see ``kd_loss``."""
        return kd_loss(
            hidden_MH,
            weight_VH,
            labels_M,
            teacher_hidden=self.hidden_BTH.flatten(0, 1),
            teacher_head=self.head,
            **options,
        )


@dataclass(frozen=True)
class CachedSignal:
    """A distribution over k tokens and the tail, read from a cache.

    Attributes:
        top: of M positions.
        is_checked: whether ``check_signal`` has seen it.
    """

    top: "Signal"
    is_checked: bool = False

    def loss(self, hidden_MH: Tensor, weight_VH: Tensor, labels_M: Tensor, **options: Unpack[LossOptions]) -> LossTerms:
        """Return the loss over k + 1 events; see ``topk_kd_loss``.

        Raises:
            InputError: when what was read is not a distribution over different tokens.
        """
        with _explaining_signals():
            return topk_kd_loss(
                hidden_MH,
                weight_VH,
                labels_M,
                topk_ids_MK=self.top.ids_MK,
                topk_log_probs_MK=self.top.log_probs_MK,
                tail_log_prob_M=self.top.tail_M,
                **options,
                is_checked=self.is_checked,
            )


def check_signal(top: "Signal", vocab: int) -> None:
    """Check a signal on the host, so that no step reads it back from a device.

    Raises:
        InputError: as ``CachedSignal.loss``, for any of its positions.
    """
    with _explaining_signals():
        check_distributions(top.ids_MK, torch.cat([top.log_probs_MK, top.tail_M.unsqueeze(1)], 1), vocab)


@contextlib.contextmanager
def _explaining_signals() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise InputError(
            "teacher_cache",
            expected="signals that q4kd cache wrote",
            got=str(error)[:160],
            remedy="delete the cache's folder and make it anew",
        ) from error
