"""Experiments on training data: packed documents beside each alone, labels, whole epochs, resumed order, refused data.

What is expected is worked out here from the texts with the ``tokenizers`` package alone, document by document.
"""

import functools
import shutil
from collections import Counter
from pathlib import Path

import numpy as np

from q4kd.harness.inputs.arrays import Array, read_arrays, seeded_columns
from q4kd.harness.inputs.collect import arm_of, collect_probe, reference_student, save_pairs
from q4kd.harness.inputs.command_lines import distill_words, probe_words
from q4kd.harness.inputs.demo import demo_student, demo_teacher, demo_tokenizer, weighted_student
from q4kd.harness.inputs.training_documents import (
    MASKED,
    chat_messages,
    packed_windows,
    run_settings,
    text_documents,
    write_jsonl,
)
from q4kd.harness.oracles.reference import read_gguf, reference_logits
from q4kd.harness.runs.experiment import ONE_THREAD, Arm, Facts, Inputs, declare, experiment
from q4kd.trainer.files import write_json

PACKED_LEN, PACKED_WINDOWS = 96, 3
SEQ_LEN = 24
COLUMNS = 128
_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


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


# --- training-batches: the batches of two epochs, and those that a run resumed within one takes ---


def _chat_student(inputs: Inputs) -> Path:
    def make(folder: Path) -> None:
        shutil.copytree(demo_student(inputs), folder)
        (folder / "chat_template.jinja").write_text(_TEMPLATE)

    return inputs.file("chat-student", make)


def _batch_cases(inputs: Inputs) -> Path:
    texts = text_documents(inputs)
    chats = write_jsonl(inputs, "chats.jsonl", [{"messages": messages} for messages in chat_messages()])
    windows = len(packed_windows(inputs, SEQ_LEN))
    epoch = {"sequences": 1, "steps": 2 * windows, "resume": windows + windows // 2}
    chat_settings = run_settings(
        inputs, chats, student=str(_chat_student(inputs)), completion_only=True, packing="none", seq_len=SEQ_LEN
    )
    cases = {
        "memory": {"settings": run_settings(inputs, texts, seq_len=SEQ_LEN), **epoch},
        "stream": {"settings": run_settings(inputs, texts, seq_len=SEQ_LEN, streaming=True, shuffle_buffer=9), **epoch},
        "chat": {"settings": chat_settings, "sequences": 1, "steps": len(_chat_windows(inputs)), "resume": 0},
    }
    return inputs.file("batch-cases.json", lambda path: write_json(path, cases))


def _chat_windows(inputs: Inputs) -> dict[tuple[int, ...], list[int]]:
    """Return the labels of each window of the chats by its ids: the assistant's words and the end of its turn."""
    tokenizer, windows = demo_tokenizer(inputs), {}
    for messages in chat_messages():
        text, said = "", []
        for message in messages:
            text += f"<{message['role']}>"
            if message["role"] == "assistant":
                said.append((len(text), len(text) + len(message["content"]) + len("</>\n")))
            text += f"{message['content']}</>\n"
        encoding = tokenizer.encode(text, add_special_tokens=False)
        learnt = [any(begin <= first < end for begin, end in said) for first, _ in encoding.offsets]
        labels = [token if learns else MASKED for token, learns in zip(encoding.ids, learnt, strict=True)]
        for start in range(0, len(labels) - 1, SEQ_LEN):
            stop = min(start + SEQ_LEN, len(labels) - 1)
            windows[tuple(encoding.ids[start:stop])] = labels[start + 1 : stop + 1]
    return windows


def _batches_argv(arm: str, inputs: Inputs) -> list[str]:
    resumed = ["--resumed"] if arm == "resumed" else []
    return [*probe_words("training-batches", cases=_batch_cases(inputs), out="batches.npz"), *resumed]


def _epoch_table(inputs: Inputs, ids: Array, labels: Array) -> dict[str, int | bool]:
    windows = packed_windows(inputs, SEQ_LEN)
    wanted = Counter((tuple(ids), tuple(labels)) for ids, labels, _ in windows)
    rows = [(tuple(row), tuple(label)) for row, label in zip(ids.tolist(), labels.tolist(), strict=True)]
    first, second = rows[: len(windows)], rows[len(windows) :]
    return {
        "windows lost": sum((wanted - Counter(first)).values()),
        "windows invented": sum((Counter(first) - wanted).values()),
        "windows lost in the second epoch": sum((wanted - Counter(second)).values()),
        "the second epoch has another order": first != second,
        "shuffled": first != [(tuple(ids), tuple(labels)) for ids, labels, _ in windows],
    }


def _chat_table(inputs: Inputs, ids: Array, labels: Array) -> dict[str, int | bool]:
    wanted = _chat_windows(inputs)
    counts: Counter[str] = Counter()
    seen = set()
    for row, label in zip(ids.tolist(), labels.tolist(), strict=True):
        key = next((tuple(row[:n]) for n in range(SEQ_LEN, 0, -1) if tuple(row[:n]) in wanted), None)
        if key is None:
            counts["unknown windows"] += 1
            continue
        seen.add(key)
        expected = wanted[key] + [MASKED] * (SEQ_LEN - len(key))
        counts["prompt or padding labelled"] += sum(
            e == MASKED != found for e, found in zip(expected, label, strict=True)
        )
        counts["assistant not labelled"] += sum(e not in (MASKED, f) for e, f in zip(expected, label, strict=True))
        counts["labels"] += sum(found != MASKED for found in label)
    return {
        "unknown windows": counts["unknown windows"],
        "windows lost": len(wanted) - len(seen),
        "prompt or padding labelled": counts["prompt or padding labelled"],
        "assistant not labelled": counts["assistant not labelled"],
        "at least 500 labels": counts["labels"] >= 500,
    }


@experiment(
    "training-batches",
    "the batches of two epochs of texts, of a stream and of chats, and those after a resumption in an epoch",
    *(Arm(name, functools.partial(_batches_argv, name), timeout_s=60, env=ONE_THREAD) for name in ("whole", "resumed")),
)
def _collect_batches(run_dir: Path, inputs: Inputs) -> Facts:
    """Count an epoch's windows and the chats' labels; in the resumed arm, compare with the arm before it."""
    if not (found := read_arrays(run_dir / "batches.npz")):
        return {}
    if arm_of(run_dir) == "whole":
        epoch = _epoch_table(inputs, found["memory-ids"], found["memory-labels"])
        return {"tables": {"epoch": epoch, "chats": _chat_table(inputs, found["chat-ids"], found["chat-labels"])}}
    if not (before := read_arrays(run_dir.parent / "training-batches.whole" / "batches.npz")):
        return {}
    table: dict[str, bool] = {}
    for name in ("memory", "stream"):
        late = {part: found[f"{name}-{part}"] for part in ("ids", "labels", "starts")}
        early = {part: before[f"{name}-{part}"][-len(late["ids"]) :] for part in late}
        table[f"{name}: batches are the same"] = all(np.array_equal(late[part], early[part]) for part in late)
        table[f"{name}: at least 20 of them"] = len(late["ids"]) >= 20
    return {"tables": {"resumed": table}}


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
