"""Experiments on whole runs: one that must survive, and distillation against a cross-entropy-only control."""

import functools

from q4kd.harness.inputs.collect import collect_checkpoint
from q4kd.harness.inputs.command_lines import set_words
from q4kd.harness.inputs.demo import demo_student, demo_teacher
from q4kd.harness.runs.experiment import ONE_THREAD, Arm, Inputs, declare
from q4kd.trainer.demo import data_path

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
        *("--from-scratch", "--data", str(data_path()), "--out", "run", "--events", "events.jsonl"),
        *("--seq-len", "64", "--seed", str(seed), "--dtype", "float32"),
        *set_words(settings),
    ]


SURVIVAL_STEPS = 24
CONTROL_STEPS = 160
SEEDS = (1, 2, 3)

declare(
    "distill-run",
    f"q4kd distill for {SURVIVAL_STEPS} steps with checkpoints",
    Arm(None, functools.partial(_distill_argv, 0.1, 1, SURVIVAL_STEPS, 10, 2048), timeout_s=240, stall_s=45),
    collect=collect_checkpoint,
)

declare(
    "kd-vs-control",
    f"{CONTROL_STEPS} steps of KD and of CE alone, same data, order, steps and tokens, {len(SEEDS)} seeds",
    *(
        Arm(
            f"{arm}-seed{seed}",
            functools.partial(_distill_argv, alpha, seed, CONTROL_STEPS, 0, 8192),
            timeout_s=400,
            stall_s=90,
            env=ONE_THREAD,
        )
        for seed in SEEDS
        for arm, alpha in (("kd", 0.1), ("ce", 1.0))
    ),
    parallel=2,
)
