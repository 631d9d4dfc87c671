"""What experiments read back of a run: events, what a probe wrote, a checkpoint; and the pairs that checks read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from q4kd.harness.inputs.arrays import Array, Floats, save_arrays
from q4kd.harness.inputs.demo import weighted_student, windows_of
from q4kd.harness.oracles.reference import (
    ReferenceModel,
    from_hugging_face,
    read_gguf,
    reference_logits,
    reference_loss,
)
from q4kd.harness.runs.experiment import Facts, Inputs
from q4kd.trainer.files import read_json, sha256_file

# One line of a run's events.
Event: TypeAlias = dict[str, Any]
Comparators: TypeAlias = dict[str, dict[str, str]]
# Values of a reference from which on it is stored as float32.
ROUNDED_FROM = 256


def save_pairs(run_dir: Path, pairs: Mapping[str, tuple[Array, Array]], sources: tuple[str, str]) -> Comparators:
    """Write ``arrays/<name>.npz`` with subject and reference; return the ``comparators`` fact.

    A large float64 reference of a float32 subject is rounded to float32. Each value moves by at most 2⁻²⁴ of itself, so
    a relative Frobenius error by at most 6e-8; no bound of such a pair is below 1e-5. Small ones are kept as they are:
    a few values may all be the subject's own when rounded, and a subject that equals its reference proves nothing.
    """
    for name, (subject, reference) in pairs.items():
        if subject.dtype == np.float32 and reference.dtype == np.float64 and reference.size >= ROUNDED_FROM:
            reference = reference.astype(np.float32)
        save_arrays(run_dir / "arrays" / f"{name}.npz", {"subject": subject, "reference": reference})
    return {name: {"subject": sources[0], "reference": sources[1]} for name in pairs}


def arm_of(run_dir: Path) -> str:
    """Return the name of the arm whose run folder this is, empty for the only one of an experiment."""
    return run_dir.name.partition(".")[2]


# --- events ---


def read_events(run_dir: Path, name: str, file: str = "events.jsonl") -> list[Event]:
    """Return the events of that name that a run left."""
    lines = (run_dir / file).read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


def step_terms(run_dir: Path, *more: str) -> Floats:
    """Return loss, cross-entropy, KD term and ``more`` of each step event, ``[steps, 3 + more]``."""
    keys = ("loss", "ce", "kd", *more)
    terms = [[event[key] for key in keys] for event in read_events(run_dir, "step")]
    return np.array(terms, np.float64).reshape(-1, len(keys))


def run_terms(run_dir: Path, name: str) -> Floats:
    """Return loss, cross-entropy, KD term and gradient norm of each step of a ``named_run``, ``[steps, 4]``.

    A run that did not come so far as to write its events has no step.
    """
    file, keys = f"{name}.jsonl", ("loss", "ce", "kd", "grad_norm")
    steps = read_events(run_dir, "step", file) if (run_dir / file).is_file() else []
    return np.array([[event[key] for key in keys] for event in steps], np.float64).reshape(-1, len(keys))


# --- files of a probe and of a run ---


def collect_probe(run_dir: Path, _inputs: Inputs) -> Facts:
    """Return what the probe wrote, nothing when it did not come so far."""
    path = run_dir / "probe.json"
    facts: Facts = read_json(path) if path.is_file() else {}
    return facts


def probe_cases(run_dir: Path) -> list[dict[str, str | None]]:
    """Return the cases that a probe recorded, each with its twin."""
    path = run_dir / "probe.json"
    cases: list[dict[str, str | None]] = read_json(path).get("cases", []) if path.is_file() else []
    return cases


def collect_refusals(run_dir: Path, _inputs: Inputs) -> Facts:
    """Return the cases of a probe: what was refused counts, and not by which words, since they name paths."""
    cases = [
        {**case, "error": "exit 2" if str(case["error"]).startswith("exit 2: ") else case["error"], "message": ""}
        for case in probe_cases(run_dir)
    ]
    return {"cases": cases}


def checkpoint_facts(run_dir: Path) -> dict[str, int | bool] | None:
    """Read the newest checkpoint without the trainer's reader: counters, finiteness, digests; None without one."""
    # NumPy has no bfloat16, which the student of a GPU has.
    from safetensors.torch import load_file

    folders = sorted((run_dir / "run" / "checkpoints").glob("step-*"))
    # A large state of the optimiser is in several files.
    states = sorted(folders[-1].glob("optimizer*.safetensors")) if folders else []
    if not states or not all((folders[-1] / name).is_file() for name in ("state.json", "model.safetensors")):
        return None
    state = read_json(folders[-1] / "state.json")
    optimizer = {name: tensor for path in states for name, tensor in load_file(path).items()}
    model = load_file(folders[-1] / "model.safetensors")
    counters = [int(value) for name, value in optimizer.items() if name.endswith("|step")]
    return {
        "step": int(state["step"]),
        "optimizer_step_min": min(counters),
        "optimizer_step_max": max(counters),
        "tensors": len(model),
        "finite": all(bool(tensor.isfinite().all()) for tensor in (*model.values(), *optimizer.values())),
        "digests_match": all(sha256_file(folders[-1] / name) == digest for name, digest in state["sha256"].items()),
    }


def collect_checkpoint(run_dir: Path, _inputs: Inputs) -> Facts:
    """Return the facts of a run's newest checkpoint."""
    return {"checkpoint": checkpoint_facts(run_dir)}


# --- float64 references ---


def reference_student(folder: Path) -> ReferenceModel:
    """Return the float64 reference of a Hugging Face folder with weights."""
    from safetensors.numpy import load_file

    return from_hugging_face(load_file(folder / "model.safetensors"), read_json(folder / "config.json"))


def reference_step(
    inputs: Inputs, teacher: Path, text: Path, shape: tuple[int, int], *, alpha: float, temperature: float
) -> Floats:
    """Return loss, cross-entropy and KD term of a first step, forward KL, in float64, ``[3, 1]``.

    Args:
        inputs: the session's inputs; the student is their ``weighted_student``.
        teacher: GGUF; its rows past the student's vocabulary are left out.
        text: text of exactly one batch.
        shape: sequences and tokens of the batch.
        alpha: weight of the cross-entropy.
        temperature: temperature of the KD term.

    Raises:
        ValueError: when the text makes another batch.
    """
    sequences, seq_len = shape
    windows = windows_of(inputs, text, seq_len)
    if windows.shape != (sequences, seq_len + 1):
        raise ValueError(f"{text}: expected windows of shape {(sequences, seq_len + 1)}, got {windows.shape}")

    def logits(model: ReferenceModel) -> Floats:
        return np.concatenate([reference_logits(model, window[:-1]) for window in windows])

    student = logits(reference_student(weighted_student(inputs)))
    exact = reference_loss(
        student,
        logits(read_gguf(teacher))[:, : student.shape[1]],
        windows[:, 1:].ravel(),
        alpha=alpha,
        temperature=temperature,
        divergence="forward_kl",
    )
    return np.array([[exact.loss], [exact.ce], [exact.kd]])
