"""The distillation loss, fused with both heads and chunked over tokens.

One equation, with logits s (student) and t (teacher), labels y and temperature T::

    L = alpha * CE(s, y) + (1 - alpha) * T^2 * D(softmax(t / T), softmax(s / T))

    forward_kl   D = KL(p || q)            p = softmax(t / T), q = softmax(s / T)
    reverse_kl   D = KL(q || p)
    jsd          D = beta * KL(p || m) + (1 - beta) * KL(q || m),  m = beta * p + (1 - beta) * q

(Hinton et al., https://arxiv.org/abs/1503.02531; generalised JSD as in https://arxiv.org/abs/2306.13649.) Every
divergence is zero at equality. Sums run over the positions whose label is not ``IGNORE`` and are divided by
``num_targets``, the count of such positions in the whole accumulated batch.

Nothing larger than ``[chunk, V]`` exists: each chunk's logits, loss and gradients are made and dropped before the next.
Letters in shapes: M tokens, C tokens of a chunk, H hidden size, V vocabulary.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from q4kd.trainer.loss_terms import (
    DIVERGENCES,
    IGNORE,
    MODES,
    Divergence,
    KDLossConfig,
    LossSums,
    LossTerms,
    Mode,
    fused_loss,
    wide,
)

__all__ = ["DIVERGENCES", "IGNORE", "MODES", "Divergence", "KDLossConfig", "LossTerms", "Mode", "kd_loss"]


def divergence_rows(log_p: Tensor, log_q: Tensor, config: KDLossConfig) -> tuple[Tensor, Tensor]:
    """Return D per row and its gradient with respect to the student's scaled logits s / T.

    Args:
        log_p: teacher log-probabilities ``[C, V]``.
        log_q: student log-probabilities ``[C, V]``.
        config: selects D and beta.

    Returns:
        ``(D float64 [C], dD/d(s/T) [C, V])``.
    """
    q = log_q.exp()
    if config.divergence == "forward_kl":
        p = log_p.exp()
        return _kl_rows(p, log_p, q, log_q), q - p
    if config.divergence == "reverse_kl":
        ratio = log_q - log_p
        value = _kl_rows(q, log_q, log_p.exp(), log_p)
        return value, q * (ratio - value.to(q.dtype).unsqueeze(-1))
    beta = config.beta
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    m = log_m.exp()
    student_part = _kl_rows(q, log_q, m, log_m)
    value = beta * _kl_rows(log_p.exp(), log_p, m, log_m) + (1 - beta) * student_part
    return value, (1 - beta) * q * (log_q - log_m - student_part.to(q.dtype).unsqueeze(-1))


def _kl_rows(a: Tensor, log_a: Tensor, b: Tensor, log_b: Tensor) -> Tensor:
    """Return KL(a || b) per row, float64 ``[C]``, as the Bregman form: sum of a * (log a - log b) - a + b.

    The sums of a and b are both one, up to rounding; keeping them cancels the rounding of the two normalisations to
    first order, which the textbook form adds to the result. At equality every term is exactly zero.
    """
    terms = (a * (log_a - log_b)).sum(-1, dtype=torch.float64)
    return terms + (b.sum(-1, dtype=torch.float64) - a.sum(-1, dtype=torch.float64))


def _chunk_terms(
    student_CV: Tensor, teacher_CV: Tensor | None, labels_C: Tensor, config: KDLossConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Return summed CE, summed T^2 * D and the summed loss's gradient with respect to the student's logits."""
    log_q = torch.log_softmax(student_CV, -1)
    ce = -log_q.gather(1, labels_C.unsqueeze(1)).sum(dtype=torch.float64)
    grad_CV = log_q.exp()
    grad_CV.scatter_add_(1, labels_C.unsqueeze(1), -torch.ones_like(labels_C, dtype=grad_CV.dtype).unsqueeze(1))
    grad_CV *= config.alpha
    if teacher_CV is None:
        return ce, torch.zeros((), dtype=torch.float64, device=ce.device), grad_CV
    heat = config.temperature
    if heat != 1.0:
        log_q = torch.log_softmax(student_CV / heat, -1)
    log_p = torch.log_softmax(teacher_CV / heat, -1)
    rows, gradient = divergence_rows(log_p, log_q, config)
    # d(T^2 D)/ds = T^2 * dD/d(s/T) / T
    grad_CV.add_(gradient, alpha=(1 - config.alpha) * heat)
    return ce, heat**2 * rows.sum(), grad_CV


def kd_loss(
    hidden_MH: Tensor,
    weight_VH: Tensor,
    labels_M: Tensor,
    *,
    teacher_hidden: Tensor | None,
    teacher_head: Callable[[Tensor], Tensor] | None,
    num_targets: float,
    config: KDLossConfig,
) -> LossTerms:
    """Compute the loss of the module's equation.

    Args:
        hidden_MH: student hidden states before its head, ``[M, H]``.
        weight_VH: student head ``[V, H]``.
        labels_M: int64 next-token ids ``[M]``; ``IGNORE`` masks a position in both terms.
        teacher_hidden: the teacher's hidden states ``[M, H']``; None only with ``alpha`` = 1.
        teacher_head: maps ``[C, H']`` to logits ``[C, V']``, V' >= V; the columns past V are dropped.
        num_targets: divisor of both sums, > 0: targets of the whole accumulated batch.
        config: the equation's knobs.

    Returns:
        Scalars in float64; ``loss`` is differentiable in ``hidden_MH`` and ``weight_VH``.

    Raises:
        ValueError: when the teacher is missing although ``alpha`` < 1, or ``num_targets`` is not positive.
    """
    if config.alpha < 1 and (teacher_hidden is None or teacher_head is None):
        raise ValueError(f"alpha = {config.alpha} needs a teacher")
    if config.alpha == 1:
        teacher_hidden = teacher_head = None
    positions = (labels_M != IGNORE).nonzero().squeeze(1)

    def compute(sums: LossSums) -> None:
        weight = wide(weight_VH.detach())
        for rows in torch.split(positions, config.chunk_for(len(weight))):
            hidden_CH = wide(hidden_MH.detach()[rows])
            teacher_CV = None
            if teacher_head is not None and teacher_hidden is not None:
                # Teachers may have padding rows past the student's vocabulary: slice before softmax.
                teacher_CV = teacher_head(teacher_hidden[rows])[:, : len(weight)].to(weight.dtype)
            ce, kd, grad_CV = _chunk_terms(hidden_CH @ weight.T, teacher_CV, labels_M[rows], config)
            sums.add_terms(ce, kd)
            sums.add_gradient(rows, grad_CV, hidden_CH, weight)

    return fused_loss(hidden_MH, weight_VH, num_targets, config.alpha, compute)
