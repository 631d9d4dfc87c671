"""Faults in the loss, the loop and the checkpoints, and ways for a run to die that look like other things."""

import itertools
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from q4kd.harness.sabotage.registry import declare, replace

_LOSS = "q4kd.trainer.kd_loss"
_ROWS = "q4kd.trainer.divergence:divergence_rows"
_STEP = "q4kd.trainer.step"
KILL_STEP = 10
# Experiments with one run have the arm None; of the KD-against-CE experiment only the KD arms are sabotaged.
KD_ARMS = (None, "kd-seed1", "kd-seed2", "kd-seed3")
_Rows = Callable[[Any, Any, Any], tuple[Any, Any]]


def _kd_term_zero() -> None:
    def make(original: _Rows) -> _Rows:
        def rows(log_p: Any, log_q: Any, config: Any) -> tuple[Any, Any]:
            value, gradient = original(log_p, log_q, config)
            return value * 0, gradient * 0

        return rows

    replace(_ROWS, make)


def _soft_cross_entropy() -> None:
    def make(original: _Rows) -> _Rows:
        def rows(log_p: Any, log_q: Any, config: Any) -> tuple[Any, Any]:
            value, gradient = original(log_p, log_q, config)
            if config.divergence == "forward_kl":
                value = -(log_p.exp() * log_q).sum(-1).double()  # without the teacher's entropy: not zero at equality
            return value, gradient

        return rows

    replace(_ROWS, make)


def _smoothed_teacher() -> None:
    def make(original: _Rows) -> _Rows:
        def rows(log_p: Any, log_q: Any, config: Any) -> tuple[Any, Any]:
            smoothed = (0.99 * log_p.exp() + 0.01 / log_p.shape[-1]).log()
            return original(smoothed, log_q, config)

        return rows

    replace(_ROWS, make)


def _half_gradient() -> None:
    def make(original: _Rows) -> _Rows:
        def rows(log_p: Any, log_q: Any, config: Any) -> tuple[Any, Any]:
            value, gradient = original(log_p, log_q, config)
            return value, gradient * 0.5

        return rows

    replace(_ROWS, make)


def _no_t_squared() -> None:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def terms(student: Any, teacher: Any, labels: Any, config: Any) -> Any:
            ce, kd, gradient = original(student, teacher, labels, config)
            return ce, kd / config.temperature**2, gradient

        return terms

    replace(f"{_LOSS}:_chunk_terms", make)


def _labels_shuffled() -> None:
    def make(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def labels(ids: Any) -> Any:
            return np.roll(original(ids), 17)

        return labels

    replace("q4kd.trainer.packing:make_labels", make)


def _learning_rate_zero() -> None:
    replace(f"{_STEP}:learning_rate", lambda _original: lambda step, config, total: 0.0)


def _at_step(number: int, action: Callable[[], None]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a wrapper of train_step that acts instead of taking step ``number``."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        count = itertools.count(1)

        def step(*args: Any, **options: Any) -> Any:
            if next(count) == number:
                action()
            return original(*args, **options)

        return step

    return make


def _sigkill_at_step() -> None:
    replace(f"{_STEP}:train_step", _at_step(KILL_STEP, lambda: os.kill(os.getpid(), signal.SIGKILL)))


def _hang_at_step_0() -> None:
    replace(f"{_STEP}:train_step", _at_step(1, lambda: time.sleep(86_400)))


def _quiet_early_exit() -> None:
    replace(f"{_STEP}:train_step", _at_step(KILL_STEP, lambda: os._exit(0)))


def _checkpoint_not_written() -> None:
    def make(_original: Callable[..., Any]) -> Callable[..., Any]:
        def save(run: Any, _tensors: Any, state: Any) -> Any:
            folder: Any = run / "checkpoints"
            folder.mkdir(exist_ok=True)
            return folder / f"step-{state.step:06d}"

        return save

    replace("q4kd.trainer.checkpoint:save_checkpoint", make)


def _steps_not_taken() -> None:
    """Report every step, but update the student only at every second one."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        count = itertools.count(1)

        def step(accelerator: Any, model: Any, teacher: Any, optimizer: Any, *rest: Any) -> Any:
            if next(count) % 2:
                return original(accelerator, model, teacher, optimizer, *rest)
            kept = optimizer.step
            optimizer.step = lambda *_args, **_options: None
            try:
                return original(accelerator, model, teacher, optimizer, *rest)
            finally:
                optimizer.step = kept

        return step

    replace(f"{_STEP}:train_step", make)


declare(
    "loss",
    "kd-term-zero",
    "the divergence and its gradient are multiplied by zero",
    _kd_term_zero,
    _ROWS,
    arms=KD_ARMS,
)
declare(
    "loss",
    "soft-cross-entropy",
    "forward KL without the teacher's entropy",
    _soft_cross_entropy,
    _ROWS,
)
declare(
    "loss",
    "smoothed-teacher",
    "the teacher's distribution is mixed with 1 % uniform",
    _smoothed_teacher,
    _ROWS,
)
declare(
    "loss",
    "half-gradient",
    "the divergence's gradient is halved, its value kept",
    _half_gradient,
    _ROWS,
)
declare("loss", "no-t-squared", "the reported KD term lacks the factor T²", _no_t_squared, f"{_LOSS}:_chunk_terms")
declare(
    "loop",
    "labels-shuffled",
    "labels are rolled by 17 positions against their inputs",
    _labels_shuffled,
    "q4kd.trainer.packing:make_labels",
    arms=KD_ARMS,
)
declare(
    "loop",
    "learning-rate-zero",
    "the schedule always returns zero",
    _learning_rate_zero,
    f"{_STEP}:learning_rate",
    arms=KD_ARMS,
)
declare(
    "supervision",
    "sigkill-at-step",
    f"the process kills itself with SIGKILL at step {KILL_STEP}",
    _sigkill_at_step,
    f"{_STEP}:train_step",
    declared_exit=("killed_cause_unknown", "signalled"),
)
declare(
    "supervision",
    "hang-at-step-0",
    "the first step never returns",
    _hang_at_step_0,
    f"{_STEP}:train_step",
    declared_exit=("stalled", "timeout"),
)
declare(
    "supervision",
    "quiet-early-exit",
    f"the process ends with exit code 0 at step {KILL_STEP}",
    _quiet_early_exit,
    f"{_STEP}:train_step",
)
declare(
    "checkpoint",
    "checkpoint-not-written",
    "checkpoints are announced and not written",
    _checkpoint_not_written,
    "q4kd.trainer.checkpoint:save_checkpoint",
)
declare(
    "loop",
    "steps-not-taken",
    "every second step is reported without updating the student",
    _steps_not_taken,
    f"{_STEP}:train_step",
)
