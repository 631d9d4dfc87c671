"""The three divergences of ``fused.py`` and their derivatives, of whole rows or of some columns of them.

Values are sums over columns, so the values of a row's tiles add up to the row's; a derivative needs of the whole row
only the student's part of them. Letters in shapes: C rows, V columns.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from q4kd.trainer.loss.config import KDLossConfig

# Elements that are copied to float64 at one time.
_COPIED = 1 << 19


@dataclass(frozen=True)
class Distributions:
    """Teacher p and student q at temperature T, and their logarithms, ``[C, V]``; for jsd also log m."""

    p: Tensor
    log_p: Tensor
    q: Tensor
    log_q: Tensor
    log_m: Tensor | None


def distributions(log_p: Tensor, log_q: Tensor, config: KDLossConfig) -> Distributions:
    """Return what ``values`` and ``slope`` read of log-probabilities ``[C, V]``."""
    log_m = None
    if config.divergence == "jsd":
        log_m = torch.logaddexp(log_p + math.log(config.beta), log_q + math.log1p(-config.beta))
    return Distributions(log_p.exp(), log_p, log_q.exp(), log_q, log_m)


def divergence_rows(log_p: Tensor, log_q: Tensor, config: KDLossConfig) -> tuple[Tensor, Tensor]:
    """Return D per row, float64 ``[C]``, and its gradient ``[C, V]`` with respect to the scaled logits s / T.

    ``log_p`` are the teacher's log-probabilities ``[C, V]``, ``log_q`` the student's.
    """
    both = distributions(log_p, log_q, config)
    rows_C, student_2C = values(both, config)
    return rows_C, slope(both, student_2C, config)


def values(of: Distributions, config: KDLossConfig) -> tuple[Tensor, Tensor]:
    """Return D, float64 ``[C]``, and what ``slope`` needs of the whole rows, float64 ``[2, C]``.

    The latter are the sums of q * f and of q, where f is dD/dq up to a constant; they are zeros for forward_kl.
    """
    sum_p, sum_q = sum_rows(of.p), sum_rows(of.q)
    if config.divergence == "forward_kl":
        value = kl_rows(of.p, of.log_p, of.log_q, sum_q - sum_p)
        return value, value.new_zeros(2, len(value))
    student_2C = torch.stack([sum_rows(_tilt(of, config), of.q), sum_q])
    if of.log_m is None:
        return student_2C[0] + (sum_p - sum_q), student_2C
    sum_m = sum_rows(of.log_m.exp())
    teacher_part = kl_rows(of.p, of.log_p, of.log_m, sum_m - sum_p)
    student_part = kl_rows(of.q, of.log_q, of.log_m, sum_m - sum_q)
    return config.beta * teacher_part + (1 - config.beta) * student_part, student_2C


def slope(of: Distributions, student_2C: Tensor, config: KDLossConfig) -> Tensor:
    """Return dD/d(s / T) ``[C, V]``, given the whole rows' sums that ``values`` returns; jsd overwrites ``of.q``.

    It is q * (f - mean of f under q). The mean is that of f as rounded here, not D: where q is nearly one-hot, f and
    its mean nearly cancel, and D's own rounding would be a large part of the difference.
    """
    if config.divergence == "forward_kl":
        return of.q - of.p
    tilt_CV = subtract_rows(_tilt(of, config), student_2C[0] / student_2C[1])
    return tilt_CV.mul_(of.q if of.log_m is None else of.q.mul_(1 - config.beta))


def _tilt(of: Distributions, config: KDLossConfig) -> Tensor:
    """Return f ``[C, V]``: log q - log p, or for jsd log q - log m + log(1 - beta) without ever taking a log m.

    The latter is -log(1 + beta p / ((1 - beta) q)): small where p is, whatever the size of the logarithms. The odds are
    cut off at e^80, past which q is too small to count.
    """
    if of.log_m is None:
        return of.log_q - of.log_p
    odds = math.log(config.beta) - math.log1p(-config.beta)
    return (of.log_p - of.log_q).add_(odds).clamp_(max=80).exp_().log1p_().neg_()


def subtract_rows(values_CV: Tensor, of_rows_C: Tensor) -> Tensor:
    """Subtract a float64 number of each row in place, in two parts: rounded, it would tilt a whole row by one error."""
    coarse_C = of_rows_C.to(values_CV.dtype)
    fine_C = (of_rows_C - coarse_C).to(values_CV.dtype)
    return values_CV.sub_(coarse_C.unsqueeze(1)).sub_(fine_C.unsqueeze(1))


def kl_rows(a: Tensor, log_a: Tensor, log_b: Tensor, excess: Tensor) -> Tensor:
    """Return KL(a || b) per row, float64 ``[C]``, as the Bregman form: sum of a * (log a - log b) - a + b.

    The sums of a and b are both one, up to rounding; keeping them cancels the rounding of the two normalisations to
    first order, which the textbook form adds to the result. At equality every term is exactly zero.
    ``excess`` is the sum of each of b's rows minus that of a's, float64 ``[C]``.
    """
    return sum_rows(log_a - log_b, a) + excess


def sum_rows(values_CV: Tensor, weights_CV: Tensor | None = None) -> Tensor:
    """Return the sum of each row, or of its products with weights, float64 ``[C]``; of products no bit is lost.

    A few rows are summed at a time, since torch copies to float64 on the CPU what it sums in float64.
    """
    rows = max(1, _COPIED // values_CV.shape[1])
    parts = torch.split(values_CV, rows)
    if weights_CV is None:
        return torch.cat([part.sum(-1, dtype=torch.float64) for part in parts])
    pairs = zip(parts, torch.split(weights_CV, rows), strict=True)
    return torch.cat([part.double().mul_(weights).sum(-1) for part, weights in pairs])
