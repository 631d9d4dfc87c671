"""Experiments at the size of Qwen2.5-7B on a GPU: whole steps, the time of a forward pass, and a large allocation.

The teacher's weights are random blocks of the real shapes; the student has Qwen2.5-0.5B's and starts from its seed.
"""

import argparse
import functools
import shutil
from pathlib import Path

import numpy as np

from q4kd.harness.inputs.arrays import random_ids, save_arrays
from q4kd.harness.inputs.collect import collect_checkpoint, collect_probe, read_events
from q4kd.harness.inputs.command_lines import probe_words, scratch_words, set_words
from q4kd.harness.inputs.demo import changed_student, demo_teacher, teacher_7b
from q4kd.harness.inputs.synthetic_students import read_tokens, student_shape, write_padded_teacher
from q4kd.harness.runs.experiment import Arm, Facts, Inputs, declare, experiment

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
    shape = student_shape(hidden=896, ffn=4864, layers=24, heads=14, kv_heads=2)
    return changed_student(inputs, "student-0.5b", {**shape, "vocab_size": STUDENT_VOCAB})


def _text(inputs: Inputs) -> Path:
    # The text has about 30,000 tokens of the demo's, more than the 8,193 of one step.
    return inputs.file("argparse.txt", lambda path: shutil.copyfile(argparse.__file__, path))


def _distill_argv(steps: int, inputs: Inputs) -> list[str]:
    # A step has four micro-batches: the activations of 8,192 tokens at once would take more than the weights.
    settings = {"steps": steps, "batch_size": SEQUENCES // ACCUMULATION, "accumulation": ACCUMULATION}
    settings |= {"log_every": 10, "checkpoint_every": 0}
    return [
        *("distill", "--teacher", str(_teacher(inputs)), "--student", str(_student(inputs))),
        *(*scratch_words(_student(inputs)), "--data", str(_text(inputs)), "--out", "run"),
        *("--device", "cuda", "--events", "events.jsonl"),
        *("--seq-len", str(SEQ_LEN), "--seed", "1"),
        *set_words(settings),
    ]


def _collect_distill(run_dir: Path, inputs: Inputs) -> Facts:
    """Read the checkpoint, and take the time of each step after the first from one step event to the next."""
    ends = np.array([event["t"] for event in read_events(run_dir, "step")])
    if len(ends) > 1:
        save_arrays(run_dir / "arrays" / "steps.npz", {"start": ends[:-1], "seconds": np.diff(ends)})
    return collect_checkpoint(run_dir, inputs)


for _name, _steps, _needs in (
    ("distill-7b", SHORT_STEPS, ("cuda",)),
    ("distill-7b-long", LONG_STEPS, ("cuda", "unified")),
):
    declare(
        _name,
        f"{_steps} steps of {SEQUENCES} x {SEQ_LEN} tokens, 7B Q4_K_M teacher and 0.5B student on the GPU",
        Arm(None, functools.partial(_distill_argv, _steps), timeout_s=3600, stall_s=600),
        needs=_needs,
        collect=_collect_distill,
        exclusive=True,
    )


# --- forward-7b: the time of a forward pass over the tokens of one step ---


def _forward_argv(inputs: Inputs) -> list[str]:
    ids = random_ids(inputs, "ids-7b.npy", TEACHER_VOCAB, (SEQUENCES, SEQ_LEN))
    options = {"model": _teacher(inputs), "ids": ids, "out": "times.npz", "warm_up": WARM_UP, "passes": PASSES}
    return probe_words("forward-times", **options)


@experiment(
    "forward-7b",
    f"{PASSES} forward passes of a 7B Q4_K_M teacher over {SEQUENCES} x {SEQ_LEN} tokens, logits included",
    Arm(None, _forward_argv, timeout_s=900, stall_s=300),
    needs=("cuda",),
    exclusive=True,
)
def _collect_forward(run_dir: Path, _inputs: Inputs) -> Facts:
    if (run_dir / "times.npz").is_file():
        shutil.copyfile(run_dir / "times.npz", run_dir / "arrays" / "forward.npz")
    return {}


# --- unified-allocation: more bytes than the ~30 GB that cudaMalloc reaches on GB10 ---

declare(
    "unified-allocation",
    f"{MANAGED_BYTES // 10**9} GB allocated as a unified device's policy says, written and read on the GPU",
    Arm(None, lambda _: probe_words("unified-allocation", bytes=MANAGED_BYTES, out="probe.json"), timeout_s=300),
    needs=("cuda", "unified"),
    collect=collect_probe,
    exclusive=True,
)
