"""Faults in what a run says of itself, in the smoke run, and in the checks before the first step."""

import contextlib
import functools
import io
import itertools
import time
from collections.abc import Callable
from typing import Any

from q4kd.harness.sabotage.registry import Fault, Family, register, replace

_DISTILL = "q4kd.trainer.distill"
_REPORT = "q4kd.trainer.progress:Reporter.step"
_GUARDS = "q4kd.trainer.guards"
_LOSS = "q4kd.trainer.kd_loss"
_LOAD_STUDENT = "q4kd.trainer.student:load_student"
_Call = Callable[..., Any]


# --- progress lines ---


def _lines_changed(change: Callable[[str], str]) -> None:
    """Pass every progress line through ``change`` before it is printed."""

    def make(original: _Call) -> _Call:
        def step(*arguments: Any) -> None:
            said = io.StringIO()
            with contextlib.redirect_stdout(said):
                original(*arguments)
            print(change(said.getvalue()), end="", flush=True)

        return step

    replace(_REPORT, make)


def _reworded() -> None:
    _lines_changed(lambda line: line.replace(": loss: ", ", loss="))


def _every_other_line() -> None:
    count = itertools.count()
    _lines_changed(lambda line: line if line and next(count) % 2 else "")


def _stale_loss() -> None:
    def make(original: _Call) -> _Call:
        losses: list[float] = []

        def step(self: Any, number: int, loss: float, *rest: Any) -> None:
            losses.append(loss)
            original(self, number, losses[0], *rest)

        return step

    replace(_REPORT, make)


def _slow_reporting() -> None:
    def make(original: _Call) -> _Call:
        def step(*arguments: Any) -> None:
            time.sleep(0.02)  # as a line sent over a network would take
            original(*arguments)

        return step

    replace(_REPORT, make)


def _zero_means_default() -> None:
    def make(original: _Call) -> _Call:
        return lambda self, total, every, steps_per_epoch: original(self, total, every or 10, steps_per_epoch)

    replace("q4kd.trainer.progress:Reporter.__init__", make)


# --- smoke runs ---


def _one_step_more() -> None:
    def make(original: _Call) -> _Call:
        def assemble(config: Any, *rest: Any) -> Any:
            run = original(config, *rest)
            run.last_step += config.max_steps is not None
            return run

        return assemble

    replace(f"{_DISTILL}:_assemble", make)


def _smoke_leaks() -> None:
    def make(original: _Call) -> _Call:
        return lambda values: original({"max_steps": 10, **values})

    replace("q4kd.trainer.config:make_config", make)


def _smoke_writes_model() -> None:
    def make(original: _Call) -> _Call:
        def finish(run: Any, *rest: Any) -> None:
            original(run, *rest)
            run.unwrapped.student.save_pretrained(run.config.out / "model", safe_serialization=True)

        return finish

    replace(f"{_DISTILL}:_finish", make)


def _projects_itself() -> None:
    def make(original: _Call) -> _Call:
        def finish(run: Any, *rest: Any) -> None:
            run.total_steps = run.last_step
            original(run, *rest)

        return finish

    replace(f"{_DISTILL}:_finish", make)


def _projection_missing() -> None:
    def make(original: _Call) -> _Call:
        def write(path: Any, value: Any, *rest: Any) -> None:
            if path.name == "summary.json":
                value = {key: kept for key, kept in value.items() if not key.startswith("projected")}
            original(path, value, *rest)

        return write

    replace("q4kd.trainer.files:write_json", make)


def _zero_steps_means_all() -> None:
    def make(original: _Call) -> _Call:
        return lambda values: original({**values, "max_steps": values.get("max_steps") or None})

    replace("q4kd.trainer.config:make_config", make)


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
    replace(f"{_LOSS}:divergence_rows", make_rows)


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
    replace(f"{_GUARDS}:check_not_degenerate", lambda _original: lambda *_arguments: 1.0)


def _floor_zero() -> None:
    replace(f"{_GUARDS}:KL_FLOOR", lambda _original: 0.0)


def _weights_not_compared() -> None:
    replace(f"{_GUARDS}:same_weights", lambda _original: lambda *_arguments: False)


def _fault(
    family: Family,
    name: str,
    title: str,
    apply: Callable[[], None],
    *targets: str,
    arms: tuple[str | None, ...] | None = None,
) -> None:
    register(Fault(name=name, title=title, family=family, targets=targets, apply=apply, arms=arms))


_fault("logging", "progress-reworded", "progress lines say 'loss=' instead of ': loss: '", _reworded, _REPORT)
_fault("logging", "every-other-line", "every other progress line is missing", _every_other_line, _REPORT)
_fault("logging", "stale-loss", "progress lines repeat the first loss", _stale_loss, _REPORT)
_fault("logging", "slow-reporting", "each report waits for 20 ms", _slow_reporting, _REPORT)
_fault(
    "logging",
    "zero-means-default",
    "log_every=0 prints step lines as the default does",
    _zero_means_default,
    "q4kd.trainer.progress:Reporter.__init__",
)
_fault("loop", "one-step-more", "a smoke run takes one step more", _one_step_more, f"{_DISTILL}:_assemble")
_fault("loop", "smoke-leaks", "every run stops after 10 steps", _smoke_leaks, "q4kd.trainer.config:make_config")
_fault(
    "checkpoint",
    "smoke-writes-model",
    "a smoke run leaves a final model",
    _smoke_writes_model,
    f"{_DISTILL}:_finish",
    arms=("smoke",),
)
_fault(
    "logging",
    "projects-itself",
    "the smoke run's own time is given as that of the full run",
    _projects_itself,
    f"{_DISTILL}:_finish",
    arms=("smoke",),
)
_fault(
    "logging",
    "projection-missing",
    "the summary lacks the projection",
    _projection_missing,
    "q4kd.trainer.files:write_json",
    arms=("smoke",),
)
_fault(
    "loop", "zero-steps-means-all", "--max-steps 0 runs all steps", _zero_steps_means_all,
    "q4kd.trainer.config:make_config",
)  # fmt: skip
_fault(
    "vocabulary",
    "maps-assumed-equal",
    "sizes are compared and token strings are not",
    _maps_assumed_equal,
    f"{_GUARDS}:check_vocabulary",
)
_fault(
    "vocabulary",
    "vague-sizes",
    "the refusal of a student that is too wide names no size",
    _vague_sizes,
    f"{_GUARDS}:check_vocabulary",
)
_fault(
    "vocabulary",
    "student-cut-to-fit",
    "a student that is too wide is cut to the teacher's rows in silence",
    functools.partial(_student_resized, 2048),
    _LOAD_STUDENT,
)
_fault(
    "vocabulary",
    "student-padded-to-fit",
    "the student's head is resized to the teacher's padded rows",
    functools.partial(_student_resized, 2080),
    _LOAD_STUDENT,
)
_fault(
    "vocabulary",
    "slice-after-softmax",
    "the teacher's softmax includes its padding rows",
    _slice_after_softmax,
    f"{_LOSS}:kd_loss",
    f"{_LOSS}:divergence_rows",
    arms=("padded",),
)
_fault(
    "vocabulary",
    "last-columns",
    "the last columns of the teacher's logits are kept instead of the first",
    _last_columns,
    f"{_LOSS}:kd_loss",
    arms=("padded",),
)
_fault(
    "vocabulary",
    "padding-in-front",
    "padding rows are taken to come before the tokens",
    _padded_rows_shift,
    "q4kd.trainer.teacher:Teacher.head_logits",
)
_fault(
    "loop",
    "degenerate-guard-skipped",
    "a student that is its own teacher is not looked for",
    _guard_skipped,
    f"{_GUARDS}:check_not_degenerate",
)
_fault("loop", "kl-floor-zero", "the floor of the KL at step 0 is zero", _floor_zero, f"{_GUARDS}:KL_FLOOR")
_fault("loop", "weights-not-compared", "only the KL is looked at", _weights_not_compared, f"{_GUARDS}:same_weights")
