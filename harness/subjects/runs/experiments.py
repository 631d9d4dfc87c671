"""Experiments on what a person sees of a run: progress lines and their cost, and a smoke run beside the full one."""

import functools
from pathlib import Path

import numpy as np

from q4kd.harness.inputs.arrays import Floats, read_arrays, save_arrays
from q4kd.harness.inputs.collect import Comparators, arm_of, checkpoint_facts, read_events, save_pairs, step_terms
from q4kd.harness.inputs.command_lines import distill_words
from q4kd.harness.inputs.demo import BATCH, SEQ_LEN, demo_student, demo_teacher, training_text
from q4kd.harness.runs.experiment import ONE_THREAD, Arm, Facts, Inputs, declare, experiment
from q4kd.trainer.files import read_json

STEPS, SMOKE_STEPS, EPOCH_STEPS = 20, 10, 10


def _argv(words: tuple[str, ...], inputs: Inputs) -> list[str]:
    data = training_text(inputs, EPOCH_STEPS)
    return distill_words(demo_teacher(inputs), demo_student(inputs), data, "--set", f"steps={STEPS}", *words)


def _arm(name: str, *words: str) -> Arm:
    return Arm(name, functools.partial(_argv, words), timeout_s=120, stall_s=60, env=ONE_THREAD)


# --- progress-lines: 20 steps, two epochs, under three settings ---

declare(
    "progress-lines",
    f"{STEPS} steps in two epochs, with progress lines as by default, at every step, and for epochs only",
    _arm("default"),
    _arm("every-1", "--set", "log_every=1"),
    _arm("every-0", "--set", "log_every=0"),
    parallel=2,
)


# --- reporting-cost: what a step's event and line take, beside the step ---


def _timed_argv(inputs: Inputs) -> list[str]:
    # Steps of 512 tokens are far shorter than real ones, so reporting costs at most this share of a step elsewhere.
    words = ("--set", "log_every=1", "--set", "batch_size=16")
    return ["probe", "distill-timed", "--out", "timings.npz", "--", *_argv(words, inputs)]


@experiment(
    "reporting-cost",
    f"the clock around each of {STEPS} steps and around the event and the line that report it",
    Arm(None, _timed_argv, timeout_s=120, stall_s=60, env=ONE_THREAD),
    measures=("time",),
)
def _collect_timings(run_dir: Path, _inputs: Inputs) -> Facts:
    if arrays := read_arrays(run_dir / "timings.npz"):
        save_arrays(run_dir / "arrays" / "reporting.npz", arrays)
    return {}


# --- smoke-run: a run cut short by --max-steps, and the same run without it ---


def _projection(run_dir: Path) -> tuple[Floats, Floats] | None:
    """Return what the summary projects, and the same from the times of the step events."""
    path, steps = run_dir / "run" / "summary.json", read_events(run_dir, "step")
    if not path.is_file() or len(steps) < 2:
        return None
    summary = read_json(path)
    per_step = (steps[-1]["t"] - steps[0]["t"]) / (len(steps) - 1)
    whole = steps[0]["seconds"] + steps[0]["data_s"] + per_step * (STEPS - 1)
    stated = [summary.get("projected_seconds_of_full_run", np.nan), summary.get("tokens_per_second", np.nan)]
    return np.array([stated]).T, np.array([[whole], [BATCH * SEQ_LEN / per_step]])


def _phases(run_dir: Path) -> list[list[float]] | None:
    """Return wall time and time of the steps: as the summary says, and from the start seen outside, or by each step."""
    path, ending = run_dir / "run" / "summary.json", run_dir / "exit.json"
    steps, done = read_events(run_dir, "step"), read_events(run_dir, "done")
    if not path.is_file() or not ending.is_file() or not steps or not done:
        return None
    phases, wall = read_json(path).get("wall", {}), done[-1]["t"] - read_json(ending)["start_t"]
    taken = sum(step["seconds"] + step["data_s"] for step in steps)
    return [[sum(phases.values()), wall], [phases.get("train", np.nan), taken]]


@experiment(
    "smoke-run",
    f"--max-steps {SMOKE_STEPS} of a run of {STEPS} steps, and the run without it",
    _arm("smoke", "--max-steps", str(SMOKE_STEPS)),
    _arm("full"),
)
def _collect_smoke(run_dir: Path, _inputs: Inputs) -> Facts:
    """Count steps three ways, look for a model, and compare the two arms, of which the smoke run comes first."""
    checkpoint, out = checkpoint_facts(run_dir), run_dir / "run"
    counted = checkpoint or {}
    counts = {
        "step events": len(read_events(run_dir, "step")),
        "step of the checkpoint": counted.get("step", 0),
        "fewest updates of a weight": counted.get("optimizer_step_min", 0),
        "most updates of a weight": counted.get("optimizer_step_max", 0),
    }
    outputs = {
        "folder model": (out / "model").exists(),
        "weights outside the checkpoints": len([*out.glob("*.safetensors"), *out.glob("model/*.safetensors")]),
        "checkpoints": len(list(out.glob("checkpoints/step-*"))),
    }
    comparators: Comparators = {}
    if arm_of(run_dir) == "smoke":
        pair = _projection(run_dir)
        if pair is not None:
            comparators = save_pairs(run_dir, {"projection": pair}, ("summary.json", "times of the step events"))
    else:
        pair = step_terms(run_dir)[:SMOKE_STEPS], step_terms(run_dir.parent / "smoke-run.smoke")
        comparators = save_pairs(run_dir, {"first-steps": pair}, ("run without --max-steps", "smoke run"))
        phases = [_phases(folder) for folder in (run_dir, run_dir.parent / "smoke-run.smoke")]
        if all(phases):
            table = np.array(phases, np.float64)
            pairs = {name: (table[:, at, :1], table[:, at, 1:]) for at, name in enumerate(("wall", "training"))}
            comparators |= save_pairs(run_dir, pairs, ("summary.json", "supervisor, and step events"))
    tables = {"steps": counts, "outputs": outputs}
    return {"checkpoint": checkpoint, "tables": tables, "comparators": comparators}
