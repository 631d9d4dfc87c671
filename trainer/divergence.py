"""The three divergences of ``kd_loss.py`` and their derivatives, of whole rows or of some columns of them.

Values are sums over columns, so that a tile's add up to its row's; what a derivative needs of the whole row is the
student's part of it. Letters in shapes: C rows, V columns.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from q4kd.trainer.loss_terms import KDLossConfig

# Elements that are copied to float64 at one time.
_COPIED = 1 << 20


@dataclass(frozen=True)
class Distributions:
    """Teacher p and student q at temperature T, and their logarithms, ``[C, V]``; of jsd, log m as well."""

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


def values(of: Distributions, config: KDLossConfig) -> tuple[Tensor, Tensor]:
    """Return D and the student's part of it, float64 ``[C]``: of reverse_kl D itself, of jsd KL(q || m)."""
    if config.divergence == "forward_kl":
        value = kl_rows(of.p, of.log_p, of.log_q, sum_rows(of.q))
        return value, value
    if config.divergence == "reverse_kl":
        value = kl_rows(of.q, of.log_q, of.log_p, sum_rows(of.p))
        return value, value
    assert of.log_m is not None
    sum_m = sum_rows(of.log_m.exp())
    student_part = kl_rows(of.q, of.log_q, of.log_m, sum_m)
    teacher_part = kl_rows(of.p, of.log_p, of.log_m, sum_m)
    return config.beta * teacher_part + (1 - config.beta) * student_part, student_part


def slope(of: Distributions, student_part_C: Tensor, config: KDLossConfig) -> Tensor:
    """Return dD/d(s / T) ``[C, V]``, given the student's part of the whole rows, ``[C]``; jsd overwrites ``of.q``."""
    if config.divergence == "forward_kl":
        return of.q - of.p
    part_C1 = student_part_C.to(of.q.dtype).unsqueeze(-1)
    if config.divergence == "reverse_kl":
        return (of.log_q - of.log_p).sub_(part_C1).mul_(of.q)
    assert of.log_m is not None
    return (of.log_q - of.log_m).sub_(part_C1).mul_(of.q.mul_(1 - config.beta))


def kl_rows(a: Tensor, log_a: Tensor, log_b: Tensor, sum_b: Tensor) -> Tensor:
    """Return KL(a || b) per row, float64 ``[C]``, as the Bregman form: sum of a * (log a - log b) - a + b.

    The sums of a and b are both one, up to rounding; keeping them cancels the rounding of the two normalisations to
    first order, which the textbook form adds to the result. At equality every term is exactly zero.
    ``sum_b`` holds the sums of b's rows, float64 ``[C]``.
    """
    terms = sum_rows((log_a - log_b).mul_(a))
    return terms + (sum_b - sum_rows(a))


def sum_rows(values: Tensor) -> Tensor:
    """Return the sum of each row in float64, ``[C]``. The CPU's torch copies what it sums to float64: a few rows."""
    rows = max(1, _COPIED // values.shape[1])
    return torch.cat([part.sum(-1, dtype=torch.float64) for part in values.split(rows)])
