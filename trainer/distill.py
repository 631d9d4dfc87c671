"""The whole run of ``q4kd distill``, from top to bottom. Its steps are in ``train/loop.py``."""

import dataclasses
import functools
import resource
from pathlib import Path
from typing import Any

import torch

from q4kd.trainer import wall
from q4kd.trainer.config.settings import DistillConfig
from q4kd.trainer.data.tokenizing import describe_begin
from q4kd.trainer.data.training_data import check_sources
from q4kd.trainer.device.allocation import let_segments_grow
from q4kd.trainer.device.backend import check_device
from q4kd.trainer.device.devices import has_visible_gpu
from q4kd.trainer.device.memory_watchdog import guarded
from q4kd.trainer.device.placement import TeacherPlacement
from q4kd.trainer.events import EventLog
from q4kd.trainer.files import write_json
from q4kd.trainer.made import MadeThings
from q4kd.trainer.starting import without_collection
from q4kd.trainer.student.folder import check_folder
from q4kd.trainer.student.imports import import_transformers
from q4kd.trainer.train.distributed import wait_for_all
from q4kd.trainer.train.guards import check_isolation
from q4kd.trainer.train.loop import train_to_the_end
from q4kd.trainer.train.memory.out_of_memory import explaining_memory
from q4kd.trainer.train.memory.plan import MemoryPlan, format_plan
from q4kd.trainer.train.memory.planner import check_plan, place_run_teacher, plan_run, student_shape
from q4kd.trainer.train.run.assembly import Run, assemble, restore
from q4kd.trainer.train.run.chat_date import describe_date, with_chat_date
from q4kd.trainer.train.run.folder import (
    PUBLISHED,
    check_own_paths,
    check_run_folder,
    explaining_full_disk,
    locked,
)
from q4kd.trainer.train.run.identity import InputDigests
from q4kd.trainer.train.run.state import Progress
from q4kd.trainer.train.run.writing import write_model, write_run_file


def distill(
    config: DistillConfig, *, resume: bool, events_path: Path | None = None, begun: float | None = None
) -> None:
    """Run a distillation to its last step.

    Args:
        config: checked settings.
        resume: continue from the newest checkpoint in ``config.out``.
        events_path: where events go; ``out/events.jsonl`` by default.
        begun: since when wall time counts, of ``time.monotonic``; since now by default.

    Raises:
        InputError: when an input cannot be used; nothing has been trained then.
        TrainingAborted: when the run ends before its last step; the subclass says why.
    """
    clock = wall.start(begun, imported="program and torch imported")
    from accelerate import PartialState

    if config.device == "cuda":
        let_segments_grow()
    if config.threads:
        torch.set_num_threads(config.threads)
    check_device(config.device)
    # Under torchrun every process comes here; the main one keeps the folder, the events and the log.
    is_main = bool(PartialState(cpu=config.device == "cpu").is_main_process)
    with locked(config.out, is_main), guarded(config.device), explaining_full_disk(config.out):
        check_run_folder(config.out, resume)
        check_own_paths(config)
        events = EventLog((events_path or config.out / "events.jsonl") if is_main else None)
        events.start()
        events.emit("imports_done")
        clock.listener = functools.partial(_say_phase, events, is_main)
        with without_collection():
            with wall.phase("open", "inputs checked"):
                check_sources(config)
                check_folder(config.student, from_scratch=config.from_scratch)
                config = with_chat_date(config, resume=resume, cache=config.teacher_cache)
            with wall.phase("open", "teacher opened"):
                placement = place_run_teacher(config)
            with wall.phase("open", "transformers imported"):
                import_transformers()
            # The digests are taken beside all that follows. Imports, before, have no core to spare on a small machine.
            digests = InputDigests(None if placement is None else placement.model, config.student)
            with wall.phase("open", "memory planned"):
                plan = _check_memory(config, placement, events, is_main)
            with explaining_memory(config, placement, lambda: None):
                run = assemble(config, placement, events, is_main, digests, student_shape(config).vocab)
                run = dataclasses.replace(run, copies_checkpoints=plan.copies_checkpoints)
        with explaining_memory(config, placement, run.source.residency):
            _train(run, resume)
            # Processes end together, because Gloo's threads must not outlive the interpreter, nor a process its peer's
            # connections. Trackers write what they hold.
            wait_for_all(run.accelerator)
            run.accelerator.end_training()
        events.close()


def _say_phase(events: EventLog, is_main: bool, phase: str, what: str, seconds: float) -> None:
    """Record the end of a phase that is not repeated; say it of compiling, which a second run finds done."""
    events.emit("phase", phase=phase, what=what, seconds=seconds)
    if is_main and phase == "compile":
        print(f"compiled {what} in {seconds:.1f} s, kept for later runs", flush=True)


def _check_memory(
    config: DistillConfig, placement: TeacherPlacement | None, events: EventLog, is_main: bool
) -> MemoryPlan:
    """Plan the run's memory and disk, say it, and refuse a run that cannot fit."""
    plan = plan_run(config, placement)
    events.emit("memory_plan", **plan.to_json())
    if is_main:
        print(format_plan(plan).splitlines()[0], flush=True)
        if config.device == "cpu" and has_visible_gpu():
            print("device: cpu, the default; this machine has an NVIDIA GPU, which --device cuda uses", flush=True)
    check_plan(config, plan, placement)
    return plan


def _train(run: Run, resume: bool) -> None:
    """Do everything after the run is assembled, from the checks before step 1 to the final model."""
    with wall.phase("load", "checkpoint read" if resume else "student checked"):
        _announce(run)
        _check_packing(run)
        progress = restore(run) if resume else _begin(run)
    with wall.phase("load", "digests of the inputs waited for"):
        run.digests.as_settings()
        if run.is_main:
            write_run_file(run)
            MadeThings(run.config.out).remove(*PUBLISHED)  # what an earlier leg left is not this one's
    train_to_the_end(run, progress, resumed=resume)
    _finish(run, progress)


def _announce(run: Run) -> None:
    """Say what will be trained on, and for how long."""
    run.events.emit(
        "run_plan",
        steps=run.last_step,
        steps_of_full_run=run.total_steps,
        tokens_per_step=run.tokens_per_step,
        train_tokens=run.data.train_tokens,
        held_out_tokens=len(run.data.held_out.tokens.ids),
        data_sha256=run.data.sha256,
        seed=run.config.seed,
        alpha=run.config.alpha,
        begin_of_text=list(run.data.begin),
        chat_date=run.config.chat_date,
    )
    held_out = run.data.held_out_account
    run.events.emit("data_read", **run.data.account.to_json(), held_out=held_out.to_json())
    if run.is_main:
        if said := describe_begin(run.tokenizer, run.data.begin, run.config.begin_of_text, run.source.metadata()):
            print(said, flush=True)
        if said := describe_date(run.config, run.tokenizer):
            print(said, flush=True)
        for line in (*run.data.account.lines(), *held_out.lines()):
            print(line, flush=True)
        print(f"data: {run.data.describe(run.config)}", flush=True)


def _check_packing(run: Run) -> None:
    """Refuse a student in which packed documents would see each other."""
    config = run.config
    if config.packing == "documents":
        student = run.unwrapped.student
        rows = student.get_output_embeddings().weight.shape[0]
        check_isolation(run.model, student.config, rows, config.seq_len, run.accelerator.device)


def _begin(run: Run) -> Progress:
    """Refuse a new run that has nothing to teach; return the progress of a run without a step."""
    config = run.config
    if config.alpha < 1 and not config.allow_degenerate_kd:
        run.source.check_difference(run.model, run.batch(0), config.student)
    return Progress()


def _finish(run: Run, progress: Progress) -> None:
    """Write the final model of a full run; project the full run from a smoke run; say where the time went."""
    is_smoke = run.config.max_steps is not None
    if not is_smoke:
        with wall.phase("save", "model written"):
            write_model(run)
    summary = _summary(run, progress)
    if run.is_main:
        if is_smoke:
            took = f"{progress.done} of {run.total_steps} steps"
            minutes, speed = summary["projected_seconds_of_full_run"] / 60, summary["tokens_per_second"]
            would = f"the full run would take {minutes:.1f} min at {speed:.0f} tok/s"
            print(f"Smoke run: {took}; {would}; no final model is written", flush=True)
        write_json(run.config.out / "summary.json", summary)
        print(wall.describe(summary["wall"]), flush=True)
    run.events.emit("done", step=progress.done, **{key: value for key, value in summary.items() if key != "steps"})


def _summary(run: Run, progress: Progress) -> dict[str, Any]:
    """Return what summary.json says: steps, seconds, tokens per second, bytes; the phases add up to the wall time."""
    phases = wall.clock().seconds()
    first, others = progress.first_step_seconds, progress.leg_steps - 1
    per_step = (progress.training_seconds - first) / others if others > 0 else progress.training_seconds
    return {
        "steps": progress.done,
        "steps_of_full_run": run.total_steps,
        "wall_seconds": sum(phases.values()),
        "wall": phases,
        "wall_parts": wall.clock().parts(),
        "training_seconds": progress.training_seconds,
        "tokens_per_second": run.tokens_per_step / max(per_step, 1e-9),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "projected_seconds_of_full_run": first + per_step * (run.total_steps - 1),
        **({} if run.experts is None else {"student_experts": vars(run.experts)}),
    }
