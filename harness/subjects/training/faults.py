"""Faults in the loss, the loop and the checkpoints, and ways for a run to die that look like other things."""

import itertools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from q4kd.harness.runs.faults import Call, fault, patch, replace
from q4kd.trainer.files import write_json

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

    from q4kd.trainer.loss.config import KDLossConfig
    from q4kd.trainer.train.checkpoint import CheckpointState
    from q4kd.trainer.train.optimizer import MasterWeightOptimizer

_ROWS = "q4kd.trainer.loss.divergence:divergence_rows"
_TERMS = "q4kd.trainer.loss.fused:_chunk_terms"
_LABELS = "q4kd.trainer.data.packing:make_labels"
_RATE = "q4kd.trainer.train.step:learning_rate"
_STEP = "q4kd.trainer.train.step:train_step"
_SAVE = "q4kd.trainer.train.checkpoint:save_checkpoint"
KILL_STEP = 10
# Experiments with one run have the arm None; of the KD-against-CE experiment only the KD arms are sabotaged.
KD_ARMS = (None, "kd-seed1", "kd-seed2", "kd-seed3")
_Pair = tuple["Tensor", "Tensor"]
_Rows = Callable[["Tensor", "Tensor", "KDLossConfig"], _Pair]


@patch("loss", "kd-term-zero", "the divergence and its gradient are multiplied by zero", _ROWS, arms=KD_ARMS)
def _kd_term_zero(original: _Rows, log_p: "Tensor", log_q: "Tensor", config: "KDLossConfig") -> _Pair:
    value, gradient = original(log_p, log_q, config)
    return value * 0, gradient * 0


@patch("loss", "soft-cross-entropy", "forward KL without the teacher's entropy", _ROWS)
def _soft_cross_entropy(original: _Rows, log_p: "Tensor", log_q: "Tensor", config: "KDLossConfig") -> _Pair:
    value, gradient = original(log_p, log_q, config)
    if config.divergence == "forward_kl":
        value = -(log_p.exp() * log_q).sum(-1).double()  # without the teacher's entropy: not zero at equality
    return value, gradient


@patch("loss", "smoothed-teacher", "the teacher's distribution is mixed with 1 % uniform", _ROWS)
def _smoothed_teacher(original: _Rows, log_p: "Tensor", log_q: "Tensor", config: "KDLossConfig") -> _Pair:
    return original((0.99 * log_p.exp() + 0.01 / log_p.shape[-1]).log(), log_q, config)


@patch("loss", "half-gradient", "the divergence's gradient is halved, its value kept", _ROWS)
def _half_gradient(original: _Rows, log_p: "Tensor", log_q: "Tensor", config: "KDLossConfig") -> _Pair:
    value, gradient = original(log_p, log_q, config)
    return value, gradient * 0.5


@patch("loss", "no-t-squared", "the reported KD term lacks the factor T²", _TERMS)
def _no_t_squared(
    original: Callable[..., tuple["Tensor", "Tensor", "Tensor"]],
    student: object,
    teacher: object,
    labels: object,
    config: "KDLossConfig",
) -> tuple["Tensor", "Tensor", "Tensor"]:
    ce, kd, gradient = original(student, teacher, labels, config)
    return ce, kd / config.temperature**2, gradient


@patch("loop", "labels-shuffled", "labels are rolled by 17 positions against their inputs", _LABELS, arms=KD_ARMS)
def _labels_shuffled(original: Callable[[object], "npt.NDArray[np.int64]"], ids: object) -> "npt.NDArray[np.int64]":
    return np.roll(original(ids), 17)


@patch("loop", "learning-rate-zero", "the schedule always returns zero", _RATE, arms=KD_ARMS)
def _learning_rate_zero(_original: Call, _step: int, _config: object, _total: int) -> float:
    return 0.0


def _at_step(number: int, action: Callable[[], None]) -> None:
    """Let the program act instead of taking step ``number``."""

    def make(original: Call) -> Call:
        count = itertools.count(1)

        def step(*arguments: object, **options: object) -> object:
            if next(count) == number:
                action()
            return original(*arguments, **options)

        return step

    replace(_STEP, make)


@fault(
    "supervision",
    "sigkill-at-step",
    f"the process kills itself with SIGKILL at step {KILL_STEP}",
    _STEP,
    declared_exit=("killed_cause_unknown", "signalled"),
)
def _sigkill_at_step() -> None:
    _at_step(KILL_STEP, lambda: os.kill(os.getpid(), signal.SIGKILL))


@fault("supervision", "hang-at-step-0", "the first step never returns", _STEP, declared_exit=("stalled", "timeout"))
def _hang_at_step_0() -> None:
    _at_step(1, lambda: time.sleep(86_400))


@fault("supervision", "quiet-early-exit", f"the process ends with exit code 0 at step {KILL_STEP}", _STEP)
def _quiet_early_exit() -> None:
    _at_step(KILL_STEP, lambda: os._exit(0))


@patch("checkpoint", "checkpoint-not-written", "checkpoints are announced, and hold no tensor", _SAVE)
def _checkpoint_not_written(
    _original: Call, run: Path, _tensors: object, state: "CheckpointState", *_rest: object
) -> Path:
    folder = run / "checkpoints" / f"step-{state.step:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    # The evaluation of its step is added to the state, which must be there for that.
    write_json(folder / "state.json", {**vars(state), "sha256": {}})
    return folder


@fault("loop", "steps-not-taken", "every second step is reported without updating the student", _STEP)
def _steps_not_taken() -> None:
    def make(original: Call) -> Call:
        count = itertools.count(1)

        def step(
            accelerator: object, model: object, teacher: object, optimizer: "MasterWeightOptimizer", *rest: object
        ) -> object:
            if next(count) % 2:
                return original(accelerator, model, teacher, optimizer, *rest)
            kept = optimizer.step
            optimizer.step = lambda *_args, **_options: None  # type: ignore[method-assign]
            try:
                return original(accelerator, model, teacher, optimizer, *rest)
            finally:
                optimizer.step = kept  # type: ignore[method-assign]

        return step

    replace(_STEP, make)
