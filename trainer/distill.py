"""The whole run, top to bottom: ``q4kd distill``."""

import contextlib
import resource
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from q4kd.trainer.backend import check_device
from q4kd.trainer.batch import Batch
from q4kd.trainer.checkpoint import (
    CheckpointState,
    CheckpointTensors,
    checkpoint_path,
    is_best,
    prune_checkpoints,
    random_tensors,
    record_evaluation,
    save_checkpoint,
)
from q4kd.trainer.config import DistillConfig
from q4kd.trainer.errors import NotFiniteError, RunFolderError, StoppedError
from q4kd.trainer.evaluate import evaluate
from q4kd.trainer.events import EventLog
from q4kd.trainer.files import write_json
from q4kd.trainer.guards import check_cached_not_degenerate, check_isolation, check_not_degenerate
from q4kd.trainer.hang import HangWatchdog
from q4kd.trainer.memory_plan import format_plan
from q4kd.trainer.out_of_memory import explaining_memory
from q4kd.trainer.progress import Reporter
from q4kd.trainer.run import Run, assemble, restore, write_model, write_run_file
from q4kd.trainer.run_folder import check_run_folder, explaining_full_disk, kept, locked, save_step
from q4kd.trainer.run_plan import check_plan, place_run_teacher, plan_run
from q4kd.trainer.sharding import gather, trained_tensors
from q4kd.trainer.signals import StopRequest
from q4kd.trainer.step import learning_rate, train_step
from q4kd.trainer.teacher import Teacher
from q4kd.trainer.training_data import check_sources
from q4kd.trainer.watchdog import guarded

# A checkpoint may take as long as so many steps before it counts as a hang.
_CHECKPOINT_ALLOWANCE = 4


def _evaluate(run: Run, watchdog: HangWatchdog) -> None:
    """Evaluate, and keep the figures with this step's checkpoint; the best so far gets one of its own."""
    config = run.config
    batches = 1 + config.eval_tokens // (config.seq_len * config.batch_size)
    with watchdog.allowing("the evaluation", batches):
        result = evaluate(run.accelerator, run.model, run.teacher, run.held_out_batches())
    if result is None:
        return
    figures = result.figures
    if run.is_main:
        run.events.emit("eval", step=run.done, **figures)
        print(f"Held-out at step {run.done}: {result.describe()}", flush=True)
    is_kept = checkpoint_path(config.out, run.done).is_dir()
    better = not is_kept and run.done > 0 and is_best(config.out, config.best_metric, figures[config.best_metric])
    if _main_says(run, better):
        _checkpoint(run, watchdog, figures)
    elif is_kept and run.is_main:
        with _writing(run):
            record_evaluation(checkpoint_path(config.out, run.done), figures)
            prune_checkpoints(config.out, config.keep, config.best_metric)


def _main_says(run: Run, value: bool) -> bool:
    """Return the main process's answer in every process: only it is sure to see the run's folder."""
    if run.accelerator.num_processes == 1:
        return value
    told = torch.tensor([int(value and run.is_main)], device=run.accelerator.device)
    return bool(run.accelerator.reduce(told, reduction="sum").item())


@contextlib.contextmanager
def _writing(run: Run) -> Iterator[None]:
    """Explain a checkpoint that cannot be written, and name those that are kept."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        said = getattr(error, "strerror", None) or str(error)
        raise RunFolderError(
            f"step {run.done}: the checkpoint cannot be written ({said}); {kept(run.config.out)}"
        ) from error


def _checkpoint(run: Run, watchdog: HangWatchdog, evaluation: Mapping[str, Any] | None = None) -> None:
    """Write a checkpoint of this step; all processes must call it, since the state of all of them goes into it."""
    config = run.config
    with watchdog.allowing("the checkpoint", _CHECKPOINT_ALLOWANCE):
        # Under FSDP every process holds a part of each tensor: all gather, one writes.
        tensors = CheckpointTensors(
            model=gather(trained_tensors(run.unwrapped.student), run.is_main),
            optimizer=gather(run.optimizer.tensors(), run.is_main),
            random=random_tensors(run.accelerator),
        )
        if not run.is_main:
            return
        state = CheckpointState(run.done, run.settings, run.data.sha256, evaluation)
        with _writing(run):
            path = save_checkpoint(config.out, tensors, state)
            prune_checkpoints(config.out, config.keep, config.best_metric)
    run.events.emit("checkpoint", step=run.done, path=path.name)


def _train(run: Run, reporter: Reporter, watchdog: HangWatchdog, stop: StopRequest) -> None:
    """Take the remaining steps, or those until somebody asks the run to stop."""
    config = run.config
    teacher = run.source if config.alpha < 1 else None
    run.model.train()
    for step in range(run.done, run.last_step):
        watchdog.beat(step)
        before = time.monotonic()
        batch = run.batch(step)
        data_s = time.monotonic() - before
        lr = learning_rate(step, config, run.total_steps)
        try:
            result = train_step(run.accelerator, run.model, teacher, run.optimizer, batch, config, lr)
        except NotFiniteError as error:
            raise _kept_for_inspection(run, step + 1, batch, error) from error
        run.done = step + 1
        run.is_evaluated = False
        run.first_step_seconds = run.first_step_seconds or data_s + result.seconds
        run.training_seconds += data_s + result.seconds
        if run.is_main:
            run.events.emit("step", step=run.done, steps=run.last_step, data_s=data_s, **vars(result))
            reporter.step(
                run.done, result.loss, result.tokens / result.seconds, result.teacher_s / max(result.seconds, 1e-9)
            )
        if stop.agreed(run.accelerator):
            return
        if config.checkpoint_every and run.done % config.checkpoint_every == 0 and run.done < run.last_step:
            _checkpoint(run, watchdog)
        if _evaluation_is_due(run):
            _evaluate(run, watchdog)


def _evaluation_is_due(run: Run) -> bool:
    every = run.config.eval_every
    return bool(every) and run.done % every == 0 and 0 < run.done < run.last_step


def _kept_for_inspection(run: Run, step: int, batch: Batch, error: NotFiniteError) -> NotFiniteError:
    """Save a failed step's batch and terms; return the error with the place."""
    path = save_step(run.config.out / "aborted", step, batch, error.terms)
    run.events.emit("aborted", step=step, reason=str(error), **error.terms)
    return NotFiniteError(error.terms, f"step {step}: {error}; the batch is in {path}, {kept(run.config.out)}")


def _end_early(run: Run, number: int) -> StoppedError:
    """Return the error that ends a run which somebody asked to stop; its checkpoint is written.

    All processes end with it, one says so.
    """
    name = signal.Signals(number).name
    run.events.emit("stopped", step=run.done, signal=name)
    path = checkpoint_path(run.config.out, run.done)
    said = f"{name}: stopped after step {run.done}; continue from {path} with --resume"
    return StoppedError(said if run.is_main else "", number)


def _finish(run: Run, started: float, first: int) -> None:
    """Write the final model of a full run; project the full run from a smoke run."""
    config = run.config
    others = run.done - first - 1
    per_step = (run.training_seconds - run.first_step_seconds) / others if others > 0 else run.training_seconds
    summary: dict[str, Any] = {
        "steps": run.done,
        "steps_of_full_run": run.total_steps,
        "wall_seconds": time.monotonic() - started,
        "training_seconds": run.training_seconds,
        "tokens_per_second": run.tokens_per_step / max(per_step, 1e-9),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "projected_seconds_of_full_run": run.first_step_seconds + per_step * (run.total_steps - 1),
    }
    if config.max_steps is None:
        write_model(run)
    if run.is_main:
        if config.max_steps is not None:
            print(
                f"Smoke run: {run.done} of {run.total_steps} steps; the full run would take "
                f"{summary['projected_seconds_of_full_run'] / 60:.1f} min at {summary['tokens_per_second']:.0f} tok/s; "
                "no final model is written",
                flush=True,
            )
        write_json(config.out / "summary.json", summary)
    run.events.emit("done", step=run.done, **{key: value for key, value in summary.items() if key != "steps"})


def _check_difference(run: Run, batch: Batch) -> None:
    if run.cached is not None:
        check_cached_not_degenerate(run.cached, run.model, batch)
    else:
        assert run.teacher is not None
        check_not_degenerate(run.teacher, run.model, batch.ids_BT, batch.starts_BT, folder=run.config.student)


def _run(run: Run, resume: bool) -> None:
    """Everything after the run is assembled, from the checks before step 1 to the final model."""
    config, events, is_main = run.config, run.events, run.is_main
    events.emit(
        "run_plan",
        steps=run.last_step,
        steps_of_full_run=run.total_steps,
        tokens_per_step=run.tokens_per_step,
        train_tokens=run.data.train_tokens,
        held_out_tokens=len(run.data.held_out.tokens.ids),
        data_sha256=run.data.sha256,
        seed=config.seed,
        alpha=config.alpha,
    )
    if is_main:
        print(f"data: {run.data.describe(config)}", flush=True)
    if config.packing == "documents":
        student = run.unwrapped.student
        rows = student.get_output_embeddings().weight.shape[0]
        check_isolation(run.model, student.config, rows, config.seq_len, run.accelerator.device)
    if resume:
        checkpoint = restore(run)
        if is_main:
            print(f"Resumed from {checkpoint.name}", flush=True)
    elif config.alpha < 1 and not config.allow_degenerate_kd:
        _check_difference(run, run.batch(0))
    if is_main:
        write_run_file(run)
        shutil.rmtree(config.out / "model", ignore_errors=True)
    reporter = Reporter(run.last_step, config.log_every, run.data.order.steps_per_epoch)
    first, started = run.done, time.monotonic()
    watchdog = HangWatchdog(config.hang_s, config.out, events, rank=run.accelerator.process_index)
    with StopRequest(announce=is_main) as stop, watchdog:
        if not resume or (_evaluation_is_due(run) and not run.is_evaluated):
            _evaluate(run, watchdog)
        with reporter.running(run.done) if is_main else contextlib.nullcontext():
            _train(run, reporter, watchdog, stop)
        _checkpoint(run, watchdog)
        number = stop.agreed(run.accelerator)
        if number:
            raise _end_early(run, number)
        _evaluate(run, watchdog)
    _finish(run, started, first)


def distill(config: DistillConfig, *, resume: bool, events_path: Path | None = None) -> None:
    """Run a distillation to its last step.

    Args:
        config: checked settings.
        resume: continue from the newest checkpoint in ``config.out``.
        events_path: where events go; ``out/events.jsonl`` by default.

    Raises:
        InputError: when an input cannot be used; nothing has been trained then.
        TrainingAborted: when it ends before its last step; the subclass says why.
    """
    from accelerate import PartialState

    if config.threads:
        torch.set_num_threads(config.threads)
    check_device(config.device)
    # Under torchrun every process comes here; the main one keeps the folder, the events and the log.
    is_main = bool(PartialState(cpu=config.device == "cpu").is_main_process)
    with locked(config.out, is_main), guarded(config.device), explaining_full_disk(config.out):
        check_run_folder(config.out, resume)
        events = EventLog((events_path or config.out / "events.jsonl") if is_main else None)
        events.start()
        events.emit("imports_done")
        check_sources(config)
        placement = place_run_teacher(config)
        plan = plan_run(config, placement)
        events.emit("memory_plan", **plan.to_json())
        if is_main:
            print(format_plan(plan).splitlines()[0], flush=True)
        check_plan(config, plan, placement)
        teachers: list[Teacher] = []
        with explaining_memory(config, placement, lambda: teachers[0].residency() if teachers else None):
            run = assemble(config, placement, events, is_main)
            teachers += [run.teacher] if run.teacher is not None else []
            _run(run, resume)
            # Together: Gloo's threads must not outlive the interpreter, nor a process its peer's connections. Trackers
            # write what they hold.
            run.accelerator.wait_for_everyone()
            run.accelerator.end_training()
        events.close()
