"""Checks before the first step: a run that cannot teach anything is refused, not started."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from q4kd.trainer.data.batch import Batch
from q4kd.trainer.data.training_data import Order
from q4kd.trainer.errors import DegenerateDistillationError, InputError
from q4kd.trainer.files import sha256_file
from q4kd.trainer.formats.gguf.vocabulary import is_same_token
from q4kd.trainer.formats.model_file import ModelFile
from q4kd.trainer.loss.config import KDLossConfig
from q4kd.trainer.student.architecture import check_layers
from q4kd.trainer.student.folder import has_weights, refuse_student
from q4kd.trainer.student.model import DistillationModel, StudentHead
from q4kd.trainer.teacher.teacher import Teacher
from q4kd.trainer.train.distributed import reshard, whole
from q4kd.trainer.train.step import SignalSource

# The demo teacher sits 2.7e-3 nats from its own float32 original (so weights are compared too), and 3.7 to 4.0 nats
# from an untrained student.
KL_FLOOR = 1e-3
SAME_WEIGHTS_ERROR = 0.2
_PROBE_ROWS = 64
# What rounding may change between two passes over the same document, in the student's dtype, beside other documents.
_APART = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


def _wrong_vocabulary(expected: str, got: str, remedy: str) -> InputError:
    return InputError("vocabulary", expected=expected, got=got, remedy=remedy)


def check_vocabulary(
    teacher_tokens: Sequence[str], teacher_rows: int, student_ids: Mapping[str, int], rows: int
) -> None:
    """Check that every token the student knows has the same id in the teacher.

    Args:
        teacher_tokens: the teacher's token strings by id.
        teacher_rows: rows of the teacher's head.
        student_ids: the student tokenizer's token → id map.
        rows: rows of the student's head; the teacher's logits are cut to this width.

    Raises:
        InputError: when the student's head is wider than the teacher's, or narrower than its own tokenizer, or a
            token's ids differ.
    """
    highest = max(student_ids.values(), default=-1)
    if highest >= rows:
        raise _wrong_vocabulary(
            f"a student head with a row for each id of its tokenizer, {highest + 1}",
            f"{rows} rows",
            "resize its embedding, or give the tokenizer that belongs to it",
        )
    if rows > teacher_rows:
        raise _wrong_vocabulary(
            f"a student head of at most the teacher's {teacher_rows} rows",
            f"{rows} rows",
            "choose a student of the same model family",
        )
    if not teacher_tokens:
        raise _wrong_vocabulary("token strings in the teacher's file", "none", "convert it with its tokenizer")
    teacher_tokens = list(teacher_tokens)  # Asking a file's array for each of 151,936 tokens took 0.3 s.
    for token, index in student_ids.items():
        other = teacher_tokens[index] if index < len(teacher_tokens) else "nothing"
        if index >= len(teacher_tokens) or not is_same_token(other, token):
            raise _wrong_vocabulary(
                f"the same token at every id (student: id {index} is {token!r})",
                f"{other!r} in the teacher",
                "choose a student with the teacher's tokenizer; equal widths are not enough",
            )


def check_rows(folder: Path, student: Any, rows: int) -> None:
    """Refuse a student whose head has not the rows by which its run was planned and its data are read.

    Raises:
        InputError: naming both.
    """
    found = student.get_output_embeddings().weight.shape[0]
    if found != rows:
        raise refuse_student(folder, f"a head of {rows} rows, as its config says", str(found), "save the model again")


def check_labels(order: Order, path: Path) -> None:
    """Refuse data that has no label in any window, or in the first batches of a stream.

    Raises:
        InputError: when every label is masked.
    """
    if not order.has_label():
        expected, got = "at least one that is not masked", f"none in {path}"
        remedy = "set completion_only to false, mend the chat template, or unmask labels of pre-tokenised data"
        raise InputError("labels", expected=expected, got=got, remedy=remedy)


@contextmanager
def _without_dropout(model: Any) -> Iterator[None]:
    """Put the model into evaluation mode for a while: no dropout disturbs what is compared, nor is any drawn."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def check_isolation(model: Any, student_config: Any, vocab_size: int, seq_len: int, device: torch.device) -> None:
    """Refuse a student that packed documents would change: each must be, to rounding, what it is alone in a window.

    Another first document must not change the second, nor must its being there: a mask that is given takes the place of
    what a model's own code hides, such as a window. ``model`` is a prepared ``DistillationModel``, left in the mode it
    was in, and ``student_config`` the student's Hugging Face config.

    Raises:
        InputError: when one of them does, or layers keep a state.
    """
    check_layers(getattr(model, "module", model).student)
    first, dtype = min(4, seq_len // 2), getattr(model, "module", model).student.dtype
    positions = torch.arange(seq_len, device=device)
    ids_1T = (positions % vocab_size)[None]
    other_1T = torch.where(positions < first, (ids_1T + 1) % vocab_size, ids_1T)
    starts_1T = torch.where(positions < first, 0, first)[None]
    windows = ((ids_1T, starts_1T), (other_1T, starts_1T), (ids_1T[:, first:], None))
    with _without_dropout(model):
        packed, beside_another, alone = (
            model(ids, ids, None, 1, starts, use=lambda hidden, _head: hidden.clone())[-(seq_len - first) :].float()
            for ids, starts in windows
        )
    reshard(model)
    # What another document does is largest where few positions of its own are seen: in the first ones.
    compared = (beside_another, first, "see each other"), (alone, seq_len, "are not what they are alone")
    for found, length, said in compared:
        apart = (found[:length] - packed[:length]).norm() / packed[:length].norm()
        if not float(apart) <= _APART[dtype]:
            expected = "attention that takes a mask, for packing: documents"
            got = f"{type(student_config).__name__}, with which packed documents {said}"
            remedy = "set packing to none, or attn_implementation in its config.json to sdpa"
            raise InputError("student", expected=expected, got=got, remedy=remedy)


def same_weights(teacher: Teacher, model: DistillationModel) -> bool:
    """Return whether the student is the teacher up to quantisation, judged by its embedding rows."""
    embedding = model.student.get_input_embeddings().weight.detach()
    if embedding.shape != (teacher.config.vocab_size, teacher.config.hidden_size):
        return False
    embedding = whole(embedding, embedding)
    rows = torch.linspace(0, len(embedding) - 1, _PROBE_ROWS, device=embedding.device).long()
    teacher_rows = teacher.embed(rows).to(embedding.device)
    error = (embedding[rows].float() - teacher_rows).norm() / teacher_rows.norm()
    return bool(error < SAME_WEIGHTS_ERROR)


def holds_teacher_file(teacher: ModelFile, student: Path) -> bool:
    """Return whether a student folder with weights holds one of the teacher's own files, beside its quantised form.

    Only digests of GGUF files of their sizes are compared.
    """
    if not has_weights(student):
        return False
    sizes = {len(file.data) for file in teacher.files}
    same_size = [path for path in student.glob("*.gguf") if path.is_file() and path.stat().st_size in sizes]
    return bool(same_size) and not {file.sha256() for file in teacher.files}.isdisjoint(map(sha256_file, same_size))


@torch.no_grad()
def step_zero_kl(teacher: Teacher, model: Any, ids_BT: Tensor, starts_BT: Tensor | None = None) -> float:
    """Return the mean KL(teacher || student) in nats over the first sequence of a batch, without dropout.

    ``model`` may be wrapped, and is left in the mode it was in.
    """
    ids_1T, starts_1T = ids_BT[:1], None if starts_BT is None else starts_BT[:1]
    teacher_TH = teacher.hidden(ids_1T, starts_1T)[0]

    def measure(hidden_TH: Tensor, head: StudentHead) -> float:
        log_q = torch.log_softmax(head.logits(hidden_TH), -1)
        log_p = torch.log_softmax(teacher.head_logits(teacher_TH)[:, : log_q.shape[1]].float(), -1)
        return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())

    with _without_dropout(model):
        kl: float = model(ids_1T, ids_1T, None, 1, starts_1T, use=measure)
    reshard(model)
    return kl


def check_not_degenerate(
    teacher: Teacher, model: Any, ids_BT: Tensor, starts_BT: Tensor | None = None, *, folder: Path
) -> float:
    """Refuse a student of ``folder`` that already equals the teacher; return the KL of the first batch in nats.

    Raises:
        DegenerateDistillationError: when the weights are the same up to quantisation, the folder holds the teacher's
            file by digest, or the KL is under the floor.
    """
    kl = step_zero_kl(teacher, model, ids_BT, starts_BT)
    same = same_weights(teacher, getattr(model, "module", model)) or holds_teacher_file(teacher.model, folder)
    if same or kl < KL_FLOOR:
        raise _degenerate(f"{'the same weights, ' if same else ''}KL {kl:.2e}")
    return kl


@torch.no_grad()
def check_cached_not_degenerate(cached: SignalSource, model: Any, batch: Batch) -> float:
    """Refuse a student that already says what the cache does of a batch's first sequence; return the step-0 KL.

    The KL is taken over k + 1 events, so it is at most the KL over the vocabulary.

    Raises:
        DegenerateDistillationError: when it is under the floor.
    """
    first = batch[:1]
    signal, ids_T = cached.signal(first), first.ids_BT[0]

    def measure(hidden_TH: Tensor, head: StudentHead) -> float:
        config = KDLossConfig(alpha=0.0, last_step=head.last_step)
        # Every position counts, as with a loaded teacher: any token that is not masked serves as a label.
        return float(signal.loss(hidden_TH, head.weight, ids_T, num_targets=len(ids_T), config=config).kd)

    with _without_dropout(model):
        kl: float = model(first.ids_BT, first.ids_BT, None, 1, first.starts_BT, use=measure)
    reshard(model)
    if kl < KL_FLOOR:
        raise _degenerate(f"KL {kl:.2e} over the cached tokens")
    return kl


def _degenerate(got: str) -> DegenerateDistillationError:
    return DegenerateDistillationError(
        "teacher and student",
        expected=f"two different models (KL at step 0 of at least {KL_FLOOR:g} nats)",
        got=got,
        remedy="choose another student, or pass --allow-degenerate-kd to train regardless",
    )
