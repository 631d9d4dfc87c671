"""The distillation loss against a cached teacher: its k most likely tokens, and one bucket for all others.

The equation is that of ``fused.py`` with D taken over k + 1 events: the k listed tokens, and "any other token"
(the *tail*), whose probability is what the listed ones leave. The student's tail is the sum of its own probabilities
of the tokens not listed, so nothing is dropped and both sides add up to one.

Merging outcomes cannot increase an f-divergence (data-processing inequality: Csiszar 1967; Cover and Thomas, Elements
of Information Theory, 2nd edition, section 2.8 and theorem 2.7.1, the log-sum inequality), so each of the three
divergences over the k + 1 events is a lower bound of the same one over the whole vocabulary, and equals it when k is
the vocabulary or when teacher and student share their proportions within the tail.

Gradient: with event log-odds u (u_i = s_i for a listed token, u_tail = log of the sum of exp(s) over the others),
dD/ds_i = dD/du_i for a listed token and dD/du_tail * softmax over the tail for any other; dD/du is what
``divergence_rows`` returns.

Letters in shapes: M tokens, C tokens of a chunk, K listed tokens, H hidden size, V vocabulary.
"""

import numpy as np
import torch
from torch import Tensor

from q4kd.trainer.loss.config import KDLossConfig
from q4kd.trainer.loss.divergence import divergence_rows
from q4kd.trainer.loss.last_step import apply_last_step, chain, slope_of
from q4kd.trainer.loss.sums import LossSums, LossTerms, fused_loss, multiply_wide, target_positions, wide_type

# log of the smallest normal float32: a probability that was rounded to zero is taken to be this, not nothing.
_LEAST_LOG_PROB = -87.33
# How far the listed probabilities and the tail's may add up to something else than one.
_SUM_TOLERANCE = 1e-2
# Tokens of a chunk on CUDA, where three float32 [C, V] of 151,936 columns are then 1.9 GB.
_CUDA_CHUNK = 1024


def topk_kd_loss(
    hidden_MH: Tensor,
    weight_VH: Tensor,
    labels_M: Tensor,
    *,
    topk_ids_MK: Tensor,
    topk_log_probs_MK: Tensor,
    tail_log_prob_M: Tensor,
    num_targets: float,
    config: KDLossConfig,
    positions_P: Tensor | None = None,
    is_checked: bool = False,
) -> LossTerms:
    """Compute the loss against cached log-probabilities; see the module's text.

    Args:
        hidden_MH: student hidden states before its head, ``[M, H]``.
        weight_VH: student head ``[V, H]``.
        labels_M: int64 next-token ids ``[M]``; ``IGNORE_INDEX`` masks a position in both terms.
        topk_ids_MK: int32 or int64 ``[M, K]``, different from each other within a row, below V.
        topk_log_probs_MK: the teacher's log-probabilities of these tokens at temperature 1, float ``[M, K]``.
        tail_log_prob_M: log of the teacher's probability of all other tokens, ``[M]``; may be minus infinity.
        num_targets: divisor of both sums, > 0: targets of the whole accumulated batch.
        config: the equation's knobs; ``mode`` is not used, nothing larger than ``[C, V]`` exists.
        positions_P: int64 ``[P]``, the positions that are not masked, rising; as in ``kd_loss``.
        is_checked: whether ``check_distributions`` has seen the signal: on a device the host would wait for it here.

    Returns:
        Scalars in float64; ``loss`` is differentiable in ``hidden_MH`` and ``weight_VH``.

    Raises:
        ValueError: for a temperature other than 1 (log-probabilities of some tokens do not tell the others' at another
            temperature), for ids or log-probabilities that are not a distribution, or for ``num_targets`` <= 0.
    """
    if config.temperature != 1:
        raise ValueError(f"cached log-probabilities are those of temperature 1, got temperature {config.temperature}")
    if positions_P is None:
        positions_P = target_positions(labels_M)
    ids_MK, tail_M1 = topk_ids_MK.long(), tail_log_prob_M.unsqueeze(1)
    log_p_ME = torch.cat([topk_log_probs_MK.float(), tail_M1.float()], 1)
    if config.alpha < 1 and not is_checked:
        check_distributions(ids_MK[positions_P], log_p_ME[positions_P], weight_VH.shape[0])

    # Tensor cores on CUDA: bfloat16 operands, float32 logits and sums. Elsewhere all of it is wide.
    on_tensor_cores = hidden_MH.is_cuda and hidden_MH.dtype == torch.bfloat16
    dtype = torch.bfloat16 if on_tensor_cores else wide_type(weight_VH)
    chunk = config.chunk_tokens or (_CUDA_CHUNK if hidden_MH.is_cuda else config.chunk_for(len(weight_VH)))

    def compute(sums: LossSums) -> None:
        weight = weight_VH.detach().to(dtype)
        for rows in torch.split(positions_P, chunk):
            hidden_CH = hidden_MH.detach()[rows].to(dtype)
            logits_CV = multiply_wide(hidden_CH, weight.T)
            log_p_CE = log_p_ME[rows].to(logits_CV.dtype)
            ce, kd, grad_CV = _chunk_terms(logits_CV, ids_MK[rows], log_p_CE, labels_M[rows], config)
            sums.add_terms(ce, kd)
            if sums.wanted:
                grad_CV = grad_CV.mul_(1 / num_targets).to(dtype)
                sums.add_gradient(rows, grad_CV, hidden_CH, weight, share=1)

    return fused_loss(hidden_MH, weight_VH, num_targets, config, compute)


def check_distributions(ids_MK: Tensor, log_p_ME: Tensor, vocab: int) -> None:
    """Refuse what is not a distribution over different tokens below ``vocab``, before anything is indexed with it.

    Args:
        ids_MK: int64 token ids ``[M, K]``.
        log_p_ME: float log-probabilities of these and of the tail, ``[M, K + 1]``.
        vocab: V.

    Raises:
        ValueError: with what was found.
    """
    if ids_MK.numel() == 0:
        return
    low, high = int(ids_MK.min()), int(ids_MK.max())
    if low < 0 or high >= vocab:
        raise ValueError(f"cached token ids: expected 0 to {vocab - 1}, got {low} to {high}")
    # NumPy sorts rows of 32-bit numbers seventy times as fast as torch on the host: 0.5 ms for 8,192 of 64.
    on_host = ids_MK.device.type == "cpu"
    ordered = torch.from_numpy(np.sort(ids_MK.int().numpy(), 1)) if on_host else ids_MK.sort(1).values
    if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        raise ValueError("cached token ids: expected different ones within a position, got a repeated one")
    furthest = float((log_p_ME.logsumexp(1).exp() - 1).abs().max())
    if not furthest <= _SUM_TOLERANCE:  # also NaN
        got = f"one that is off by {furthest}"
        raise ValueError(f"cached log-probabilities: expected a sum of 1 with the tail, got {got}")


def _chunk_terms(
    student_CV: Tensor, ids_CK: Tensor, log_p_CE: Tensor, labels_C: Tensor, config: KDLossConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Return summed CE, summed D and the summed loss's gradient with respect to the head's products ``student_CV``.

    It is made in their place.
    """
    student_CV = apply_last_step(student_CV, config.last_step)
    slope = slope_of(student_CV, config.last_step)
    labels_C1 = labels_C.unsqueeze(1)
    listed_CK, label_C1 = student_CV.gather(1, ids_CK), student_CV.gather(1, labels_C1)
    # The tail is summed by itself: one minus the listed probabilities would lose a small one to rounding.
    student_CV.scatter_(1, ids_CK, -torch.inf)
    tail_C1 = student_CV.logsumexp(1, keepdim=True).clamp_min_(torch.finfo(student_CV.dtype).min / 2)
    events_CE = torch.cat([listed_CK, tail_C1], 1)
    total_C1 = events_CE.logsumexp(1, keepdim=True)
    ce = (total_C1 - label_C1).sum(dtype=torch.float64)
    log_q_CE = (events_CE - total_C1).clamp_min_(_LEAST_LOG_PROB)
    log_p_CE = (log_p_CE - log_p_CE.logsumexp(1, keepdim=True)).clamp_min_(_LEAST_LOG_PROB)
    grad_CE = config.alpha * log_q_CE.exp()
    kd = torch.zeros_like(ce)
    if config.alpha < 1:
        values, gradient = divergence_rows(log_p_CE, log_q_CE, config)
        kd = values.sum()
        grad_CE += (1 - config.alpha) * gradient
    grad_CV = student_CV.sub_(tail_C1).exp_().mul_(grad_CE[:, -1:])  # zero where a token is listed
    grad_CV.scatter_(1, ids_CK, grad_CE[:, :-1])
    grad_CV.scatter_add_(1, labels_C1, torch.full_like(label_C1, -config.alpha))
    return ce, kd, chain(grad_CV, slope)
