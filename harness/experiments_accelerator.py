"""Experiments at the size of Qwen2.5-7B on a GPU: whole steps, the time of a forward pass, and a large allocation.

The teacher's weights are random blocks of the real shapes; the student has Qwen2.5-0.5B's and starts from its seed.
"""

import argparse
import functools
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from q4kd.harness.experiment import Arm, Experiment, Inputs, get_experiment, register
from q4kd.harness.experiments_cuda import teacher_7b
from q4kd.harness.experiments_loss import demo_student
from q4kd.harness.experiments_runs import read_events
from q4kd.harness.experiments_teacher import collect_probe, demo_teacher
from q4kd.harness.synthetic_students import read_tokens, write_padded_teacher, write_student

TEACHER_VOCAB, STUDENT_VOCAB = 152_064, 151_936
SEQUENCES, SEQ_LEN, ACCUMULATION = 32, 256, 4
SHORT_STEPS, LONG_STEPS = 31, 500
WARM_UP, PASSES = 3, 9
MANAGED_BYTES = 40_000_000_000


def _teacher(inputs: Inputs) -> Path:
    """Return the 7B-shaped file with a vocabulary that begins with the demo's tokens."""
    source, tokens = teacher_7b(inputs), read_tokens(demo_teacher(inputs))
    make = functools.partial(write_padded_teacher, source=source, rows=TEACHER_VOCAB, tokens=tokens)
    return inputs.file("teacher-7b-tokens.gguf", make)


def _student(inputs: Inputs) -> Path:
    changes = {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "layer_types": ["full_attention"] * 24,
        "vocab_size": STUDENT_VOCAB,
    }
    make = functools.partial(write_student, source=demo_student(inputs), changes=changes)
    return inputs.file("student-0.5b", make)


def _text(inputs: Inputs) -> Path:
    # About 30,000 tokens of the demo's: more than the 8,193 of one step.
    return inputs.file("argparse.txt", lambda path: shutil.copyfile(argparse.__file__, path))


def _distill_argv(steps: int, inputs: Inputs) -> list[str]:
    # Four micro-batches: the student's activations of 8,192 tokens at once would take more than its weights.
    settings = {
        "steps": steps,
        "batch_size": SEQUENCES // ACCUMULATION,
        "accumulation": ACCUMULATION,
        "log_every": 10,
        "checkpoint_every": 0,
    }
    return [
        *("distill", "--teacher", str(_teacher(inputs)), "--student", str(_student(inputs))),
        *("--data", str(_text(inputs)), "--out", "run", "--device", "cuda", "--events", "events.jsonl"),
        *("--seq-len", str(SEQ_LEN), "--seed", "1"),
        *[word for key, value in settings.items() for word in ("--set", f"{key}={value}")],
    ]


def _collect_distill(run_dir: Path, inputs: Inputs) -> dict[str, Any]:
    """Read the checkpoint, and take the time of each step after the first from one step event to the next."""
    ends = np.array([event["t"] for event in read_events(run_dir, "step")])
    if len(ends) > 1:
        np.savez_compressed(run_dir / "arrays" / "steps.npz", start=ends[:-1], seconds=np.diff(ends))
    return get_experiment("distill-run").collect(run_dir, inputs)


def _prepare_distill(inputs: Inputs) -> None:
    _distill_argv(1, inputs)


for _name, _steps, _needs in (
    ("distill-7b", SHORT_STEPS, ("cuda",)),
    ("distill-7b-long", LONG_STEPS, ("cuda", "unified")),
):
    register(
        Experiment(
            name=_name,
            title=f"{_steps} steps of {SEQUENCES} x {SEQ_LEN} tokens, 7B Q4_K_M teacher and 0.5B student on the GPU",
            needs=_needs,
            arms=(Arm(None, functools.partial(_distill_argv, _steps), timeout_s=3600, stall_s=600),),
            prepare=_prepare_distill,
            collect=_collect_distill,
            exclusive=True,
        )
    )


# --- forward-7b: the time of a forward pass over the tokens of one step ---


def _ids(inputs: Inputs) -> Path:
    def make(path: Path) -> None:
        with path.open("wb") as file:
            np.save(file, np.random.default_rng(1).integers(0, TEACHER_VOCAB, (SEQUENCES, SEQ_LEN)))

    return inputs.file("ids-7b.npy", make)


def _forward_argv(inputs: Inputs) -> list[str]:
    options = {"model": _teacher(inputs), "ids": _ids(inputs), "out": "times.npz"}
    counts = {"warm-up": WARM_UP, "passes": PASSES}
    return [
        "probe",
        "forward-times",
        *[word for key, value in (options | counts).items() for word in (f"--{key}", str(value))],
    ]


def _collect_forward(run_dir: Path, _inputs: Inputs) -> dict[str, Any]:
    if (run_dir / "times.npz").is_file():
        shutil.copyfile(run_dir / "times.npz", run_dir / "arrays" / "forward.npz")
    return {}


register(
    Experiment(
        name="forward-7b",
        title=f"{PASSES} forward passes of a 7B Q4_K_M teacher over {SEQUENCES} x {SEQ_LEN} tokens, logits included",
        needs=("cuda",),
        arms=(Arm(None, _forward_argv, timeout_s=900, stall_s=300),),
        prepare=_forward_argv,
        collect=_collect_forward,
        exclusive=True,
    )
)


# --- unified-allocation: more bytes than the ~30 GB that cudaMalloc reaches on GB10 ---

register(
    Experiment(
        name="unified-allocation",
        title=f"{MANAGED_BYTES // 10**9} GB allocated as a unified device's policy says, written and read on the GPU",
        needs=("cuda", "unified"),
        arms=(
            Arm(
                None,
                lambda _inputs: ["probe", "unified-allocation", "--bytes", str(MANAGED_BYTES), "--out", "probe.json"],
                timeout_s=300,
            ),
        ),
        collect=collect_probe,
        exclusive=True,
    )
)
