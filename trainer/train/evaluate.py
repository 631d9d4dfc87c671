"""Held-out evaluation: the student's loss, its distance from the teacher and how often both prefer the same token."""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from q4kd.trainer.data.batch import Batch
from q4kd.trainer.loss.config import KDLossConfig
from q4kd.trainer.loss.divergence import divergence_rows
from q4kd.trainer.student.model import StudentHead
from q4kd.trainer.teacher.teacher import Teacher
from q4kd.trainer.train.distributed import reshard

# Tokens whose logits exist at one time; their float32 log-probabilities over a vocabulary of 152k take 150 MB.
CHUNK_TOKENS = 256


@dataclass(frozen=True)
class Evaluation:
    """Means over held-out tokens that have a label.

    Attributes:
        loss: cross-entropy of the student, nats per token.
        perplexity: exp(loss).
        kl: KL(teacher || student) at temperature 1, nats per token; None without a teacher.
        agreement: share of tokens at which both have the same most likely next token; None without a teacher.
        tokens: tokens evaluated.
    """

    loss: float
    perplexity: float
    kl: float | None
    agreement: float | None
    tokens: int

    @property
    def figures(self) -> dict[str, float]:
        """What was measured, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def describe(self) -> str:
        """Return the figures in words."""
        words = [f"loss: {self.loss:.4f}"]
        if self.kl is not None and self.agreement is not None:
            words += [f"KL to teacher: {self.kl:.4f}", f"top-1 agreement: {self.agreement:.2%}"]
        return ", ".join([*words, f"perplexity: {self.perplexity:.2f}"]) + f" ({self.tokens} tokens)"


@torch.no_grad()
def evaluate(accelerator: Any, model: Any, teacher: Teacher | None, batches: Iterable[Batch]) -> Evaluation | None:
    """Evaluate on this process's batches and all others'; None when no token of any has a label.

    All processes must call it together, with equally many batches under FSDP.

    Args:
        accelerator: ``accelerate.Accelerator``.
        model: prepared ``DistillationModel``; it is left in the mode it was in.
        teacher: None when there is only a cache, which holds nothing of held-out text.
        batches: batches of this process, on its device; they may hold no labels.

    Logits exist for one chunk of tokens at a time, as in training; log-probabilities are float32, sums float64.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=accelerator.device)
    for batch in batches:
        teacher_MH = teacher.hidden_of(batch).flatten(0, 1) if teacher is not None else None
        measure = functools.partial(_sums, batch=batch, teacher=teacher, teacher_MH=teacher_MH)
        sums += model(batch.ids_BT, batch.labels_BT, None, 1, batch.starts_BT, use=measure)
    reshard(model)
    model.train(was_training)
    loss, kl, agree, count = accelerator.reduce(sums, reduction="sum").tolist()
    if count == 0:
        return None
    return Evaluation(
        loss=loss / count,
        perplexity=math.exp(min(loss / count, 700.0)),
        kl=kl / count if teacher is not None else None,
        agreement=agree / count if teacher is not None else None,
        tokens=int(count),
    )


def _sums(
    hidden_MH: Tensor, head: StudentHead, batch: Batch, teacher: Teacher | None, teacher_MH: Tensor | None
) -> Tensor:
    """Return summed cross-entropy, KL, agreement and count over labelled positions, float64 ``[4]``."""
    sums = torch.zeros(4, dtype=torch.float64, device=hidden_MH.device)
    labels_M = batch.labels_BT.flatten()
    for rows in torch.split(batch.facts.positions_P, CHUNK_TOKENS):
        log_q = torch.log_softmax(head.logits(hidden_MH[rows]), -1)
        sums[0] -= log_q.gather(1, labels_M[rows].unsqueeze(1)).sum(dtype=torch.float64)
        sums[3] += len(rows)
        if teacher is not None and teacher_MH is not None:
            teacher_CV = teacher.head_logits(teacher_MH[rows])[:, : log_q.shape[1]]
            log_p = torch.log_softmax(teacher_CV.float(), -1)
            sums[1] += divergence_rows(log_p, log_q, KDLossConfig())[0].sum()
            sums[2] += (log_p.argmax(-1) == log_q.argmax(-1)).sum()
    return sums
