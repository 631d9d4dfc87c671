"""Held-out evaluation: the student's loss, its distance from the teacher and how often both prefer the same token."""

from dataclasses import dataclass

import torch

from q4kd.trainer.data import TokenSet
from q4kd.trainer.student import DistillationModel
from q4kd.trainer.teacher import Teacher


@dataclass(frozen=True)
class Evaluation:
    """Means over held-out tokens.

    Attributes:
        loss: cross-entropy of the student, nats per token.
        kl: KL(teacher || student) at temperature 1, nats per token.
        agreement: share of tokens at which both have the same most likely next token.
        tokens: tokens evaluated.
    """

    loss: float
    kl: float
    agreement: float
    tokens: int


@torch.no_grad()
def evaluate(
    model: DistillationModel, teacher: Teacher, tokens: TokenSet, *, seq_len: int, batch_size: int, max_tokens: int
) -> Evaluation | None:
    """Evaluate on the first ``max_tokens`` held-out tokens; None when there is not even one window.

    Logits exist for one chunk of tokens at a time, as in training.
    """
    windows = min(tokens.num_windows(seq_len), max_tokens // seq_len)
    if windows == 0:
        return None
    was_training, device = model.training, model.head_weight.device
    model.eval()
    loss = kl = agree = 0.0
    for start in range(0, windows, batch_size):
        chosen = range(start, min(start + batch_size, windows))
        batch = torch.stack([torch.from_numpy(tokens.window(index, seq_len)).long() for index in chosen]).to(device)
        ids_BT, labels_M = batch[:, :-1], batch[:, 1:].flatten()
        student_MH = model.hidden(ids_BT).flatten(0, 1)
        teacher_MH = teacher.hidden(ids_BT).flatten(0, 1)
        for rows in torch.split(torch.arange(len(labels_M), device=device), model.config.chunk_tokens):
            log_q = torch.log_softmax(student_MH[rows] @ model.head_weight.T, -1)
            log_p = torch.log_softmax(teacher.head_logits(teacher_MH[rows])[:, : log_q.shape[1]], -1)
            loss -= float(log_q.gather(1, labels_M[rows].unsqueeze(1)).sum(dtype=torch.float64))
            kl += float((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64))
            agree += float((log_p.argmax(-1) == log_q.argmax(-1)).sum())
    model.train(was_training)
    count = windows * seq_len
    return Evaluation(loss=loss / count, kl=kl / count, agreement=agree / count, tokens=count)
