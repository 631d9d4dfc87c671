"""Experiments on what a person sees of a run: progress lines and their cost, and a smoke run beside the full one."""

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np

from q4kd.harness.experiment import Arm, Experiment, Inputs, get_experiment, register
from q4kd.harness.experiments_loss import demo_student
from q4kd.harness.experiments_teacher import demo_teacher, save_pairs
from q4kd.trainer.files import read_json

SEQ_LEN, BATCH = 32, 4
STEPS, SMOKE_STEPS, EPOCH_STEPS = 20, 10, 10
_ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def training_text(inputs: Inputs, batches: int) -> Path:
    """Return a text of exactly ``batches`` batches of ``BATCH`` x ``SEQ_LEN`` tokens: an epoch is that many steps."""

    def make(path: Path) -> None:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(demo_student(inputs) / "tokenizer.json"))
        text = Path(argparse.__file__).read_text(encoding="utf-8")
        offsets = tokenizer.encode(text, add_special_tokens=False).offsets
        # The last target is the end-of-text token, which the trainer appends.
        path.write_text(text[: offsets[batches * BATCH * SEQ_LEN - 1][1]], encoding="utf-8")

    return inputs.file(f"argparse-{batches}.txt", make)


def distill_words(teacher: Path, student: Path, data: Path, *words: str, out: str = "run") -> list[str]:
    """Return the arguments of a small ``q4kd distill``; ``words`` come last and win."""
    settings = {"batch_size": BATCH, "lr": 0.003, "warmup_steps": 2, "checkpoint_every": 0, "alpha": 0.4}
    return [
        *("distill", "--teacher", str(teacher), "--student", str(student), "--data", str(data), "--out", out),
        *("--seq-len", str(SEQ_LEN), "--seed", "1", "--dtype", "float32", "--events", "events.jsonl"),
        *[word for key, value in settings.items() for word in ("--set", f"{key}={value}")],
        *words,
    ]


def _argv(words: tuple[str, ...], inputs: Inputs) -> list[str]:
    data = training_text(inputs, EPOCH_STEPS)
    return distill_words(demo_teacher(inputs), demo_student(inputs), data, "--set", f"steps={STEPS}", *words)


def _prepare(inputs: Inputs) -> None:
    _argv((), inputs)


def _arm(name: str, *words: str) -> Arm:
    return Arm(name, functools.partial(_argv, words), timeout_s=120, stall_s=60, env=_ONE_THREAD)


# --- progress-lines: 20 steps, two epochs, under three settings ---

register(
    Experiment(
        name="progress-lines",
        title=f"{STEPS} steps in two epochs, with progress lines as by default, at every step, and for epochs only",
        needs=(),
        arms=(_arm("default"), _arm("every-1", "--set", "log_every=1"), _arm("every-0", "--set", "log_every=0")),
        prepare=_prepare,
        parallel=2,
    )
)


# --- reporting-cost: what a step's event and line take, beside the step ---


def _timed_argv(inputs: Inputs) -> list[str]:
    # Steps of 512 tokens: still far less than a real step, so what reporting costs here it costs at most elsewhere.
    words = ("--set", "log_every=1", "--set", "batch_size=16")
    return ["probe", "distill-timed", "--out", "timings.npz", "--", *_argv(words, inputs)]


def _collect_timings(run_dir: Path, _inputs: Inputs) -> dict[str, Any]:
    if (run_dir / "timings.npz").is_file():
        with np.load(run_dir / "timings.npz", allow_pickle=False) as arrays:
            np.savez_compressed(run_dir / "arrays" / "reporting.npz", **dict(arrays))
    return {}


register(
    Experiment(
        name="reporting-cost",
        title=f"the clock around each of {STEPS} steps and around the event and the line that report it",
        needs=(),
        arms=(Arm(None, _timed_argv, timeout_s=120, stall_s=60, env=_ONE_THREAD),),
        prepare=_prepare,
        collect=_collect_timings,
    )
)


# --- smoke-run: a run cut short by --max-steps, and the same run without it ---


def read_events(run_dir: Path, name: str) -> list[dict[str, Any]]:
    """Return the events of that name that a run left."""
    lines = (run_dir / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


def _losses(run_dir: Path) -> Any:
    """Return loss, cross-entropy and KD term by step, float64 ``[steps, 3]``."""
    return np.array([[event["loss"], event["ce"], event["kd"]] for event in read_events(run_dir, "step")])


def _projection(run_dir: Path) -> tuple[Any, Any] | None:
    """Return what the summary projects, and the same from the times of the step events."""
    path, steps = run_dir / "run" / "summary.json", read_events(run_dir, "step")
    if not path.is_file() or len(steps) < 2:
        return None
    summary: dict[str, Any] = read_json(path)
    per_step = (steps[-1]["t"] - steps[0]["t"]) / (len(steps) - 1)
    whole = steps[0]["seconds"] + steps[0]["data_s"] + per_step * (STEPS - 1)
    stated = [summary.get("projected_seconds_of_full_run", np.nan), summary.get("tokens_per_second", np.nan)]
    return np.array([stated]).T, np.array([[whole], [BATCH * SEQ_LEN / per_step]])


def _collect_smoke(run_dir: Path, inputs: Inputs) -> dict[str, Any]:
    """Count steps three ways, look for a model, and compare the two arms (the smoke run comes first)."""
    facts = get_experiment("distill-run").collect(run_dir, inputs)
    checkpoint, out = facts["checkpoint"] or {}, run_dir / "run"
    counts = {
        "step events": len(read_events(run_dir, "step")),
        "step of the checkpoint": checkpoint.get("step", 0),
        "fewest updates of a weight": checkpoint.get("optimizer_step_min", 0),
        "most updates of a weight": checkpoint.get("optimizer_step_max", 0),
    }
    outputs = {
        "folder model": (out / "model").exists(),
        "weights outside the checkpoints": len([*out.glob("*.safetensors"), *out.glob("model/*.safetensors")]),
        "checkpoints": len(list(out.glob("checkpoints/step-*"))),
    }
    comparators: dict[str, Any] = {}
    if run_dir.name.endswith(".smoke"):
        pair = _projection(run_dir)
        if pair is not None:
            comparators = save_pairs(run_dir, {"projection": pair}, ("summary.json", "times of the step events"))
    else:
        smoke = run_dir.parent / "smoke-run.smoke"
        pair = _losses(run_dir)[:SMOKE_STEPS], _losses(smoke)
        comparators = save_pairs(run_dir, {"first-steps": pair}, ("run without --max-steps", "smoke run"))
    return facts | {"tables": {"steps": counts, "outputs": outputs}, "comparators": comparators}


register(
    Experiment(
        name="smoke-run",
        title=f"--max-steps {SMOKE_STEPS} of a run of {STEPS} steps, and the run without it",
        needs=(),
        arms=(_arm("smoke", "--max-steps", str(SMOKE_STEPS)), _arm("full")),
        prepare=_prepare,
        collect=_collect_smoke,
    )
)
