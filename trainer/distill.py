"""The whole run, top to bottom: ``q4kd distill``."""

import contextlib
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from q4kd.trainer.backend import check_device
from q4kd.trainer.checkpoint import CheckpointState, list_checkpoints, save_checkpoint
from q4kd.trainer.config import DistillConfig
from q4kd.trainer.errors import TrainingAborted
from q4kd.trainer.evaluate import Evaluation, evaluate
from q4kd.trainer.events import EventLog
from q4kd.trainer.files import write_json
from q4kd.trainer.guards import check_isolation, check_not_degenerate
from q4kd.trainer.progress import Reporter
from q4kd.trainer.run import Run, assemble, restore, write_model, write_run_file
from q4kd.trainer.run_folder import check_run_folder, locked
from q4kd.trainer.sharding import gather, trained_tensors
from q4kd.trainer.step import learning_rate, save_batch, train_step
from q4kd.trainer.watchdog import guarded


def _evaluate(run: Run) -> Evaluation | None:
    result = evaluate(run.accelerator, run.model, run.teacher, run.held_out_batches())
    if result is not None and run.is_main:
        run.events.emit("eval", step=run.done, **vars(result))
        print(
            f"Held-out at step {run.done}: loss: {result.loss:.4f}, KL to teacher: {result.kl:.4f}, "
            f"top-1 agreement: {result.agreement:.2%}, perplexity: {result.perplexity:.2f} ({result.tokens} tokens)",
            flush=True,
        )
    return result


def _checkpoint(run: Run) -> None:
    # Under FSDP every process holds a part of each tensor: all gather, one writes.
    model = gather(trained_tensors(run.unwrapped.student), run.is_main)
    optimizer = gather(run.optimizer.tensors(), run.is_main)
    if not run.is_main:
        return
    state = CheckpointState(run.done, run.settings, run.data.sha256)
    try:
        path = save_checkpoint(run.config.out, model, optimizer, state, run.config.keep)
    except (OSError, SafetensorError) as error:
        kept = [checkpoint.name for checkpoint in list_checkpoints(run.config.out)]
        raise TrainingAborted(
            f"step {run.done}: the checkpoint cannot be written ({error}); "
            f"kept: {', '.join(kept) or 'none'}; free some space and continue with --resume"
        ) from error
    run.events.emit("checkpoint", step=run.done, path=path.name)


def _train(run: Run, reporter: Reporter) -> None:
    config = run.config
    teacher = run.teacher if config.alpha < 1 else None
    run.model.train()
    for step in range(run.done, run.last_step):
        before = time.monotonic()
        batch = run.batch(step)
        data_s = time.monotonic() - before
        lr = learning_rate(step, config, run.total_steps)
        try:
            result = train_step(run.accelerator, run.model, teacher, run.optimizer, batch, config, lr)
        except TrainingAborted as error:
            kept = save_batch(config.out / "aborted", step + 1, batch)
            run.events.emit("aborted", step=step + 1, reason=str(error))
            raise TrainingAborted(f"step {step + 1}: {error}; the batch is in {kept}") from error
        run.done = step + 1
        run.training_seconds += data_s + result.seconds
        if run.is_main:
            run.events.emit("step", step=run.done, steps=run.last_step, data_s=data_s, **vars(result))
            reporter.step(
                run.done, result.loss, result.tokens / result.seconds, result.teacher_s / max(result.seconds, 1e-9)
            )
        if config.checkpoint_every and run.done % config.checkpoint_every == 0 and run.done < run.last_step:
            _checkpoint(run)
        if config.eval_every and run.done % config.eval_every == 0 and run.done < run.last_step:
            _evaluate(run)


def _finish(run: Run, started: float, first: int) -> None:
    """Write the final model of a full run; project the full run from a smoke run."""
    config = run.config
    per_step = run.training_seconds / max(1, run.done - first)
    summary: dict[str, Any] = {
        "steps": run.done,
        "steps_of_full_run": run.total_steps,
        "wall_seconds": time.monotonic() - started,
        "training_seconds": run.training_seconds,
        "tokens_per_second": run.tokens_per_step / max(per_step, 1e-9),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "projected_seconds_of_full_run": per_step * run.total_steps,
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


def distill(config: DistillConfig, *, resume: bool, events_path: Path | None = None) -> None:
    """Run a distillation to its last step.

    Args:
        config: checked settings.
        resume: continue from the newest checkpoint in ``config.out``.
        events_path: where events go; ``out/events.jsonl`` by default.

    Raises:
        InputError: when an input cannot be used; nothing has been trained then.
        TrainingAborted: when the loss stops being finite.
    """
    from accelerate import PartialState

    if config.threads:
        torch.set_num_threads(config.threads)
    check_device(config.device)
    # Under torchrun every process comes here; the main one keeps the folder, the events and the log.
    is_main = bool(PartialState(cpu=config.device == "cpu").is_main_process)
    with locked(config.out, is_main), guarded(config.device):
        check_run_folder(config.out, resume)
        events = EventLog((events_path or config.out / "events.jsonl") if is_main else None)
        events.start()
        events.emit("imports_done")
        run = assemble(config, events, is_main)
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
        if config.packing == "documents":
            student = run.unwrapped.student
            rows = student.get_output_embeddings().weight.shape[0]
            check_isolation(run.model, student.config, rows, config.seq_len, run.accelerator.device)
        if resume:
            checkpoint = restore(run)
            if is_main:
                print(f"Resumed from {checkpoint.name}", flush=True)
        elif config.alpha < 1 and not config.allow_degenerate_kd:
            first_batch = run.batch(0)
            check_not_degenerate(run.teacher, run.unwrapped, first_batch.ids_BT, first_batch.starts_BT)
        if is_main:
            write_run_file(run)
            shutil.rmtree(config.out / "model", ignore_errors=True)
        reporter = Reporter(run.last_step, config.log_every, run.data.order.steps_per_epoch)
        first, started = run.done, time.monotonic()
        if not resume:
            _evaluate(run)
        with reporter.running(run.done) if is_main else contextlib.nullcontext():
            _train(run, reporter)
        _checkpoint(run)
        _evaluate(run)
        _finish(run, started, first)
        events.close()
