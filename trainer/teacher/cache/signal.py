"""A cached teacher signal: its most likely tokens of each position, and the mass of all others in the tail.

Letters in shapes: M positions, K listed tokens, V rows of the vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from q4kd.trainer.device.host_copy import copy_from_host

# This is far above 2^-8, which rounding a log-probability of -16 to float16 takes from a sum of one.
_SUM_TOLERANCE = 1e-2


@dataclass(frozen=True)
class TopKSignal:
    """The teacher's distribution over k tokens and the tail at M positions."""

    ids_MK: Tensor  # int64 token ids
    log_probs_MK: Tensor  # float32
    tail_M: Tensor  # float32 log-probability of all other tokens

    def to(self, device: torch.device) -> "TopKSignal":
        """Return the signal on a device."""
        return TopKSignal(*(copy_from_host(part, device) for part in (self.ids_MK, self.log_probs_MK, self.tail_M)))


def take_top(logits_MV: Tensor, k: int) -> TopKSignal:
    """Return the k most likely tokens, 1 to V, of each row of logits, and the mass of the others, in float32."""
    log_p_MV = torch.log_softmax(logits_MV.float(), -1)
    log_probs_MK, ids_MK = log_p_MV.topk(k, dim=-1)
    # The tail is summed by itself: one minus the listed probabilities would lose a small one to rounding.
    tail_M = log_p_MV.scatter_(1, ids_MK, -torch.inf).logsumexp(-1)
    return TopKSignal(ids_MK, log_probs_MK, tail_M)


def as_stored(signal: TopKSignal) -> TopKSignal:
    """Return a signal as it is read back: rounded to float16, each position made to sum to one."""
    return normalise(signal.ids_MK, signal.log_probs_MK.half().float(), signal.tail_M.half().float())


def normalise(ids_MK: Tensor, log_probs_MK: Tensor, tail_M: Tensor) -> TopKSignal:
    """Return the signal of what was read, each position made to sum to one.

    Raises:
        ValueError: where rounding does not explain what is missing.
    """
    total_M = torch.logaddexp(log_probs_MK.logsumexp(-1), tail_M)
    furthest = float((total_M.exp() - 1).abs().max())
    if not furthest <= _SUM_TOLERANCE:  # NaN is refused too.
        raise ValueError(f"probabilities that miss one by {furthest:.2g}")
    return TopKSignal(ids_MK, log_probs_MK - total_M.unsqueeze(-1), tail_M - total_M)
