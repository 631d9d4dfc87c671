"""Distillation of a pair beside cross-entropy alone, on the same tokens: what the teacher is worth."""

import functools
import shutil
from pathlib import Path

from q4kd.harness.inputs.collect import read_events
from q4kd.harness.inputs.command_lines import distill_words, set_words
from q4kd.harness.inputs.demo import demo_student, demo_teacher
from q4kd.harness.runs.experiment import ONE_THREAD, Arm, Facts, Inputs, experiment
from q4kd.trainer.demo import data_path

SEEDS = (1, 2, 3)
ALPHA = {"kd": 0.1, "ce": 1.0}
# What is compared: the KL to the teacher, the cross-entropy of the text, and how often both choose the same token.
_METRICS = ("kl", "loss", "agreement")


def _control_argv(arm: str, seed: int, inputs: Inputs) -> list[str]:
    """Return a run of the given pair, or of the demo's, whose student is small, where none was given."""
    settings: dict[str, object] = {"alpha": ALPHA[arm], "seed": seed, "device": "cuda", "eval_every": 0}
    if (given := inputs.given.pair()) is None:
        teacher, student, data = demo_teacher(inputs), demo_student(inputs), data_path()
        settings |= {"steps": 120, "batch_size": 8, "seq_len": 64, "lr": 3e-3, "warmup_steps": 10, "eval_tokens": 8192}
        settings |= {"data_glob": "**/*.py", "data_max_bytes": 2_500_000}
    else:
        teacher, student, data = given
        settings |= {"steps": 200, "batch_size": 16, "seq_len": 512, "lr": 2e-5, "warmup_steps": 20}
        settings |= {"eval_tokens": 65_536}
    return distill_words(teacher, student, data, "--dtype", "auto", *set_words(settings))


@experiment(
    "cuda-real-control",
    f"a pair distilled on the GPU and trained on cross-entropy alone: same text, order and steps, {len(SEEDS)} seeds",
    *(
        Arm(f"{arm}-seed{seed}", functools.partial(_control_argv, arm, seed), timeout_s=3600, env=ONE_THREAD)
        for seed in SEEDS
        for arm in ALPHA
    ),
    needs=("cuda",),
    parallel=2,
)
def collect_control(run_dir: Path, _inputs: Inputs) -> Facts:
    """State, with the last arm, what every arm reached on held-out text, and by how much distillation is ahead."""
    shutil.rmtree(run_dir / "run", ignore_errors=True)  # six runs of a large pair would fill the disk
    experiment_name, _, arm = run_dir.name.partition(".")
    if arm != f"{list(ALPHA)[-1]}-seed{SEEDS[-1]}":
        return {}
    ends: dict[str, dict[str, float]] = {}
    for seed in SEEDS:
        for name in ALPHA:
            folder = run_dir.parent / f"{experiment_name}.{name}-seed{seed}"
            evaluations = read_events(folder, "eval") if (folder / "events.jsonl").is_file() else []
            if not evaluations:
                return {}
            ends[f"{name}-seed{seed}"] = {metric: float(evaluations[-1][metric]) for metric in _METRICS}
    margins = {
        metric: [ends[f"ce-seed{seed}"][metric] - ends[f"kd-seed{seed}"][metric] for seed in SEEDS]
        for metric in _METRICS
    }
    return {"figures": {"held-out text at the end": ends, "cross-entropy alone minus distillation": margins}}
