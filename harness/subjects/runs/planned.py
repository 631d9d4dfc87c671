"""An experiment on the memory plan: what it counts for a run beside the memory that the supervisor saw."""

import functools
from pathlib import Path

import numpy as np

from q4kd.harness.inputs.collect import arm_of, read_events, save_pairs
from q4kd.harness.inputs.command_lines import distill_words, set_words
from q4kd.harness.inputs.demo import argparse_documents, changed_student, demo_teacher
from q4kd.harness.inputs.samples import growth, planned_bytes
from q4kd.harness.inputs.synthetic_students import student_shape
from q4kd.harness.runs.experiment import ONE_THREAD, Arm, Facts, Inputs, experiment

_PLANS: dict[str, dict[str, object]] = {
    "batch-8": {"batch_size": 8},
    "batch-16": {"batch_size": 16},
    "checkpointing": {"batch_size": 16, "gradient_checkpointing": "true"},
}
# glibc gives freed blocks back at once, so that resident memory is what the program holds. How much more it keeps by
# default depends on the order of allocations (measured: 40 to 140 MB); the plan's item "allocator" is left out here.
_ENV = {**ONE_THREAD, "MALLOC_MMAP_THRESHOLD_": "65536"}


def _large_student(inputs: Inputs) -> Path:
    shape = student_shape(hidden=512, ffn=1536, layers=6, heads=8, kv_heads=4)
    return changed_student(inputs, "student-20m", shape)


def _planned_argv(settings: dict[str, object], inputs: Inputs) -> list[str]:
    every = {"steps": 3, "seq_len": 64, "eval_tokens": 256, **settings}
    return distill_words(demo_teacher(inputs), _large_student(inputs), argparse_documents(inputs), *set_words(every))


def _planned_and_grown(run_dir: Path) -> tuple[int, int] | None:
    """Return the peak of a run's plan, and the growth of its resident memory from the plan to the last step."""
    marks = {name: read_events(run_dir, name) for name in ("memory_plan", "step")}
    if not all(marks.values()):
        return None
    plan, over = marks["memory_plan"][0], marks["step"][-1]["t"]
    # From the plan, and no later: 0.1 s after it the student is half loaded.
    grown = growth(run_dir, "rss", plan["t"], over)
    return None if grown is None else (planned_bytes(plan), grown)


@experiment(
    "planned-run",
    "a student of 20 M weights planned and measured, at two batch sizes and with gradient checkpointing",
    *(
        Arm(name, functools.partial(_planned_argv, settings), timeout_s=240, stall_s=120, env=_ENV, interval_s=0.01)
        for name, settings in _PLANS.items()
    ),
    measures=("memory",),
)
def _collect_planned(run_dir: Path, _inputs: Inputs) -> Facts:
    """Compare plan and growth of all arms, one row each, in the facts of the last."""
    if arm_of(run_dir) != "checkpointing":
        return {}
    rows = [_planned_and_grown(run_dir.parent / f"planned-run.{name}") for name in _PLANS]
    if any(row is None for row in rows):
        return {"comparators": {}}
    pair = np.array([[row[0]] for row in rows if row]), np.array([[row[1]] for row in rows if row])
    sources = ("peak of the memory plan", "growth of the resident memory seen by the supervisor")
    return {"comparators": save_pairs(run_dir, {"plan": pair}, sources)}
