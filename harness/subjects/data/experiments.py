"""Experiments on training data: packed documents beside each alone, labels, whole epochs, resumed order, refused data.

What is expected is worked out here from the texts with the ``tokenizers`` package alone, document by document.
"""

from collections import Counter
from pathlib import Path

import numpy as np

from q4kd.harness.inputs.arrays import Array, read_arrays, seeded_columns
from q4kd.harness.inputs.collect import collect_probe, reference_student, save_pairs
from q4kd.harness.inputs.command_lines import distill_words, probe_words
from q4kd.harness.inputs.demo import demo_student, demo_teacher, weighted_student
from q4kd.harness.inputs.training_documents import (
    MASKED,
    packed_windows,
    run_settings,
    text_documents,
    write_jsonl,
)
from q4kd.harness.oracles.reference import read_gguf, reference_logits
from q4kd.harness.runs.experiment import ONE_THREAD, Arm, Facts, Inputs, declare, experiment
from q4kd.trainer.files import write_json

# Longer than two blocks of attention, and no multiple of one.
PACKED_LEN, PACKED_WINDOWS = 300, 1
SEQ_LEN = 24
COLUMNS = 128


# --- packed-documents: logits of packed windows beside float64 on each document alone ---


def _packed_argv(inputs: Inputs) -> list[str]:
    student = str(weighted_student(inputs))
    settings = run_settings(inputs, text_documents(inputs), student=student, seq_len=PACKED_LEN)
    case = {"packed": {"settings": settings, "sequences": PACKED_WINDOWS}}
    cases = inputs.file("packed-case.json", lambda path: write_json(path, case))
    return probe_words("packed-logits", cases=cases, out="packed.npz")


@experiment(
    "packed-documents",
    "teacher and student on windows of several documents, beside float64 on each document alone",
    Arm(None, _packed_argv, timeout_s=60, env=ONE_THREAD),
)
def _collect_packed(run_dir: Path, inputs: Inputs) -> Facts:
    """Compare logits with the references on each document alone, and labels with those worked out here."""
    if not (found := read_arrays(run_dir / "packed.npz")):
        return {}
    known = {tuple(window[0]): window for window in packed_windows(inputs, PACKED_LEN)}
    models = {"teacher": read_gguf(demo_teacher(inputs)), "student": reference_student(weighted_student(inputs))}
    columns = seeded_columns(found["teacher"].shape[-1], COLUMNS)
    alone: dict[str, list[Array]] = {name: [] for name in models}
    counts: Counter[str] = Counter()
    for ids, labels in zip(found["ids"], found["labels"], strict=True):
        window = known.get(tuple(ids.tolist()))
        if window is None:
            counts["unknown windows"] += 1
            continue
        borders = np.flatnonzero(np.diff(window[2])) + 1
        counts["borders"] += len(borders)
        counts["labels across a border"] += int((labels[borders - 1] != MASKED).sum())
        counts["wrong labels within a document"] += int((np.delete(labels != window[1], borders - 1)).sum())
        for name, model in models.items():
            alone[name] += [reference_logits(model, part)[:, columns] for part in np.split(ids, borders)]
    table = {
        "unknown windows": counts["unknown windows"],
        "at least 5 borders": counts["borders"] >= 5,
        "labels across a border": counts["labels across a border"],
        "wrong labels within a document": counts["wrong labels within a document"],
    }
    if counts["unknown windows"]:
        return {"tables": {"labels": table}}
    pairs = {
        name: (found[name].reshape(-1, found[name].shape[-1])[:, columns], np.concatenate(alone[name]))
        for name in models
    }
    comparators = save_pairs(run_dir, pairs, ("packed windows", "float64 on each document alone"))
    return {"tables": {"labels": table}, "comparators": comparators}


# --- refused-data: data with nothing to learn, beside the same with one label ---


def _refused_argv(inputs: Inputs) -> list[str]:
    ids = list(range(20, 20 + 4 * 32 + 1))
    one = [MASKED] * (len(ids) - 1) + ids[-1:]
    masked = write_jsonl(inputs, "masked.jsonl", [{"input_ids": ids, "labels": [MASKED] * len(ids)}])
    labelled = write_jsonl(inputs, "labelled.jsonl", [{"input_ids": ids, "labels": one}])
    words = [
        distill_words(demo_teacher(inputs), demo_student(inputs), data, "--max-steps", "1", out=out)
        for data, out in ((masked, "0-refused"), (labelled, "0-accepted"))
    ]
    case = {"case": "every label masked", "argv": words[0], "twin": "one label", "twin_argv": words[1]}
    cases = inputs.file("refused-data.json", lambda path: write_json(path, {"cases": [case]}))
    return probe_words("start-runs", cases=cases, out="probe.json")


declare(
    "refused-data",
    "a run whose data has no label, beside one with a single label",
    Arm(None, _refused_argv, timeout_s=60, env=ONE_THREAD),
    collect=collect_probe,
)
