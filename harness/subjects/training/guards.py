"""Experiments on what is checked before the first step: vocabularies, degenerate pairs, settings without meaning."""

import functools
import re
import shutil
from pathlib import Path
from typing import Literal

from q4kd.harness.inputs.arrays import random_ids, read_arrays, seeded_columns
from q4kd.harness.inputs.collect import (
    arm_of,
    checkpoint_facts,
    collect_probe,
    probe_cases,
    reference_step,
    save_pairs,
    step_terms,
)
from q4kd.harness.inputs.command_lines import distill_words, probe_words
from q4kd.harness.inputs.demo import (
    BATCH,
    SEQ_LEN,
    VOCAB,
    changed_student,
    demo_student,
    demo_teacher,
    training_text,
    weighted_student,
)
from q4kd.harness.inputs.synthetic_students import (
    Twin,
    read_tokens,
    student_shape,
    write_padded_teacher,
    write_teacher_as_student,
)
from q4kd.harness.runs.experiment import ONE_THREAD, Arm, Facts, Inputs, experiment
from q4kd.trainer.files import write_json

# PADDED adds to the demo's vocabulary the share that Qwen2.5-7B's file pads; EXACT_* are that file's rows and its
# student's.
NATIVE, PADDED, WIDER = VOCAB, 2080, 2064
EXACT_TEACHER, EXACT_STUDENT = 152_064, 151_936
ALPHA, TEMPERATURE, STEPS, EXACT_STEPS = 0.4, 2.0, 4, 2
POSITIONS, COLUMNS = 64, 128
EXCHANGED = (700, 1500)


def padded_teacher(inputs: Inputs, rows: int, exchanged: tuple[int, int] | None = None) -> Path:
    """Return the demo teacher with padding rows up to ``rows``, or its first rows, and with two tokens exchanged."""
    name = f"teacher-{rows}{'-exchanged' if exchanged else ''}.gguf"
    source = demo_teacher(inputs)
    make = functools.partial(write_padded_teacher, source=source, rows=rows, exchanged=exchanged)
    return inputs.file(name, make)


# --- vocabulary-run: a padded teacher beside the same without padding, and Qwen2.5's exact sizes ---


def _wide_student(inputs: Inputs) -> Path:
    shape = student_shape(hidden=32, ffn=64, layers=1, heads=1, kv_heads=1)
    return changed_student(inputs, "student-151936", {**shape, "vocab_size": EXACT_STUDENT})


def _vocabulary_argv(arm: str, inputs: Inputs) -> list[str]:
    if arm == "exact":
        teacher, student = padded_teacher(inputs, EXACT_TEACHER), _wide_student(inputs)
        words = ("--set", f"steps={EXACT_STEPS}", "--max-steps", str(EXACT_STEPS), "--set", "chunk_tokens=32")
    else:
        teacher = padded_teacher(inputs, PADDED if arm == "padded" else NATIVE)
        student = weighted_student(inputs)
        words = ("--set", f"steps={STEPS}", "--set", f"alpha={ALPHA}", "--set", f"temperature={TEMPERATURE:g}")
    # One batch is the whole text, so the order of its windows cannot matter.
    return distill_words(teacher, student, training_text(inputs, 1), *words)


def _collect_exact(run_dir: Path, inputs: Inputs) -> Facts:
    """Read the checkpoint of the exact sizes, and count the rows of the teacher's file and of the trained student."""
    from safetensors.numpy import load_file

    rows = {"teacher's file": len(read_tokens(padded_teacher(inputs, EXACT_TEACHER)))}
    for path in run_dir.glob("run/checkpoints/step-*/model.safetensors"):
        tensors = load_file(path)
        # Embedding and head are one tensor, stored under one of its two names.
        tied = [tensors[name] for name in ("model.embed_tokens.weight", "lm_head.weight") if name in tensors]
        rows["student after training"] = len(tied[0])
    return {"checkpoint": checkpoint_facts(run_dir), "tables": {"rows": rows}}


@experiment(
    "vocabulary-run",
    f"steps with a teacher of {PADDED} rows, with its first {NATIVE} alone, and at 152064 against 151936",
    *(
        Arm(name, functools.partial(_vocabulary_argv, name), timeout_s=120, stall_s=60, env=ONE_THREAD)
        for name in ("native", "padded", "exact")
    ),
)
def _collect_vocabulary(run_dir: Path, inputs: Inputs) -> Facts:
    """Compare the padded arm with the one before it, and its first step with float64 over the sliced logits."""
    arm, steps = arm_of(run_dir), step_terms(run_dir)
    if arm == "exact":
        return _collect_exact(run_dir, inputs)
    if arm == "native" or not len(steps):
        return {"comparators": {}}
    pairs = {"unpadded": (steps, step_terms(run_dir.parent / "vocabulary-run.native"))}
    comparators = save_pairs(run_dir, pairs, ("teacher with padding rows", "teacher without them"))
    teacher, text = padded_teacher(inputs, PADDED), training_text(inputs, 1)
    exact = reference_step(inputs, teacher, text, (BATCH, SEQ_LEN), alpha=ALPHA, temperature=TEMPERATURE)
    pairs = {"sliced": (steps[0].reshape(3, 1), exact)}
    return {"comparators": comparators | save_pairs(run_dir, pairs, ("q4kd distill", "float64 over sliced logits"))}


# --- vocabulary-widths: the padded teacher's logits beside the native one's, and the widths in the loss ---


def _widths_argv(inputs: Inputs) -> list[str]:
    models = {"native": padded_teacher(inputs, NATIVE), "padded": padded_teacher(inputs, PADDED)}
    given = {
        "student": weighted_student(inputs),
        "ids": random_ids(inputs, "vocabulary-ids.npy", NATIVE, POSITIONS, seed=9),
    }
    return probe_words("vocabulary-widths", **models, **given, out="logits.npz", facts="probe.json")


@experiment(
    "vocabulary-widths",
    "logits of a padded teacher beside the native one's, and the widths that meet in the loss",
    Arm(None, _widths_argv, timeout_s=60, env=ONE_THREAD),
)
def _collect_widths(run_dir: Path, inputs: Inputs) -> Facts:
    facts, found = collect_probe(run_dir, inputs), read_arrays(run_dir / "logits.npz")
    if not found:
        return facts | {"comparators": {}}
    columns = seeded_columns(NATIVE, COLUMNS)
    pair = {"in-range": (found["padded"][:, columns], found["native"][:, columns])}
    return facts | {"comparators": save_pairs(run_dir, pair, ("teacher with padding rows", "teacher without them"))}


# --- refused-runs: runs that must not reach their first step, each beside one that must ---


def _teacher_as_student(inputs: Inputs, twin: Twin) -> Path:
    teacher, student = demo_teacher(inputs), demo_student(inputs)
    make = functools.partial(write_teacher_as_student, teacher=teacher, student=student, twin=twin)
    return inputs.file(f"student-{twin}-twin", make)


def _spoilt_student(inputs: Inputs, how: Literal["compiled", "layer-missing", "no-index"]) -> Path:
    """Return a student with weights of which transformers finds none, or not all."""

    def make(folder: Path) -> None:
        from safetensors.numpy import load_file, save_file

        shutil.copytree(weighted_student(inputs), folder)
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        if how == "compiled":
            tensors = {f"_orig_mod.{name}": value for name, value in tensors.items()}
        elif how == "layer-missing":
            tensors = {name: value for name, value in tensors.items() if ".layers.1." not in name}
        name = "model-00001-of-00001.safetensors" if how == "no-index" else "model.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})

    return inputs.file(f"student-{how}", make)


def _refused_argv(inputs: Inputs) -> list[str]:
    teacher, padded = demo_teacher(inputs), padded_teacher(inputs, PADDED)
    fresh, data = demo_student(inputs), training_text(inputs, 1)
    records: list[dict[str, str | list[str]]] = []

    def add(case: str, twin: str, bad: tuple[Path, Path, str], good: tuple[Path, Path, str]) -> None:
        words = [
            distill_words(of, student, data, *options.split(), out=f"{len(records)}-{kind}")
            for kind, (of, student, options) in (("refused", bad), ("accepted", good))
        ]
        records.append({"case": case, "argv": words[0], "twin": twin, "twin_argv": words[1]})

    add("0 steps", "1 step", (teacher, fresh, "--max-steps 0"), (teacher, fresh, "--max-steps 1"))
    wider = changed_student(inputs, "student-wider", {"vocab_size": WIDER})
    add("student wider than teacher", "padded teacher", (teacher, wider, ""), (padded, wider, ""))
    exchanged = padded_teacher(inputs, PADDED, EXCHANGED)
    add("two tokens exchanged", "the same in order", (exchanged, fresh, ""), (padded, fresh, ""))
    same = _teacher_as_student(inputs, "exact")
    allowed = "--allow-degenerate-kd"
    add("its own teacher, 1 step", "fresh student", (teacher, same, "--max-steps 1"), (teacher, fresh, "--max-steps 1"))
    long = "--set steps=5000"
    add("its own teacher, 5000 steps", "overridden", (teacher, same, long), (teacher, same, f"{long} {allowed}"))
    permuted = _teacher_as_student(inputs, "permuted")
    add("same function, other weights", "overridden", (teacher, permuted, long), (teacher, permuted, allowed))
    noisy = _teacher_as_student(inputs, "noisy")
    add("same weights but for noise", "overridden", (teacher, noisy, long), (teacher, noisy, allowed))
    weighted = (teacher, weighted_student(inputs), "")
    add("no weights", "from scratch", (teacher, fresh, "--no-from-scratch"), (teacher, fresh, ""))
    add("compiled names", "its own names", (teacher, _spoilt_student(inputs, "compiled"), ""), weighted)
    add("a layer missing", "all layers", (teacher, _spoilt_student(inputs, "layer-missing"), ""), weighted)
    shards = (teacher, _spoilt_student(inputs, "no-index"), "--from-scratch")
    add("shards without an index", "from scratch", shards, (teacher, fresh, ""))
    cases = inputs.file("refused-runs.json", lambda path: write_json(path, {"cases": records}))
    return probe_words("start-runs", cases=cases, out="probe.json")


@experiment(
    "refused-runs",
    "runs that must be refused before their first step, each beside one that must reach it",
    Arm(None, _refused_argv, timeout_s=180, env=ONE_THREAD),
)
def _collect_refused(run_dir: Path, inputs: Inputs) -> Facts:
    """Return the cases, and whether the line about a student that is too wide names both sizes."""
    cases = probe_cases(run_dir)
    message = next((case["message"] for case in cases if case["case"] == "student wider than teacher"), None)
    if message is None:
        return collect_probe(run_dir, inputs)
    named = {f"names {size}": str(size) in message.replace(",", "") for size in (NATIVE, WIDER)}
    # A student is named by its path, which differs from run to run.
    errors = [re.sub(r"^(exit \d+: student) .*", r"\1", str(case["error"])) for case in cases]
    cases = [{**case, "error": case["error"] and error} for case, error in zip(cases, errors, strict=True)]
    return {"cases": [{**case, "message": ""} for case in cases], "tables": {"too-wide": named}}
