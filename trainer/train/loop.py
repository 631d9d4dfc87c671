"""The steps of a run, and what comes between them: evaluations, checkpoints, the end that somebody asks for."""

import contextlib
import signal
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from q4kd.trainer import wall
from q4kd.trainer.data.batch import Batch
from q4kd.trainer.errors import NotFiniteError, StoppedError
from q4kd.trainer.train.checkpoint import CheckpointState, checkpoint_path, random_tensors
from q4kd.trainer.train.distributed import gather, is_sharded, trained_tensors
from q4kd.trainer.train.evaluate import evaluate
from q4kd.trainer.train.hang_watchdog import HangWatchdog
from q4kd.trainer.train.run.assembly import Run
from q4kd.trainer.train.run.folder import kept, save_step
from q4kd.trainer.train.run.progress import Reporter
from q4kd.trainer.train.run.state import Progress
from q4kd.trainer.train.saver import CheckpointSaver, Kind, Part
from q4kd.trainer.train.step import StepResult, learning_rate, train_step
from q4kd.trainer.train.stop_request import StopRequest

# A checkpoint may take as long as this many steps before it counts as a hang.
_CHECKPOINT_ALLOWANCE = 4


def train_to_the_end(run: Run, progress: Progress, *, resumed: bool) -> None:
    """Evaluate, take the remaining steps, write a checkpoint of the last one and evaluate again.

    Raises:
        NotFiniteError: at a step whose loss or gradient is not finite; its batch is kept.
        StoppedError: when somebody asked the run to stop; a checkpoint is written then.
        RunFolderError: when a checkpoint cannot be written.
    """
    config = run.config
    reporter = Reporter(
        run.last_step,
        config.log_every,
        run.data.order.steps_per_epoch,
        eval_every=config.eval_every,
        save_every=config.checkpoint_every,
    )
    watchdog = HangWatchdog(config.hang_s, config.out, run.events, rank=run.accelerator.process_index)
    writer = CheckpointSaver(config, run.events, run.accelerator.device, copies=run.copies_checkpoints)
    with StopRequest(announce=run.is_main) as stop, watchdog, writer as saver:
        if not resumed or (_evaluation_is_due(run, progress) and not progress.is_evaluated):
            _evaluate(run, progress, saver, watchdog)
        with reporter.running(progress.done) if run.is_main else contextlib.nullcontext():
            _take_steps(run, progress, reporter, saver, watchdog, stop)
        _checkpoint(run, progress, saver, watchdog, is_last=True)
        number = stop.agreed(run.accelerator)
        if not number:
            _evaluate(run, progress, saver, watchdog)
        with wall.phase("save"), watchdog.allowing("the checkpoint", _CHECKPOINT_ALLOWANCE):
            saver.finish(say=True)
        if number:
            raise _end_early(run, progress, number)


def _take_steps(
    run: Run,
    progress: Progress,
    reporter: Reporter,
    saver: CheckpointSaver,
    watchdog: HangWatchdog,
    stop: StopRequest,
) -> None:
    """Take the remaining steps, or those until somebody asks the run to stop."""
    every = run.config.checkpoint_every
    run.model.train()
    while progress.done < run.last_step:
        watchdog.beat(progress.done)
        saver.check()
        _take_step(run, progress, reporter, saver)
        if stop.agreed(run.accelerator):
            return
        if progress.leg_steps == 1 and every and progress.done + every < run.last_step:
            _reserve(run, saver)
        if every and progress.done % every == 0 and progress.done < run.last_step:
            _checkpoint(run, progress, saver, watchdog)
        if _evaluation_is_due(run, progress):
            _evaluate(run, progress, saver, watchdog)


def _take_step(run: Run, progress: Progress, reporter: Reporter, saver: CheckpointSaver) -> None:
    config, step = run.config, progress.done
    before = time.monotonic()
    with wall.phase("train"):
        batch = run.batch(step)
        data_s = time.monotonic() - before
        source = run.source if config.alpha < 1 else None
        lr = learning_rate(step, config, run.total_steps)
        try:
            result = train_step(run.accelerator, run.model, source, run.optimizer, batch, config, lr)
        except NotFiniteError as error:
            saver.settle()  # The message names what is kept.
            raise _kept_for_inspection(run, step + 1, batch, error) from error
    progress.count_step(data_s + result.seconds)
    if run.is_main:
        _report(run, progress, reporter, result, data_s)


def _report(run: Run, progress: Progress, reporter: Reporter, result: StepResult, data_s: float) -> None:
    run.events.emit("step", step=progress.done, steps=run.last_step, data_s=data_s, **vars(result))
    tokens_per_second, teacher_share = result.tokens / result.seconds, result.teacher_s / max(result.seconds, 1e-9)
    reporter.step(progress.done, result.loss, tokens_per_second, teacher_share)


def _kept_for_inspection(run: Run, step: int, batch: Batch, error: NotFiniteError) -> NotFiniteError:
    """Save a failed step's batch and terms; return the error with the place."""
    path = save_step(run.config.out / "aborted", step, batch, error.terms)
    run.events.emit("aborted", step=step, reason=str(error), **error.terms)
    return NotFiniteError(error.terms, f"step {step}: {error}; the batch is in {path}, {kept(run.config.out)}")


def _evaluation_is_due(run: Run, progress: Progress) -> bool:
    every = run.config.eval_every
    return bool(every) and progress.done % every == 0 and 0 < progress.done < run.last_step


def _evaluate(run: Run, progress: Progress, saver: CheckpointSaver, watchdog: HangWatchdog) -> None:
    """Evaluate, and keep the figures with this step's checkpoint; without one, the best weights so far are kept."""
    config, done = run.config, progress.done
    batches = 1 + config.eval_tokens // (config.seq_len * config.batch_size)
    with wall.phase("evaluate"), watchdog.allowing("the evaluation", batches):
        result = evaluate(run.accelerator, run.model, run.source.teacher, run.held_out_batches())
    if result is None:
        return
    figures = result.figures
    if run.is_main:
        run.events.emit("eval", step=done, **figures)
        print(f"Held-out at step {done}: {result.describe()}", flush=True)
    is_kept = saver.has(done)
    better = not is_kept and done > 0 and saver.is_better(figures)
    if _main_says(run, better):
        _checkpoint(run, progress, saver, watchdog, figures, "everything" if config.best_resumable else "weights")
    elif is_kept and run.is_main:
        saver.record(done, figures)


def _main_says(run: Run, value: bool) -> bool:
    """Return the main process's answer in every process: the others may not see the run's folder."""
    if run.accelerator.num_processes == 1:
        return value
    told = torch.tensor([int(value and run.is_main)], device=run.accelerator.device)
    return bool(run.accelerator.reduce(told, reduction="sum").item())


def _state(run: Run, kind: Kind) -> dict[Part, Iterable[tuple[str, Tensor]]]:
    """Return the tensors of a checkpoint. Those of shards are made when they are asked for, by all processes."""
    parts: dict[Part, Iterable[tuple[str, Tensor]]] = {"model": trained_tensors(run.unwrapped.student)}
    return parts if kind == "weights" else {**parts, "optimizer": run.optimizer.tensors()}


def _is_sharded(run: Run) -> bool:
    return any(map(is_sharded, run.unwrapped.student.parameters()))


def _reserve(run: Run, saver: CheckpointSaver) -> None:
    if run.is_main and not _is_sharded(run):
        saver.reserve(_state(run, "everything"))


def _checkpoint(
    run: Run,
    progress: Progress,
    saver: CheckpointSaver,
    watchdog: HangWatchdog,
    evaluation: Mapping[str, Any] | None = None,
    kind: Kind = "everything",
    *,
    is_last: bool = False,
) -> None:
    """Begin a checkpoint of this step; all processes must call it, since the state of all of them goes into it.

    The checkpoint before it is waited for. The steps go on when the state is copied to the host; on a GPU, when its
    copy is queued, for which the next update waits.
    """
    with wall.phase("save"), watchdog.allowing("the checkpoint", _CHECKPOINT_ALLOWANCE):
        begun = time.monotonic()
        saver.finish()
        free = time.monotonic()
        parts: dict[Part, dict[str, Tensor]]
        if _is_sharded(run):
            # Every process holds a part of each tensor: all gather, one writes.
            parts = {part: gather(tensors, run.is_main) for part, tensors in _state(run, kind).items()}
        else:
            parts = saver.hold(_state(run, kind), is_last=is_last) if run.is_main else {}
            run.optimizer.reader = saver.copied() if run.is_main else None
        random = random_tensors(run.accelerator)
        if run.is_main:
            state = CheckpointState(progress.done, run.settings, run.data.sha256, evaluation)
            lost = {"wait_s": free - begun, "copy_s": time.monotonic() - free}
            saver.save(state, parts, random, kind=kind, lost=lost)


def _end_early(run: Run, progress: Progress, number: int) -> StoppedError:
    """Return the error with which all processes end a run that was asked to stop; the main one says so."""
    name = signal.Signals(number).name
    run.events.emit("stopped", step=progress.done, signal=name)
    path = checkpoint_path(run.config.out, progress.done)
    said = f"{name}: stopped after step {progress.done}; continue from {path} with --resume"
    return StoppedError(said if run.is_main else "", number)
