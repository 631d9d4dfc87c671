"""Faults in what a run says of itself, and in the smoke run."""

import contextlib
import dataclasses
import io
import itertools
import time
from collections.abc import Callable
from typing import Any

from q4kd.harness.sabotage.registry import declare, replace

_DISTILL = "q4kd.trainer.distill"
_STEPS = "q4kd.trainer.training_loop:_take_steps"
_REPORT = "q4kd.trainer.progress:Reporter.step"
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
            return dataclasses.replace(run, last_step=run.last_step + (config.max_steps is not None))

        return assemble

    replace("q4kd.trainer.run:assemble", make)


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


def _smoke_own_schedule() -> None:
    """Let the learning rate of a smoke run fall to zero at its own end."""

    def make(original: _Call) -> _Call:
        def steps(run: Any, *rest: Any) -> None:
            original(dataclasses.replace(run, total_steps=run.last_step), *rest)

        return steps

    replace(_STEPS, make)


def _projects_itself() -> None:
    def make(original: _Call) -> _Call:
        def finish(run: Any, *rest: Any) -> None:
            original(dataclasses.replace(run, total_steps=run.last_step), *rest)

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


declare("logging", "progress-reworded", "progress lines say 'loss=' instead of ': loss: '", _reworded, _REPORT)
declare("logging", "every-other-line", "every other progress line is missing", _every_other_line, _REPORT)
declare("logging", "stale-loss", "progress lines repeat the first loss", _stale_loss, _REPORT)
declare("logging", "slow-reporting", "each report waits for 20 ms", _slow_reporting, _REPORT)
declare(
    "logging",
    "zero-means-default",
    "log_every=0 prints step lines as the default does",
    _zero_means_default,
    "q4kd.trainer.progress:Reporter.__init__",
)
declare("loop", "one-step-more", "a smoke run takes one step more", _one_step_more, "q4kd.trainer.run:assemble")
declare("loop", "smoke-leaks", "every run stops after 10 steps", _smoke_leaks, "q4kd.trainer.config:make_config")
declare(
    "loop",
    "smoke-own-schedule",
    "the learning rate of a smoke run ends with it",
    _smoke_own_schedule,
    _STEPS,
)
declare(
    "checkpoint", "smoke-writes-model", "a smoke run leaves a final model", _smoke_writes_model, f"{_DISTILL}:_finish"
)
declare(
    "logging",
    "projects-itself",
    "the smoke run's own time is given as that of the full run",
    _projects_itself,
    f"{_DISTILL}:_finish",
)
declare(
    "logging",
    "projection-missing",
    "the summary lacks the projection",
    _projection_missing,
    "q4kd.trainer.files:write_json",
)
declare(
    "loop",
    "zero-steps-means-all",
    "--max-steps 0 runs all steps",
    _zero_steps_means_all,
    "q4kd.trainer.config:make_config",
)
