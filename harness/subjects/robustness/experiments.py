"""Experiments on runs that go wrong: killed, stopped, stalled, starved, without disk, or with a loss that explodes."""

import functools
import json
import re
from pathlib import Path

import numpy as np

from q4kd.harness.inputs.collect import Event, collect_probe, read_events, save_pairs
from q4kd.harness.inputs.command_lines import distill_words, probe_words, set_words
from q4kd.harness.inputs.demo import argparse_documents, demo_student, demo_teacher
from q4kd.harness.runs.experiment import ONE_THREAD, Arm, Facts, Inputs, declare, experiment
from q4kd.harness.subjects.robustness.probes import CHILD_EVENTS
from q4kd.trainer.files import read_json, sha256_file, write_json

KILLS, WRITING, STEPS = 20, 6, 90


def _words(inputs: Inputs, **settings: object) -> list[str]:
    documents = argparse_documents(inputs)
    return distill_words(demo_teacher(inputs), demo_student(inputs), documents, *set_words(settings))


# --- killed-runs: SIGKILL at seeded points, resumed each time, beside the same run left alone ---


def _killed_argv(inputs: Inputs) -> list[str]:
    def make(path: Path) -> None:
        argv = _words(inputs, steps=STEPS, checkpoint_every=2, eval_every=6, eval_tokens=64, keep=2)
        write_json(path, {"argv": argv, "kills": KILLS, "writing": WRITING, "seed": 12})

    return probe_words("killed-runs", case=inputs.file("killed-runs.json", make), out="probe.json")


def _terms(path: Path) -> dict[int, list[list[float]]]:
    """Return loss, its parts and the norm of the gradient by step, once for each time the step was taken."""
    found: dict[int, list[list[float]]] = {}
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    for event in (json.loads(line) for line in lines if line.endswith("}")):
        if event["event"] == "step":
            found.setdefault(event["step"], []).append([event[key] for key in ("loss", "ce", "kd", "grad_norm")])
    return found


@experiment(
    "killed-runs",
    f"a run killed {KILLS} times, {WRITING} of them while it writes a checkpoint beside its steps, and one left alone",
    Arm(None, _killed_argv, timeout_s=400, env=ONE_THREAD),
)
def _collect_killed(run_dir: Path, inputs: Inputs) -> Facts:
    facts = collect_probe(run_dir, inputs)
    whole, killed = _terms(run_dir / "whole.jsonl"), _terms(run_dir / "killed.jsonl")
    if len(whole) != STEPS or not killed:
        return facts | {"comparators": {}}
    rows = [(taken, whole[step][0]) for step in sorted(killed) for taken in killed[step] if step in whole]
    pair = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    comparators = save_pairs(run_dir, {"resumed": pair}, ("run killed and resumed", "run left alone"))
    steps = {"steps of the run left alone": len(whole), "steps of the killed run": len(killed)}
    weights = [run_dir / name / "model" / "model.safetensors" for name in ("whole", "killed")]
    same = all(path.is_file() for path in weights) and sha256_file(weights[0]) == sha256_file(weights[1])
    tables = read_json(run_dir / "probe.json")["tables"] if facts else {}
    resumed = {"resumed": {**steps, "final models are equal": same}}
    return facts | {"comparators": comparators, "tables": tables | resumed}


# --- runs that end early: what is done to each, its settings, and what it must leave ---


def _ended_argv(action: str, settings: dict[str, object], inputs: Inputs) -> list[str]:
    return [*probe_words("ended-run", do=action, out="probe.json"), "--", *_words(inputs, **settings)]


def _child_events(run_dir: Path, name: str) -> list[Event]:
    return read_events(run_dir, name, CHILD_EVENTS) if (run_dir / CHILD_EVENTS).is_file() else []


def _collect_ended(run_dir: Path, _inputs: Inputs) -> Facts:
    """Describe how the run ended, in one table that every claim reads."""
    if not (run_dir / "probe.json").is_file():
        return {}
    ended, out = read_json(run_dir / "probe.json")["ended"], run_dir / "run"
    steps = [event["step"] for event in _child_events(run_dir, "step")]
    checkpoints = sorted(path.name for path in out.glob("checkpoints/step-*"))
    stacks = "".join(path.read_text() for path in out.glob("hang-step-*.txt"))
    saved = sorted(out.glob("aborted/*"))
    table = {
        "exit code": ended["code"],
        "newest checkpoint is of the last step": bool(steps) and f"step-{steps[-1]:06d}" in checkpoints,
        "rubbish among the checkpoints": len(list(out.glob("checkpoints/.*"))),
        "final model": (out / "model").exists(),
    }
    said = ended["said"]
    # Each is a setting, its value, and "(saves 96.5 MB)".
    helps = said.partition("what helps: ")[2].partition(";")[0]
    kinds = {
        "not-finite": {
            "files of the batch": len([path for path in saved if path.suffix == ".npz"]),
            "terms are not finite": any(
                {"nan", "inf", "-inf"} & set(map(str, read_json(path).values()))
                for path in saved
                if path.suffix == ".json"
            ),
            "losses that are not finite were reported": any(
                not isinstance(event["loss"], float) for event in _child_events(run_dir, "step")
            ),
        },
        "hang": {"stacks show where": "_silent_source" in stacks, "event": len(_child_events(run_dir, "hang"))},
        "memory": {
            "says what was asked": re.search(r"on cpu: asked for \d", said) is not None,
            "says what is held": "; held: host" in said,
            "what helps": ", ".join(part.split()[0] for part in helps.split("), ") if "(saves " in part),
        },
        "disk": {
            "says so": "the checkpoint cannot be written" in said,
            "names what is kept": "kept: step-000002" in said,
            "checkpoints": ", ".join(checkpoints),
        },
        "best": _best(run_dir),
    }
    return {"tables": {"ending": table} | kinds}


def _best(run_dir: Path) -> dict[str, int | bool]:
    """Compare what is kept with the evaluations that the run reported."""
    out = run_dir / "run"
    values = {event["step"]: event["kl"] for event in _child_events(run_dir, "eval") if event["step"]}
    if not values or not (out / "checkpoints" / "best.json").is_file():
        return {}
    best, folder = min(values, key=lambda step: values[step]), out / "checkpoints"
    kept = sorted(path.name for path in folder.glob("step-*"))
    weights = folder / f"best-{best:06d}"
    return {
        "best is not the newest": kept[-1] != f"step-{best:06d}",
        "best.json names it": read_json(folder / "best.json")["checkpoint"] == weights.name,
        "its weights are kept": (weights / "model.safetensors").is_file(),
        "other files of it": len(list(weights.glob("*"))) - 2,
        "checkpoints": len(kept),
    }


_ENDINGS: dict[str, tuple[str, str, dict[str, object]]] = {
    # Decoupled decay multiplies each weight by 1 - lr x weight_decay = -99 a step, and float32 ends at 99^19.
    "run-explodes": (
        "nothing",
        "settings under which weights grow 99-fold a step",
        {"steps": 60, "lr": 10.0, "weight_decay": 10.0, "warmup_steps": 0, "schedule": "constant", "clip": 1e9},
    ),
    "run-stalls": ("stall", "a data source that falls silent", {"steps": 12, "hang_s": 6}),
    "run-sigterm": ("SIGTERM", "SIGTERM at the third step", {"steps": 4000}),
    "run-terminal-closed": (
        "SIGHUP",
        "output that nobody reads, and SIGHUP at the third step",
        {"steps": 4000, "log_every": 1},
    ),
    "run-sigint": ("SIGINT", "Ctrl-C at the third step", {"steps": 4000}),
    "run-starves": (
        "starve",
        "an address space that may not grow after step 1",
        {"steps": 4, "seq_len": 256, "batch_size": 33, "chunk_tokens": 8192, "eval_tokens": 0},
    ),
    "run-disk-full": (
        "fill",
        "files that may not grow after the first checkpoint",
        {"steps": 4000, "checkpoint_every": 2},
    ),
    "run-gets-worse": (
        "nothing",
        "a learning rate that rises until the student is worse than it was",
        {
            "steps": 12,
            "lr": 3.0,
            "warmup_steps": 12,
            "eval_every": 2,
            "checkpoint_every": 2,
            "keep": 1,
            "eval_tokens": 256,
        },
    ),
}
for _name, (_action, _title, _settings) in _ENDINGS.items():
    declare(
        _name,
        f"q4kd distill with {_title}",
        Arm(None, functools.partial(_ended_argv, _action, _settings), timeout_s=200, env=ONE_THREAD),
        collect=_collect_ended,
        measures=("memory",) if _action == "starve" else (),
    )


# --- damaged-resumes: what must not be continued ---


def _damaged_argv(inputs: Inputs) -> list[str]:
    settings = {"steps": 8, "checkpoint_every": 2, "eval_tokens": 0}
    return [*probe_words("damaged-resumes", out="probe.json"), "--", *_words(inputs, **settings)]


declare(
    "damaged-resumes",
    "resuming from a checkpoint with one byte changed, with other settings, and from the same one intact",
    Arm(None, _damaged_argv, timeout_s=200, env=ONE_THREAD),
    collect=collect_probe,
)
