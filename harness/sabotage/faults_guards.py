"""Faults in the checks before the first step: vocabularies that do not match, and students that are their teachers."""

import functools
from collections.abc import Callable
from typing import Any

from q4kd.harness.sabotage.registry import declare, replace

_GUARDS = "q4kd.trainer.guards"
_LOSS = "q4kd.trainer.kd_loss"
_ROWS = "q4kd.trainer.divergence:divergence_rows"
_LOAD_STUDENT = "q4kd.trainer.student:load_student"
_Call = Callable[..., Any]


# --- vocabulary ---


def _maps_assumed_equal() -> None:
    def make(original: _Call) -> _Call:
        return lambda tokens, teacher_rows, _ids, rows: original(tokens, teacher_rows, {}, rows)

    replace(f"{_GUARDS}:check_vocabulary", make)


def _vague_sizes() -> None:
    def make(original: _Call) -> _Call:
        def check(tokens: Any, teacher_rows: int, ids: Any, rows: int) -> None:
            from q4kd.trainer.errors import InputError

            if rows > teacher_rows:
                raise InputError("vocabulary", expected="matching sizes", got="others", remedy="choose another student")
            original(tokens, teacher_rows, ids, rows)

        return check

    replace(f"{_GUARDS}:check_vocabulary", make)


def _student_resized(rows: int) -> None:
    """Resize the student's embedding and head, as `resize_token_embeddings` invites to when sizes differ."""

    def make(original: _Call) -> _Call:
        def load(*arguments: Any, **options: Any) -> Any:
            student = original(*arguments, **options)
            student.resize_token_embeddings(rows, mean_resizing=False)
            return student

        return load

    replace(_LOAD_STUDENT, make)


def _slice_after_softmax() -> None:
    """Take the softmax over all rows, padding included, and drop the columns past the student's vocabulary then."""
    missing: list[Any] = []

    def make_loss(original: _Call) -> _Call:
        def loss(hidden: Any, weight: Any, *rest: Any, teacher_head: Any, config: Any, **options: Any) -> Any:
            def head(rows: Any) -> Any:
                logits = teacher_head(rows)
                scaled = logits / config.temperature
                inside = scaled[:, : weight.shape[0]].logsumexp(-1)
                missing.append((inside - scaled.logsumexp(-1)).unsqueeze(-1))
                return logits

            return original(hidden, weight, *rest, teacher_head=head, config=config, **options)

        return loss

    def make_rows(original: _Call) -> _Call:
        return lambda log_p, log_q, config: original(log_p + missing.pop(), log_q, config)

    replace(f"{_LOSS}:kd_loss", make_loss)
    replace(_ROWS, make_rows)


def _last_columns() -> None:
    def make(original: _Call) -> _Call:
        def loss(hidden: Any, weight: Any, *rest: Any, teacher_head: Any, **options: Any) -> Any:
            def head(rows: Any) -> Any:
                return teacher_head(rows)[:, -weight.shape[0] :]

            return original(hidden, weight, *rest, teacher_head=head, **options)

        return loss

    replace(f"{_LOSS}:kd_loss", make)


def _padded_rows_shift() -> None:
    """Read the head from its end, so that padding moves every token to another id."""

    def make(original: _Call) -> _Call:
        def logits(self: Any, hidden: Any) -> Any:
            found = original(self, hidden)
            return found.roll(found.shape[1] - found.shape[1] // 256 * 256, 1)

        return logits

    replace("q4kd.trainer.teacher:Teacher.head_logits", make)


# --- degenerate pairs ---


def _guard_skipped() -> None:
    replace(f"{_GUARDS}:check_not_degenerate", lambda _original: lambda *_arguments, **_options: 1.0)


def _floor_zero() -> None:
    replace(f"{_GUARDS}:KL_FLOOR", lambda _original: 0.0)


def _weights_not_compared() -> None:
    replace(f"{_GUARDS}:same_weights", lambda _original: lambda *_arguments: False)


declare(
    "vocabulary",
    "maps-assumed-equal",
    "sizes are compared and token strings are not",
    _maps_assumed_equal,
    f"{_GUARDS}:check_vocabulary",
)
declare(
    "vocabulary",
    "vague-sizes",
    "the refusal of a student that is too wide names no size",
    _vague_sizes,
    f"{_GUARDS}:check_vocabulary",
)
declare(
    "vocabulary",
    "student-cut-to-fit",
    "a student that is too wide is cut to the teacher's rows in silence",
    functools.partial(_student_resized, 2048),
    _LOAD_STUDENT,
)
declare(
    "vocabulary",
    "student-padded-to-fit",
    "the student's head is resized to the teacher's padded rows",
    functools.partial(_student_resized, 2080),
    _LOAD_STUDENT,
    arms=(None, "exact"),
)
declare(
    "vocabulary",
    "slice-after-softmax",
    "the teacher's softmax includes its padding rows",
    _slice_after_softmax,
    f"{_LOSS}:kd_loss",
    _ROWS,
    arms=("padded",),
)
declare(
    "vocabulary",
    "last-columns",
    "the last columns of the teacher's logits are kept instead of the first",
    _last_columns,
    f"{_LOSS}:kd_loss",
    arms=("padded",),
)
declare(
    "vocabulary",
    "padding-in-front",
    "padding rows are taken to come before the tokens",
    _padded_rows_shift,
    "q4kd.trainer.teacher:Teacher.head_logits",
)
declare(
    "loop",
    "degenerate-guard-skipped",
    "a student that is its own teacher is not looked for",
    _guard_skipped,
    f"{_GUARDS}:check_not_degenerate",
)
declare("loop", "kl-floor-zero", "the floor of the KL at step 0 is zero", _floor_zero, f"{_GUARDS}:KL_FLOOR")
declare("loop", "weights-not-compared", "only the KL is looked at", _weights_not_compared, f"{_GUARDS}:same_weights")
