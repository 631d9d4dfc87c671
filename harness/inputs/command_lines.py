"""The command lines of experiments: probes, small runs of ``q4kd distill`` and ``q4kd logits``, and how one is run."""

import itertools
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from q4kd.harness.inputs.demo import BATCH, SEQ_LEN
from q4kd.harness.runs.experiment import NO_GPU, ONE_THREAD


def set_words(settings: Mapping[str, object]) -> list[str]:
    """Return ``--set key=value`` for each setting."""
    return [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


def scratch_words(student: Path) -> list[str]:
    """Return the flag that a student without weights needs."""
    return [] if any(student.glob("*.safetensors")) else ["--from-scratch"]


def probe_words(name: str, **options: object) -> list[str]:
    """Return the arguments of a probe, ``--key value`` for each option."""
    given = ((f"--{key.replace('_', '-')}", str(value)) for key, value in options.items())
    return ["probe", name, *itertools.chain.from_iterable(given)]


def logits_words(model: Path, ids: Path, *words: str) -> list[str]:
    """Return the arguments of a ``q4kd logits`` that writes ``logits.npy``."""
    return ["logits", str(model), "--ids", str(ids), "--out", "logits.npy", *words, "--events", "events.jsonl"]


def distill_words(teacher: Path, student: Path, data: Path, *words: str, out: str = "run") -> list[str]:
    """Return the arguments of a small ``q4kd distill``; ``words`` come last and win."""
    settings = {"batch_size": BATCH, "lr": 0.003, "warmup_steps": 2, "checkpoint_every": 0, "alpha": 0.4}
    return [
        *("distill", "--teacher", str(teacher), "--student", str(student), "--data", str(data), "--out", out),
        *("--seq-len", str(SEQ_LEN), "--seed", "1", "--dtype", "float32", "--events", "events.jsonl"),
        *scratch_words(student),
        *set_words(settings),
        *words,
    ]


def named_run(name: str, words: list[str]) -> list[str]:
    """Return a small ``q4kd distill`` with a folder and events named after it, where several run in one folder."""
    places = {"run": name, "events.jsonl": f"{name}.jsonl"}
    return [places.get(word, word) for word in words]


def run_program(words: list[str], folder: Path, device: str = "cpu") -> None:
    """Run the program as it is to make an input: faults are planted in what is measured, not here.

    Only with ``device`` cuda does it see a GPU.
    """
    command = [sys.executable, "-P", "-m", "q4kd.harness", *words]
    # Threads that wait for each other on a busy machine would take many times as long as one.
    environment = {**os.environ, **ONE_THREAD, **(NO_GPU if device == "cpu" else {})}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    if done.returncode:
        raise RuntimeError(f"q4kd {words[0]} ended with {done.returncode}: {done.stderr[-500:]}")
