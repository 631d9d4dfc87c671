"""Experiments on whole runs: one that must survive, and distillation against a cross-entropy-only control."""

import functools
from pathlib import Path
from typing import Any

import numpy as np

from q4kd.harness.experiment import Arm, Experiment, Inputs, register
from q4kd.harness.experiments_loss import demo_student
from q4kd.harness.experiments_teacher import demo_teacher
from q4kd.trainer.demo import data_path
from q4kd.trainer.files import read_json, sha256_file

# --- distill-run and kd-vs-control: real runs on the Python standard library's source ---


def _distill_argv(
    alpha: float, seed: int, steps: int, checkpoint_every: int, eval_tokens: int, inputs: Inputs
) -> list[str]:
    settings = {
        "steps": steps,
        "batch_size": 8,
        "lr": 0.003,
        "warmup_steps": 10,
        "eval_tokens": eval_tokens,
        "checkpoint_every": checkpoint_every,
        "data_glob": "**/*.py",
        "data_max_bytes": 2_500_000,
        "alpha": alpha,
    }
    return [
        *("distill", "--teacher", str(demo_teacher(inputs)), "--student", str(demo_student(inputs))),
        *("--data", str(data_path()), "--out", "run", "--events", "events.jsonl"),
        *("--seq-len", "64", "--seed", str(seed), "--dtype", "float32"),
        *[word for key, value in settings.items() for word in ("--set", f"{key}={value}")],
    ]


def _collect_checkpoint(run_dir: Path, _inputs: Inputs) -> dict[str, Any]:
    """Read the newest checkpoint without the trainer's reader: counters, finiteness, digests."""
    from safetensors.numpy import load_file

    folders = sorted((run_dir / "run" / "checkpoints").glob("step-*"))
    if not folders:
        return {"checkpoint": None}
    state = read_json(folders[-1] / "state.json")
    optimizer = load_file(folders[-1] / "optimizer.safetensors")
    model = load_file(folders[-1] / "model.safetensors")
    counters = [int(value) for name, value in optimizer.items() if name.endswith("|step")]
    return {
        "checkpoint": {
            "step": int(state["step"]),
            "optimizer_step_min": min(counters),
            "optimizer_step_max": max(counters),
            "tensors": len(model),
            "finite": all(bool(np.isfinite(tensor).all()) for tensor in (*model.values(), *optimizer.values())),
            "digests_match": all(sha256_file(folders[-1] / name) == digest for name, digest in state["sha256"].items()),
        }
    }


SURVIVAL_STEPS = 24
CONTROL_STEPS = 160
SEEDS = (1, 2, 3)

register(
    Experiment(
        name="distill-run",
        title=f"q4kd distill for {SURVIVAL_STEPS} steps with checkpoints",
        needs=(),
        arms=(
            Arm(None, functools.partial(_distill_argv, 0.1, 1, SURVIVAL_STEPS, 10, 2048), timeout_s=240, stall_s=45),
        ),
        collect=_collect_checkpoint,
    ),
)

register(
    Experiment(
        name="kd-vs-control",
        title=f"{CONTROL_STEPS} steps of KD and of CE alone, same data, order, steps and tokens, {len(SEEDS)} seeds",
        needs=(),
        arms=tuple(
            Arm(
                f"{arm}-seed{seed}",
                functools.partial(_distill_argv, alpha, seed, CONTROL_STEPS, 0, 8192),
                timeout_s=400,
                stall_s=90,
                env={"OMP_NUM_THREADS": "1"},
            )
            for seed in SEEDS
            for arm, alpha in (("kd", 0.1), ("ce", 1.0))
        ),
        parallel=2,
    ),
)
