"""Experiments on how the student is trained: precision, adapters, accumulation, and several processes as one."""

import functools
from pathlib import Path
from typing import Any

import numpy as np

from q4kd.harness.experiment import Arm, Experiment, Inputs, register
from q4kd.harness.experiments_loss import demo_student
from q4kd.harness.experiments_runs import distill_words, read_events, training_text
from q4kd.harness.experiments_teacher import collect_probe, demo_teacher, save_pairs
from q4kd.harness.probes_student import RANKS, VARIANTS

_ONE_THREAD = {"OMP_NUM_THREADS": "1"}

# --- student-steps: the trainer's step under settings that must not matter, with adapters, and on bfloat16 weights ---


def _steps_argv(inputs: Inputs) -> list[str]:
    return [
        *("probe", "student-steps", "--teacher", str(demo_teacher(inputs)), "--student", str(demo_student(inputs))),
        *("--out", "steps.npz", "--facts", "probe.json"),
    ]


def _collect_steps(run_dir: Path, inputs: Inputs) -> dict[str, Any]:
    facts = collect_probe(run_dir, inputs)
    if not (run_dir / "steps.npz").is_file():
        return facts | {"comparators": {}}
    with np.load(run_dir / "steps.npz", allow_pickle=False) as arrays:
        found = dict(arrays)
    whole = found["whole"]
    pairs = {name: (found[name], whole) for name in VARIANTS if name != "whole"}
    # Losses only: what bfloat16 does to the norm of a gradient is not what is claimed.
    pairs["bfloat16"] = (found["bfloat16"][:, :3], whole[:, :3])
    comparators = save_pairs(run_dir, pairs, ("the setting", "plain float32 steps on whole batches"))
    # What training did to the logits: a merge that forgot it would differ from the adapted student by all of it.
    moved = {"merged": (found["merged"] - found["untrained"], found["adapted"] - found["untrained"])}
    return facts | {
        "comparators": comparators | save_pairs(run_dir, moved, ("merged student", "student with its adapters"))
    }


register(
    Experiment(
        name="student-steps",
        title="the same steps whole, accumulated, recomputed, in bfloat16 and with adapters",
        needs=(),
        arms=(Arm(None, _steps_argv, timeout_s=120, env=_ONE_THREAD),),
        collect=_collect_steps,
    )
)


# --- student-ranks: q4kd distill in one process, in two with copies of the student, in two with shards ---

SEQUENCES_PER_STEP = 8
RANK_STEPS = 4


def _ranks_argv(kind: str, inputs: Inputs) -> list[str]:
    processes = 1 if kind == "one" else RANKS
    # Two micro-batches: gradients are added up in each process before they travel.
    words = distill_words(
        *(demo_teacher(inputs), demo_student(inputs), training_text(inputs, RANK_STEPS)),
        *("--set", f"batch_size={SEQUENCES_PER_STEP // processes // 2}", "--set", "accumulation=2"),
        *("--set", f"steps={RANK_STEPS}", "--set", "clip=0.5", "--set", "eval_tokens=0"),
    )
    return words if kind == "one" else ["probe", "distill-ranks", kind, *words]


def _steps_of(run_dir: Path) -> Any:
    if not (run_dir / "events.jsonl").is_file():
        return np.zeros((0, 4))
    return np.array(
        [[event["loss"], event["ce"], event["kd"], event["grad_norm"]] for event in read_events(run_dir, "step")]
    )


def _collect_ranks(run_dir: Path, _inputs: Inputs) -> dict[str, Any]:
    arm = run_dir.name.partition(".")[2]
    steps, one = _steps_of(run_dir), _steps_of(run_dir.parent / "student-ranks.one")
    if arm == "one" or not len(steps) or steps.shape != one.shape:
        return {"comparators": {}}
    return {"comparators": save_pairs(run_dir, {"steps": (steps, one)}, (f"{RANKS} processes, {arm}", "one process"))}


register(
    Experiment(
        name="student-ranks",
        title=f"q4kd distill in one process, and in {RANKS} that share the same batches",
        needs=(),
        arms=tuple(
            Arm(kind, functools.partial(_ranks_argv, kind), timeout_s=120, stall_s=60, env=_ONE_THREAD)
            for kind in ("one", "copies", "shards")
        ),
        collect=_collect_ranks,
    )
)


# --- settings-refused: names of settings that are not quite right ---

register(
    Experiment(
        name="settings-refused",
        title="settings that do not exist, beside those that were meant",
        needs=(),
        arms=(Arm(None, lambda _inputs: ["probe", "refused-settings", "--out", "probe.json"], timeout_s=60),),
        collect=collect_probe,
    )
)
