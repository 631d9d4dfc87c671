"""Experiments on ``q4kd fidelity``, a quantised file beside its original and itself, and on what must be refused."""

import functools
from pathlib import Path
from typing import Any

import numpy as np

from q4kd.harness.inputs.arrays import Array, Floats, random_ids, read_array
from q4kd.harness.inputs.collect import arm_of, collect_refusals, reference_student, save_pairs
from q4kd.harness.inputs.command_lines import probe_words, run_program
from q4kd.harness.inputs.demo import VOCAB, demo_teacher
from q4kd.harness.inputs.synthetic_students import write_padded_teacher
from q4kd.harness.oracles.reference import log_softmax, read_gguf, reference_logits
from q4kd.harness.runs.experiment import ONE_THREAD, Arm, Facts, Inputs, declare
from q4kd.harness.subjects.export.experiments import finished_run, live_student, smoke_run
from q4kd.trainer.files import read_json, write_json

# --- fidelity, cuda-fidelity: a Q4_K_M file against its float32 folder, and against itself ---

WINDOWS, LENGTH = 16, 64


def _sample(inputs: Inputs) -> Path:
    return random_ids(inputs, "fidelity-ids.npy", VOCAB, WINDOWS * LENGTH, seed=13, low=1)


def quantised_student(inputs: Inputs) -> Path:
    """Return the live student as Q4_K_M."""

    def make(path: Path) -> None:
        words = ["--format", "gguf", "--quantize", "q4_k_m", "--out", str(path)]
        run_program(["export", str(live_student(inputs)), *words], path.parent)

    return inputs.file("live-student-q4_k_m.gguf", make)


def _fidelity_argv(device: str, arm: str, inputs: Inputs) -> list[str]:
    quantised = quantised_student(inputs)
    original = live_student(inputs) if arm == "original" else quantised
    options = ["--data", str(_sample(inputs)), "--tokens", str(WINDOWS * LENGTH), "--seq-len", str(LENGTH)]
    place = ["--device", device, "--dtype", "float32"]
    return ["fidelity", str(quantised), str(original), *options, *place, "--out", "fidelity.json"]


def _statistics(report: dict[str, Any]) -> Floats:
    """Return what is compared: KL (mean, median, 99 %, largest), agreement, mean log-likelihoods, log of the ratio.

    Then the standard error of each mean, over tokens and for KL over windows too, and the change of probability.
    """
    kl, perplexity, ratio = report["kl"], report["perplexity"], report["perplexity_ratio"]
    agreement, change = report["top1_agreement"], report["probability_change"]
    values = [kl["mean"], kl["median"], kl["99%"], kl["max"], agreement["mean"]]
    values += [np.log(perplexity["a"]["mean"]), np.log(perplexity["b"]["mean"]), ratio["log_mean"]]
    values += [kl["error"], kl["error_over_windows"], agreement["error"], ratio["log_error"]]
    values += [perplexity[side]["error"] / perplexity[side]["mean"] for side in "ab"]
    values += [ratio["error"] / ratio["mean"], change["mean"], change["error"], change["rms"]]
    return np.array(values)[:, None]


def _dense_statistics(inputs: Inputs) -> Floats:
    """Return the same, by dense float64 forward passes over the file and over the folder."""
    original, quantised = reference_student(live_student(inputs)), read_gguf(quantised_student(inputs))
    half, found = LENGTH // 2, dict[str, list[Array]](kl=[], same=[], a=[], b=[])
    for window in read_array(_sample(inputs)).reshape(WINDOWS, LENGTH):
        log_q, log_p = (log_softmax(reference_logits(model, window)[half:-1]) for model in (quantised, original))
        labels = window[half + 1 :]
        found["kl"].append((np.exp(log_p) * (log_p - log_q)).sum(-1))
        found["same"].append(log_p.argmax(-1) == log_q.argmax(-1))
        found["a"].append(-log_q[np.arange(len(labels)), labels])
        found["b"].append(-log_p[np.arange(len(labels)), labels])
    kl, same, a, b = (np.concatenate(found[name]) for name in ("kl", "same", "a", "b"))
    values = [kl.mean(), np.median(kl), np.quantile(kl, 0.99), kl.max(), same.mean(), a.mean(), b.mean()]
    change, by_window = np.exp(-a) - np.exp(-b), np.array([part.mean() for part in found["kl"]])

    def error(sample: Array) -> float:
        return float(sample.std(ddof=1) / np.sqrt(len(sample)))

    values += [a.mean() - b.mean(), error(kl), error(by_window), error(same.astype(np.float64)), error(a - b)]
    values += [error(a), error(b), error(a - b), change.mean(), error(change), np.sqrt((change**2).mean())]
    return np.array(values)[:, None]


def _collect_fidelity(run_dir: Path, inputs: Inputs) -> Facts:
    path = run_dir / "fidelity.json"
    if not path.is_file():
        return {"comparators": {}}
    report = read_json(path)
    if arm_of(run_dir) == "original":
        pair = {"statistics": (_statistics(report), _dense_statistics(inputs))}
        sources = ("q4kd fidelity", "dense float64 forward passes of the harness")
        return {"comparators": save_pairs(run_dir, pair, sources)}
    values = [report["kl"]["mean"], report["kl"]["max"], report["kl"]["min"]]
    values += [report["perplexity_ratio"]["log_mean"], 1 - report["top1_agreement"]["mean"]]
    pair = {"itself": (np.array(values)[:, None], np.zeros((len(values), 1)))}
    return {"comparators": save_pairs(run_dir, pair, ("q4kd fidelity of a file against itself", "zero"))}


for _name, _device, _needs in (("fidelity", "cpu", ()), ("cuda-fidelity", "cuda", ("cuda",))):
    declare(
        _name,
        f"q4kd fidelity on {_device} of a Q4_K_M file against its float32 folder and against itself",
        *(
            Arm(name, functools.partial(_fidelity_argv, _device, name), timeout_s=240, env=ONE_THREAD)
            for name in ("original", "itself")
        ),
        needs=_needs,
        collect=_collect_fidelity,
        parallel=2,
    )


# --- refused-exports: what has no model to export, or no original to be compared with ---


def _refused_argv(inputs: Inputs) -> list[str]:
    smoke, run, student = smoke_run(inputs), finished_run(inputs), live_student(inputs)
    quantised = quantised_student(inputs)
    exchanged = functools.partial(write_padded_teacher, source=quantised, rows=VOCAB, exchanged=(700, 1500))
    padded = functools.partial(write_padded_teacher, source=quantised, rows=VOCAB + 32)
    other = inputs.file("live-student-exchanged.gguf", exchanged)
    wider = inputs.file("live-student-padded.gguf", padded)
    records: list[dict[str, str | list[str]]] = []

    def add(case: str, twin: str, bad: list[str], good: list[str]) -> None:
        records.append({"case": case, "argv": bad, "twin": twin, "twin_argv": good})

    def export(source: Path, out: str, *words: str) -> list[str]:
        return ["export", str(source), "--format", "gguf", "--out", out, *words]

    def fidelity(a: Path, b: Path) -> list[str]:
        return ["fidelity", str(a), str(b), "--data", str(_sample(inputs)), "--tokens", "128", "--seq-len", "64"]

    last = ("--checkpoint", "last")
    add("smoke run", "smoke run, --checkpoint", export(smoke, "1.gguf"), export(smoke, "2.gguf", *last))
    add("taken name", "free name", export(run, "2.gguf"), export(run, "3.gguf"))
    pair = fidelity(quantised, student)
    add("another model", "its original", fidelity(quantised, demo_teacher(inputs)), pair)
    add("exchanged tokens", "its original", fidelity(other, student), pair)
    add("wider vocabulary", "its original", fidelity(wider, student), pair)
    cases = inputs.file("refused-exports.json", lambda path: write_json(path, {"cases": records}))
    return probe_words("start-runs", cases=cases, out="probe.json")


declare(
    "refused-exports",
    "exports and comparisons that must be refused, each beside one that must not",
    Arm(None, _refused_argv, timeout_s=240, env=ONE_THREAD),
    collect=collect_refusals,
)
