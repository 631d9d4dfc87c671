"""The whole run, top to bottom: ``q4kd distill``."""

import contextlib
import functools
import math
import resource
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from q4kd.trainer.backend import check_device
from q4kd.trainer.checkpoint import (
    CheckpointState,
    explain_difference,
    list_checkpoints,
    read_state,
    restore_checkpoint,
    save_checkpoint,
)
from q4kd.trainer.config import DistillConfig
from q4kd.trainer.data import BatchOrder, Corpus, load_corpus
from q4kd.trainer.errors import InputError, TrainingAborted
from q4kd.trainer.evaluate import Evaluation, evaluate
from q4kd.trainer.events import EventLog
from q4kd.trainer.files import write_json
from q4kd.trainer.guards import check_not_degenerate, check_vocabulary
from q4kd.trainer.progress import Reporter
from q4kd.trainer.run_folder import check_run_folder, locked
from q4kd.trainer.step import learning_rate, save_batch, train_step
from q4kd.trainer.student import DistillationModel, encoder, load_student, load_tokenizer
from q4kd.trainer.teacher import Teacher, load_teacher
from q4kd.trainer.watchdog import guarded

# Settings that may change when a run is resumed: they steer reporting and this leg's length, not the losses.
_RESUMABLE = frozenset({"out", "log_every", "max_steps", "eval_every", "eval_tokens", "checkpoint_every", "keep"})


@dataclass
class _Run:
    """Everything the loop needs, assembled before the first step."""

    config: DistillConfig
    accelerator: Any
    model: Any
    optimizer: Any
    tokenizer: Any
    teacher: Teacher
    corpus: Corpus
    order: BatchOrder
    events: EventLog
    total_steps: int
    last_step: int
    done: int = 0
    training_seconds: float = 0.0

    @property
    def unwrapped(self) -> DistillationModel:
        model: DistillationModel = self.accelerator.unwrap_model(self.model)
        return model

    @property
    def is_main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    @property
    def tokens_per_step(self) -> int:
        """Targets of one optimiser step, over all processes."""
        return self.config.seq_len * self.order.sequences_per_step

    @property
    def settings(self) -> dict[str, Any]:
        """What a resumed run must repeat: the config, and the number of processes that share a batch."""
        return {**self.config.to_json(), "processes": self.accelerator.num_processes}


def _assemble(config: DistillConfig, events: EventLog, is_main: bool) -> _Run:
    from accelerate import Accelerator

    announce = functools.partial(print, flush=True) if is_main else _say_nothing
    # First, because it chooses this process's GPU among several.
    accelerator = Accelerator(cpu=config.device == "cpu")
    teacher = load_teacher(
        config.teacher,
        backend=config.backend,
        device=config.device,
        dtype=config.dtype,
        events=events,
        announce=announce,
    )
    tokenizer = load_tokenizer(config.student)
    student = load_student(config.student, config.seed)
    rows: int = student.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    check_vocabulary(teacher.model.tokens, teacher.vocab_size, tokenizer.get_vocab(), rows)
    announce(f"vocabulary: {rows} of the teacher's {teacher.vocab_size} rows")
    corpus = load_corpus(
        config.data,
        pattern=config.data_glob,
        max_bytes=config.data_max_bytes,
        encode=encoder(tokenizer),
        end_of_text=tokenizer.eos_token_id,
    )
    sequences = config.batch_size * config.accumulation * accelerator.num_processes
    order = BatchOrder(
        corpus.train, seq_len=config.seq_len, sequences_per_step=sequences, seed=config.seed, path=config.data
    )
    total = config.steps or max(1, math.ceil(config.epochs * order.steps_per_epoch))
    model = DistillationModel(student, config.loss)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    model, optimizer = accelerator.prepare(model, optimizer)
    return _Run(
        config=config,
        accelerator=accelerator,
        model=model,
        optimizer=optimizer,
        tokenizer=tokenizer,
        teacher=teacher,
        corpus=corpus,
        order=order,
        events=events,
        total_steps=total,
        last_step=min(total, config.max_steps or total),
    )


def _say_nothing(_line: str) -> None:
    """Leave the log to the main process."""


def _restore(run: _Run) -> None:
    """Continue from the newest checkpoint of a run with the same settings and data."""
    path = list_checkpoints(run.config.out)[-1]
    state = read_state(path)
    difference = explain_difference(state.config, run.settings, _RESUMABLE)
    if difference or state.data_sha256 != run.corpus.train.sha256:
        raise InputError(
            f"--resume from {path}",
            expected="the settings and data of that run",
            got=difference or "other training data",
            remedy="repeat its settings, or start a new run in another folder",
        )
    restore_checkpoint(path, run.unwrapped.student, getattr(run.optimizer, "optimizer", run.optimizer))
    run.done = state.step
    run.events.emit("resumed", step=run.done, checkpoint=path.name)
    if run.is_main:
        print(f"Resumed from {path.name}", flush=True)


def _evaluate(run: _Run) -> Evaluation | None:
    config = run.config
    result = evaluate(
        run.unwrapped,
        run.teacher,
        run.corpus.held_out,
        seq_len=config.seq_len,
        batch_size=config.batch_size,
        max_tokens=config.eval_tokens,
    )
    if result is not None and run.is_main:
        run.events.emit("eval", step=run.done, **vars(result))
        print(
            f"Held-out at step {run.done}: loss: {result.loss:.4f}, KL to teacher: {result.kl:.4f}, "
            f"top-1 agreement: {result.agreement:.2%} ({result.tokens} tokens)",
            flush=True,
        )
    return result


def _checkpoint(run: _Run) -> None:
    if not run.is_main:
        return
    state = CheckpointState(run.done, run.settings, run.corpus.train.sha256)
    optimizer = getattr(run.optimizer, "optimizer", run.optimizer)
    try:
        path = save_checkpoint(run.config.out, run.unwrapped.student, optimizer, state, run.config.keep)
    except (OSError, SafetensorError) as error:
        kept = [checkpoint.name for checkpoint in list_checkpoints(run.config.out)]
        raise TrainingAborted(
            f"step {run.done}: the checkpoint cannot be written ({error}); "
            f"kept: {', '.join(kept) or 'none'}; free some space and continue with --resume"
        ) from error
    run.events.emit("checkpoint", step=run.done, path=path.name)


def _windows(run: _Run, step: int) -> torch.Tensor:
    """Return this process's share of a step's windows."""
    everything = torch.from_numpy(run.order.batch(step))
    share = everything[run.accelerator.process_index :: run.accelerator.num_processes]
    return share.to(run.accelerator.device)


def _train(run: _Run, reporter: Reporter) -> None:
    config = run.config
    teacher = run.teacher if config.alpha < 1 else None
    run.model.train()
    for step in range(run.done, run.last_step):
        before = time.monotonic()
        windows = _windows(run, step)
        data_s = time.monotonic() - before
        lr = learning_rate(step, config, run.total_steps)
        try:
            result = train_step(run.accelerator, run.model, teacher, run.optimizer, windows, config, lr)
        except TrainingAborted as error:
            kept = save_batch(config.out / "aborted", step + 1, windows)
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


def _finish(run: _Run, started: float, first: int) -> None:
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
    if run.is_main:
        if config.max_steps is None:
            folder = config.out / "model"
            run.unwrapped.student.save_pretrained(folder, safe_serialization=True)
            run.tokenizer.save_pretrained(folder)
            print(f"Model written to {folder}", flush=True)
        else:
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
        run = _assemble(config, events, is_main)
        events.emit(
            "run_plan",
            steps=run.last_step,
            steps_of_full_run=run.total_steps,
            tokens_per_step=run.tokens_per_step,
            train_tokens=len(run.corpus.train.tokens),
            held_out_tokens=len(run.corpus.held_out.tokens),
            data_sha256=run.corpus.train.sha256,
            seed=config.seed,
            alpha=config.alpha,
        )
        if resume:
            _restore(run)
        elif config.alpha < 1 and not config.allow_degenerate_kd:
            first_batch = torch.from_numpy(run.order.batch(0))[:, :-1].to(run.accelerator.device)
            check_not_degenerate(run.teacher, run.unwrapped, first_batch)
        if is_main:
            shutil.rmtree(config.out / "model", ignore_errors=True)
        reporter = Reporter(run.last_step, config.log_every, run.order.steps_per_epoch)
        first, started = run.done, time.monotonic()
        if not resume:
            _evaluate(run)
        with reporter.running(run.done) if is_main else contextlib.nullcontext():
            _train(run, reporter)
        _checkpoint(run)
        _evaluate(run)
        _finish(run, started, first)
        events.close()
