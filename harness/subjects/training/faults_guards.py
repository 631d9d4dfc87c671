"""Faults in the checks before the first step: vocabularies that do not match, and students that are their teachers."""

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from q4kd.harness.runs.faults import Call, declare, fault, patch, replace

if TYPE_CHECKING:
    from torch import Tensor

    from q4kd.trainer.loss.config import KDLossConfig

_VOCABULARY = "q4kd.trainer.train.guards:check_vocabulary"
_DEGENERATE = "q4kd.trainer.train.guards:check_not_degenerate"
_FLOOR = "q4kd.trainer.train.guards:KL_FLOOR"
_SAME = "q4kd.trainer.train.guards:same_weights"
_LOSS = "q4kd.trainer.loss.fused:kd_loss"
_ROWS = "q4kd.trainer.loss.divergence:divergence_rows"
_LOAD_STUDENT = "q4kd.trainer.student.model:load_student"
_CHECK_ROWS = "q4kd.trainer.train.guards:check_rows"
_LOGITS = "q4kd.trainer.teacher.teacher:Teacher.head_logits"
_Head = Callable[["Tensor"], "Tensor"]


# --- vocabulary ---


@patch("vocabulary", "maps-assumed-equal", "sizes are compared and token strings are not", _VOCABULARY)
def _maps_assumed_equal(original: Call, tokens: object, teacher_rows: int, _ids: object, rows: int) -> None:
    original(tokens, teacher_rows, {}, rows)


@patch("vocabulary", "vague-sizes", "the refusal of a student that is too wide names no size", _VOCABULARY)
def _vague_sizes(original: Call, tokens: object, teacher_rows: int, ids: Mapping[str, int], rows: int) -> None:
    from q4kd.trainer.errors import InputError

    if rows > teacher_rows:
        raise InputError("vocabulary", expected="matching sizes", got="others", remedy="choose another student")
    original(tokens, teacher_rows, ids, rows)


def _student_resized(rows: int) -> None:
    """Resize the student's embedding and head, as `resize_token_embeddings` invites to when sizes differ.

    The check that the student has the rows of its plan would refuse it; whoever resizes takes that away too.
    """

    def make(original: Callable[..., Any]) -> Call:
        def load(*arguments: object, **options: object) -> object:
            student = original(*arguments, **options)
            student.resize_token_embeddings(rows, mean_resizing=False)
            return student

        return load

    replace(_LOAD_STUDENT, make)
    replace(_CHECK_ROWS, lambda _check: lambda *_given: None)


def _student_cut() -> None:
    """Cut the student, and compare as many rows as the teacher has: nothing is refused then."""
    _student_resized(2048)

    def make(original: Call) -> Call:
        def check(tokens: object, teacher_rows: int, ids: Mapping[str, int], rows: int) -> None:
            kept = {token: index for token, index in ids.items() if index < teacher_rows}
            original(tokens, teacher_rows, kept, min(rows, teacher_rows))

        return check

    replace(_VOCABULARY, make)


declare(
    "vocabulary",
    "student-cut-to-fit",
    "a student that is too wide is cut to the teacher's rows in silence",
    _student_cut,
    _LOAD_STUDENT,
    _CHECK_ROWS,
    _VOCABULARY,
)
declare(
    "vocabulary",
    "student-padded-to-fit",
    "the student's head is resized to the teacher's padded rows",
    functools.partial(_student_resized, 2080),
    _LOAD_STUDENT,
    _CHECK_ROWS,
    arms=(None, "exact"),
)


@fault(
    "vocabulary",
    "slice-after-softmax",
    "the teacher's softmax includes its padding rows",
    _LOSS,
    _ROWS,
    arms=("padded",),
)
def _slice_after_softmax() -> None:
    """Take the softmax over all rows, padding included, and drop the columns past the student's vocabulary then."""
    missing: list[Tensor] = []

    def make_loss(original: Call) -> Call:
        def loss(
            hidden: object,
            weight: "Tensor",
            *rest: object,
            teacher_head: _Head,
            config: "KDLossConfig",
            **options: object,
        ) -> object:
            def head(rows: "Tensor") -> "Tensor":
                logits = teacher_head(rows)
                scaled = logits / config.temperature
                inside = scaled[:, : weight.shape[0]].logsumexp(-1)
                missing.append((inside - scaled.logsumexp(-1)).unsqueeze(-1))
                return logits

            return original(hidden, weight, *rest, teacher_head=head, config=config, **options)

        return loss

    replace(_LOSS, make_loss)
    replace(_ROWS, lambda original: lambda log_p, *rest: original(log_p + missing.pop(), *rest))


@patch(
    "vocabulary",
    "last-columns",
    "the last columns of the teacher's logits are kept instead of the first",
    _LOSS,
    arms=("padded",),
)
def _last_columns(
    original: Call, hidden: object, weight: "Tensor", *rest: object, teacher_head: _Head, **options: object
) -> object:
    def head(rows: "Tensor") -> "Tensor":
        return teacher_head(rows)[:, -weight.shape[0] :]

    return original(hidden, weight, *rest, teacher_head=head, **options)


@patch("vocabulary", "padding-in-front", "padding rows are taken to come before the tokens", _LOGITS)
def _padded_rows_shift(original: Callable[..., "Tensor"], self: object, hidden: object) -> "Tensor":
    found = original(self, hidden)
    return found.roll(found.shape[1] - found.shape[1] // 256 * 256, 1)


# --- degenerate pairs ---


@patch("loop", "degenerate-guard-skipped", "a student that is its own teacher is not looked for", _DEGENERATE)
def _guard_skipped(_original: Call, *_arguments: object, **_options: object) -> float:
    return 1.0


@fault("loop", "kl-floor-zero", "the floor of the KL at step 0 is zero", _FLOOR)
def _floor_zero() -> None:
    # The KL of equal functions is zero but for rounding: measured up to 4e-8 either way, by the instruction set.
    replace(_FLOOR, lambda _original: -1e-4)


@patch("loop", "weights-not-compared", "only the KL is looked at", _SAME)
def _weights_not_compared(_original: Call, *_arguments: object) -> bool:
    return False
