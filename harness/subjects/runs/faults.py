"""Faults in what a run says of itself, and in the smoke run."""

import contextlib
import dataclasses
import io
import itertools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from q4kd.harness.runs.faults import Call, fault, patch, replace

if TYPE_CHECKING:
    from q4kd.trainer.config.settings import DistillConfig
    from q4kd.trainer.train.run.assembly import Run

_DISTILL = "q4kd.trainer.distill"
_TRAIN = "q4kd.trainer.train.loop:train_to_the_end"
_CLOCK = "q4kd.trainer.wall:WallClock"
_STEPS = "q4kd.trainer.train.loop:_take_steps"
_REPORT = "q4kd.trainer.train.run.progress:Reporter.step"
_CONFIG = "q4kd.trainer.config.settings:make_config"
_REPORTER_INIT = "q4kd.trainer.train.run.progress:Reporter.__init__"

# --- progress lines ---


def _line_of(report: Call, *arguments: object) -> str:
    """Return the progress line that the original prints."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        report(*arguments)
    return said.getvalue()


@patch("logging", "progress-reworded", "progress lines say 'loss=' instead of ': loss: '", _REPORT)
def _reworded(original: Call, *arguments: object) -> None:
    print(_line_of(original, *arguments).replace(": loss: ", ", loss="), end="", flush=True)


@fault("logging", "every-other-line", "every other progress line is missing", _REPORT)
def _every_other_line() -> None:
    def make(original: Call) -> Call:
        count = itertools.count()

        def step(*arguments: object) -> None:
            line = _line_of(original, *arguments)
            print(line if line and next(count) % 2 else "", end="", flush=True)

        return step

    replace(_REPORT, make)


@fault("logging", "stale-loss", "progress lines repeat the first loss", _REPORT)
def _stale_loss() -> None:
    def make(original: Call) -> Call:
        losses: list[float] = []

        def step(self: object, number: int, loss: float, *rest: object) -> None:
            losses.append(loss)
            original(self, number, losses[0], *rest)

        return step

    replace(_REPORT, make)


@patch("logging", "slow-reporting", "each report waits for 20 ms", _REPORT)
def _slow_reporting(original: Call, *arguments: object) -> None:
    time.sleep(0.02)  # as a line sent over a network would take
    original(*arguments)


@patch("logging", "zero-means-default", "log_every=0 prints step lines as the default does", _REPORTER_INIT)
def _zero_means_default(original: Call, self: object, total: int, every: int, *rest: object, **options: object) -> None:
    original(self, total, every or 10, *rest, **options)


@patch("logging", "wall-from-training", "the wall time begins when training does", _TRAIN)
def _wall_from_training(original: Call, *arguments: object, **options: object) -> object:
    from q4kd.trainer import wall

    wall.start()
    return original(*arguments, **options)


@patch("logging", "loading-told-as-training", "the time of loading is given to the steps", f"{_CLOCK}.enter")
def _loading_told_as_training(original: Call, self: object, name: str, *rest: object) -> object:
    return original(self, "train" if name == "load" else name, *rest)


# --- smoke runs ---


@patch("loop", "one-step-more", "a smoke run takes one step more", "q4kd.trainer.train.run.assembly:assemble")
def _one_step_more(original: Callable[..., "Run"], config: "DistillConfig", *rest: object) -> "Run":
    run = original(config, *rest)
    return dataclasses.replace(run, last_step=run.last_step + (config.max_steps is not None))


@patch("loop", "smoke-leaks", "every run stops after 10 steps", _CONFIG)
def _smoke_leaks(original: Call, values: Mapping[str, object]) -> object:
    return original({"max_steps": 10, **values})


@patch("checkpoint", "smoke-writes-model", "a smoke run leaves a final model", f"{_DISTILL}:_finish")
def _smoke_writes_model(original: Call, run: "Run", *rest: object) -> None:
    original(run, *rest)
    run.unwrapped.student.save_pretrained(run.config.out / "model", safe_serialization=True)


@patch("loop", "smoke-own-schedule", "the learning rate of a smoke run ends with it", _STEPS)
def _smoke_own_schedule(original: Call, run: "Run", *rest: object) -> None:
    original(dataclasses.replace(run, total_steps=run.last_step), *rest)


@patch("logging", "projects-itself", "the smoke run's own time is given as that of the full run", f"{_DISTILL}:_finish")
def _projects_itself(original: Call, run: "Run", *rest: object) -> None:
    original(dataclasses.replace(run, total_steps=run.last_step), *rest)


@patch("logging", "projection-missing", "the summary lacks the projection", "q4kd.trainer.files:write_json")
def _projection_missing(original: Call, path: Path, value: Mapping[str, object], *rest: object) -> None:
    if path.name == "summary.json":
        value = {key: kept for key, kept in value.items() if not key.startswith("projected")}
    original(path, value, *rest)


@patch("loop", "zero-steps-means-all", "--max-steps 0 runs all steps", _CONFIG)
def _zero_steps_means_all(original: Call, values: Mapping[str, object]) -> object:
    return original({**values, "max_steps": values.get("max_steps") or None})
