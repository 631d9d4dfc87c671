"""Experiments on training on a CUDA device: runs that are stopped and resumed, and the memory that a plan foresees."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from q4kd.harness.inputs.arrays import Floats
from q4kd.harness.inputs.collect import Comparators, Event, read_events, run_terms, save_pairs
from q4kd.harness.inputs.command_lines import distill_words, named_run, probe_words, set_words
from q4kd.harness.inputs.demo import argparse_documents, changed_student, demo_student, demo_teacher
from q4kd.harness.inputs.samples import read_samples
from q4kd.harness.inputs.synthetic_students import student_shape
from q4kd.harness.runs.experiment import ONE_THREAD, Arm, Facts, Inputs, experiment
from q4kd.harness.subjects.training.guards import EXACT_STUDENT, EXACT_TEACHER, padded_teacher
from q4kd.trainer.files import read_json, sha256_file, write_json

_CUDA = ("cuda",)


# --- cuda-resumed-runs: a run stopped and resumed, beside the same left alone, with weights and with adapters ---

STEPS, STOPPED_AT = 8, 4
# Adapters with dropout draw from the generator of the GPU, whose state a checkpoint keeps.
_KINDS: Mapping[str, Mapping[str, object]] = {"weights": {}, "adapters": {"lora_rank": 4, "lora_dropout": 0.2}}


def resume_commands(inputs: Inputs, device: str) -> list[tuple[str, list[str]]]:
    """Return the commands of the experiment by name, as they follow each other."""
    found = []
    for kind, settings in _KINDS.items():
        given = {"steps": STEPS, "checkpoint_every": 2, "eval_tokens": 64, "device": device, **settings}
        words = distill_words(
            demo_teacher(inputs), demo_student(inputs), argparse_documents(inputs), "--dtype", "auto", *set_words(given)
        )
        found += [
            (f"{kind}-stopped", [*named_run(f"{kind}-stopped", words), "--max-steps", str(STOPPED_AT)]),
            (f"{kind}-whole", named_run(f"{kind}-whole", words)),
            (f"{kind}-resumed", [*named_run(f"{kind}-stopped", words), "--resume"]),
            (f"{kind}-again", named_run(f"{kind}-again", words)),
        ]
    return found


def _resumed_argv(inputs: Inputs) -> list[str]:
    commands = resume_commands(inputs, "cuda")
    cases = inputs.file("cuda-resumed-runs.json", lambda path: write_json(path, {"commands": commands}))
    return [*probe_words("commands", cases=cases, out="commands.json"), "--deterministic"]


def _all_steps(terms: Floats) -> Floats:
    """Return as many rows as a whole run has steps; steps that were not taken are rows of NaN, at the end."""
    missing = np.full((max(0, STEPS - len(terms)), *terms.shape[1:]), np.nan)
    return np.concatenate([terms[:STEPS], missing])


@experiment(
    "cuda-resumed-runs",
    f"{STEPS} steps on the GPU stopped after {STOPPED_AT} and resumed, beside two runs left alone, twice",
    Arm(None, _resumed_argv, timeout_s=240, env=ONE_THREAD),
    needs=_CUDA,
)
def collect_resumed(run_dir: Path, _inputs: Inputs) -> Facts:
    """Compare every step, and the final models, with those of a run left alone; and two of these with each other."""
    rows: dict[str, list[Floats]] = {"resumed": [], "again": [], "whole": []}
    models: dict[str, list[str | None]] = {"stopped": [], "whole": []}
    for kind in _KINDS:
        for name, others in (("resumed", "stopped"), ("again", "again"), ("whole", "whole")):
            rows[name].append(run_terms(run_dir, f"{kind}-{others}"))
        for name, digests in models.items():
            path = run_dir / f"{kind}-{name}" / "model" / "model.safetensors"
            digests.append(sha256_file(path) if path.is_file() else None)
    if any(len(terms) != STEPS for terms in rows["whole"]):
        return {"comparators": {}}
    joined = {name: np.concatenate([_all_steps(terms) for terms in found]) for name, found in rows.items()}
    comparators = save_pairs(run_dir, {"resumed": (joined["resumed"], joined["whole"])}, ("resumed", "run left alone"))
    comparators |= save_pairs(run_dir, {"again": (joined["again"], joined["whole"])}, ("second run", "run left alone"))
    table = {
        f"{kind}: final models are equal": one is not None and one == other
        for kind, one, other in zip(_KINDS, models["stopped"], models["whole"], strict=True)
    }
    return {"comparators": comparators, "tables": {"resumed": table}}


# --- cuda-wall: what a run takes beside its steps ---

# Steps of the pair that is made, and of one that was given. Start and end of a run take as long for a minute's steps as
# for a day's: of the made pair's minute, what lies between them is judged.
WALL_STEPS, GIVEN_STEPS, WALL_EVERY = 200, 1000, 100


def _wall_steps(inputs: Inputs) -> int:
    return WALL_STEPS if inputs.given.pair() is None else GIVEN_STEPS


def _wall_argv(inputs: Inputs) -> list[str]:
    if (given := inputs.given.pair()) is None:
        shape = student_shape(hidden=896, ffn=4864, layers=24, heads=14, kv_heads=2)
        teacher, data = padded_teacher(inputs, EXACT_TEACHER), argparse_documents(inputs)
        student = changed_student(inputs, "student-wall", {**shape, "vocab_size": EXACT_STUDENT})
    else:
        teacher, student, data = given
    settings: dict[str, object] = {"steps": _wall_steps(inputs), "batch_size": 32, "seq_len": 512, "lr": 1e-5}
    settings |= {"eval_every": WALL_EVERY, "checkpoint_every": WALL_EVERY, "device": "cuda"}
    return distill_words(teacher, student, data, "--dtype", "auto", *set_words(settings))


@experiment(
    "cuda-wall",
    f"{WALL_STEPS} steps on the GPU, {GIVEN_STEPS} of a given pair, with an evaluation and a checkpoint of the student "
    f"(0.5 B weights where none is given) every {WALL_EVERY}",
    Arm(None, _wall_argv, timeout_s=900, stall_s=300),
    needs=_CUDA,
    exclusive=True,
    measures=("time",),
)
def collect_wall(run_dir: Path, inputs: Inputs) -> Facts:
    """Compare the time of the whole run, and that of all but the first steps, with the steps' own times.

    A given pair's run lasts from the process's start to its end, a made one's from the beginning of the first step
    to the end of the last.

    The figures say when the first step was over, and where the wall time went.
    """
    steps, path = read_events(run_dir, "step"), run_dir / "exit.json"
    if len(steps) != _wall_steps(inputs) or not path.is_file():
        return {"comparators": {}}
    process = read_json(path)
    taken = np.array([step["seconds"] + step["data_s"] for step in steps])
    whole = process["wall_s"] if inputs.given.pair() else steps[-1]["t"] - steps[0]["t"] + taken[0]
    later = steps[-1]["t"] - steps[WALL_EVERY - 1]["t"]
    wall = np.array([[whole], [later]])
    pair = {"wall": (wall, np.array([[taken.sum()], [taken[WALL_EVERY:].sum()]]))}
    comparators = save_pairs(run_dir, pair, ("time from outside", "sum of the steps' times"))
    figures = {
        "seconds from the start to the first step": steps[0]["t"] - taken[0] - process["start_t"],
        "summary": read_json(run_dir / "run" / "summary.json"),
    }
    return {"comparators": comparators, "figures": figures}


# --- cuda-planned-runs: what the plan counts on the GPU, beside what torch and the driver say was taken ---

_PLANNED: Mapping[str, Mapping[str, object]] = {
    "float32": {"batch_size": 8, "student_dtype": "float32"},
    "bfloat16": {"batch_size": 16},
    "checkpointing": {"batch_size": 32, "gradient_checkpointing": "true"},
    "accumulated": {"batch_size": 8, "accumulation": 2},
    "adapters": {"batch_size": 16, "lora_rank": 16},
    "wide": {"batch_size": 8},
}


def planned_commands(inputs: Inputs) -> list[tuple[str, list[str]]]:
    """Return the commands of the experiment by name: two small runs to warm up, and one for each setting."""
    shape = student_shape(hidden=768, ffn=2304, layers=12, heads=12, kv_heads=4)
    large = changed_student(inputs, "student-90m", shape)
    # The logits of Qwen2.5's vocabulary take more than all else.
    narrow = student_shape(hidden=512, ffn=1536, layers=6, heads=8, kv_heads=4)
    wide = changed_student(inputs, "student-wide", {**narrow, "vocab_size": EXACT_STUDENT})
    documents, found = argparse_documents(inputs), []

    def add(name: str, teacher: Path, student: Path, settings: Mapping[str, object]) -> None:
        every = {"steps": 3, "seq_len": 256, "eval_tokens": 512, "device": "cuda", **settings}
        words = distill_words(teacher, student, documents, "--dtype", "auto", "--max-steps", "3", *set_words(every))
        found.append((name, named_run(name, words)))

    # What the first run on a GPU compiles and loads stays for the others.
    for dtype in ("float32", "bfloat16"):
        add(f"warm-up-{dtype}", demo_teacher(inputs), demo_student(inputs), {"student_dtype": dtype})
    for name, settings in _PLANNED.items():
        is_wide = name == "wide"
        teacher = padded_teacher(inputs, EXACT_TEACHER) if is_wide else demo_teacher(inputs)
        add(name, teacher, wide if is_wide else large, settings)
    return found


def _planned_argv(inputs: Inputs) -> list[str]:
    commands = planned_commands(inputs)
    cases = inputs.file("cuda-planned-runs.json", lambda path: write_json(path, {"commands": commands}))
    return probe_words("commands", cases=cases, out="commands.json")


def _grown(run_dir: Path, plan: Event, last: Event) -> int | None:
    """Return by how much the driver's figure for the process rose from the plan to the last step, as seen outside."""
    samples = [sample for sample in read_samples(run_dir) if plan["t"] <= sample["t"] <= last["t"]]
    during: list[Any] = [sample.get("gpu_bytes") for sample in samples]
    return max(during) - during[0] if during and all(size is not None for size in during) else None


@experiment(
    "cuda-planned-runs",
    f"runs on the GPU planned and measured, under {len(_PLANNED)} settings of student, batch and precision",
    Arm(None, _planned_argv, timeout_s=420, env=ONE_THREAD, interval_s=0.01),
    needs=_CUDA,
    measures=("memory",),
)
def collect_planned(run_dir: Path, _inputs: Inputs) -> Facts:
    """Lay the plan of every setting, one row each, beside torch's two peaks and the growth that the driver saw."""
    path = run_dir / "commands.json"
    measured = read_json(path)["commands"] if path.is_file() else {}
    planned: list[list[float]] = []
    taken: dict[str, list[list[float]]] = {"allocated": [], "reserved": [], "driver": []}
    phases: dict[str, int] = {}
    for name in _PLANNED:
        plans, steps = (
            read_events(run_dir, event, f"{name}.jsonl") if (run_dir / f"{name}.jsonl").is_file() else []
            for event in ("memory_plan", "step")
        )
        grown = _grown(run_dir, plans[0], steps[-1]) if plans and steps else None
        if grown is None or "allocated" not in measured.get(name, {}):
            return {"comparators": {}}
        planned.append([plans[0]["peak_bytes"]])
        phases |= {f"{name}, {phase} phase": size for phase, size in plans[0]["phases"].items()}
        for what, size in (*((what, measured[name][what]) for what in ("allocated", "reserved")), ("driver", grown)):
            taken[what].append([size])
    comparators: Comparators = {}
    for what, source in (
        ("allocated", "peak of torch's allocator"),
        ("reserved", "peak that torch reserved"),
        ("driver", "growth of the process's memory by NVML"),
    ):
        pair = {what: (np.array(planned, np.float64), np.array(taken[what], np.float64))}
        comparators |= save_pairs(run_dir, pair, ("peak of the memory plan", source))
    # Where a plan is off, its phases say which items to look at.
    return {"comparators": comparators, "tables": {"planned bytes": phases}}
