"""Experiments on what is checked before the first step: vocabularies, degenerate pairs, settings without meaning."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from q4kd.harness.experiment import Arm, Experiment, Inputs, get_experiment, register
from q4kd.harness.experiments_loss import demo_student
from q4kd.harness.experiments_runs import BATCH, SEQ_LEN, distill_words, read_events, training_text
from q4kd.harness.experiments_teacher import collect_probe, demo_teacher, save_pairs
from q4kd.harness.reference import from_hugging_face, read_gguf, reference_logits, reference_loss
from q4kd.harness.synthetic_students import (
    Twin,
    read_tokens,
    write_padded_teacher,
    write_student,
    write_teacher_as_student,
)
from q4kd.trainer.files import read_json, write_json

# The demo's vocabulary, padded by the share of Qwen2.5-7B's file; and that file's sizes with its 0.5B student's.
NATIVE, PADDED, WIDER = 2048, 2080, 2064
EXACT_TEACHER, EXACT_STUDENT = 152_064, 151_936
ALPHA, TEMPERATURE, STEPS, EXACT_STEPS = 0.4, 2.0, 4, 2
POSITIONS, COLUMNS = 64, 128
EXCHANGED = (700, 1500)
_ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def _padded_teacher(inputs: Inputs, rows: int, exchanged: tuple[int, int] | None = None) -> Path:
    name = f"teacher-{rows}{'-exchanged' if exchanged else ''}.gguf"
    source = demo_teacher(inputs)
    make = functools.partial(write_padded_teacher, source=source, rows=rows, exchanged=exchanged)
    return inputs.file(name, make)


def _student(inputs: Inputs, name: str, changes: Mapping[str, object]) -> Path:
    return inputs.file(name, functools.partial(write_student, source=demo_student(inputs), changes=changes))


def _student_with_weights(inputs: Inputs) -> Path:
    """Return the demo student with weights on disk, so that the harness's own forward knows them."""

    def make(folder: Path) -> None:
        from q4kd.trainer.student import load_student, load_tokenizer

        load_student(demo_student(inputs), seed=7).save_pretrained(folder)  # type: ignore[operator]
        load_tokenizer(demo_student(inputs)).save_pretrained(folder)

    return inputs.file("weighted-student", make)


# --- vocabulary-run: a padded teacher beside the same without padding, and Qwen2.5's exact sizes ---


def _wide_student(inputs: Inputs) -> Path:
    changes = {
        "vocab_size": EXACT_STUDENT,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "layer_types": ["full_attention"],
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
    }
    return _student(inputs, "student-151936", changes)


def _vocabulary_argv(arm: str, inputs: Inputs) -> list[str]:
    if arm == "exact":
        teacher, student = _padded_teacher(inputs, EXACT_TEACHER), _wide_student(inputs)
        words = ("--set", f"steps={EXACT_STEPS}", "--max-steps", str(EXACT_STEPS), "--set", "chunk_tokens=32")
    else:
        teacher = _padded_teacher(inputs, PADDED if arm == "padded" else NATIVE)
        student = _student_with_weights(inputs)
        words = ("--set", f"steps={STEPS}", "--set", f"alpha={ALPHA}", "--set", f"temperature={TEMPERATURE:g}")
    # One batch is the whole text, so the order of its windows cannot matter.
    return distill_words(teacher, student, training_text(inputs, 1), *words)


def _collect_exact(run_dir: Path, inputs: Inputs) -> dict[str, Any]:
    """Read the checkpoint of the exact sizes, and count the rows of the teacher's file and of the trained student."""
    from safetensors.numpy import load_file

    facts = get_experiment("distill-run").collect(run_dir, inputs)
    rows = {"teacher's file": len(read_tokens(_padded_teacher(inputs, EXACT_TEACHER)))}
    for path in run_dir.glob("run/checkpoints/step-*/model.safetensors"):
        tensors = load_file(path)
        # Embedding and head are one tensor, stored under one of its two names.
        tied = [tensors[name] for name in ("model.embed_tokens.weight", "lm_head.weight") if name in tensors]
        rows["student after training"] = len(tied[0])
    return facts | {"tables": {"rows": rows}}


def _collect_vocabulary(run_dir: Path, inputs: Inputs) -> dict[str, Any]:
    """Compare the padded arm with the one before it, and its first step with float64 over the sliced logits."""
    arm, steps = run_dir.name.partition(".")[2], read_events(run_dir, "step")
    if arm == "exact":
        return _collect_exact(run_dir, inputs)
    if arm == "native" or not steps:
        return {"comparators": {}}
    native = read_events(run_dir.parent / "vocabulary-run.native", "step")

    def terms(events: list[dict[str, Any]]) -> Any:
        return np.array([[event["loss"], event["ce"], event["kd"]] for event in events])

    pairs = {"unpadded": (terms(steps), terms(native))}
    comparators = save_pairs(run_dir, pairs, ("teacher with padding rows", "teacher without them"))
    exact = _reference_step(inputs)
    pairs = {"sliced": (terms(steps)[0].reshape(3, 1), exact)}
    return {"comparators": comparators | save_pairs(run_dir, pairs, ("q4kd distill", "float64 over sliced logits"))}


def _reference_step(inputs: Inputs) -> Any:
    """Return loss, cross-entropy and KD term of the first step in float64, ``[3, 1]``."""
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    folder = _student_with_weights(inputs)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    end_of_text = tokenizer.token_to_id(str(read_json(folder / "tokenizer_config.json")["eos_token"]))
    text = training_text(inputs, 1).read_text(encoding="utf-8")
    ids = [*tokenizer.encode(text, add_special_tokens=False).ids, end_of_text]
    windows = np.array([ids[start : start + SEQ_LEN + 1] for start in range(0, len(ids) - 1, SEQ_LEN)])
    if windows.shape != (BATCH, SEQ_LEN + 1):
        raise ValueError(f"the text makes windows of shape {windows.shape}")
    student = from_hugging_face(load_file(folder / "model.safetensors"), read_json(folder / "config.json"))
    teacher = read_gguf(_padded_teacher(inputs, PADDED))
    exact = reference_loss(
        np.concatenate([reference_logits(student, window[:-1]) for window in windows]),
        np.concatenate([reference_logits(teacher, window[:-1]) for window in windows])[:, :NATIVE],
        windows[:, 1:].ravel(),
        alpha=ALPHA,
        temperature=TEMPERATURE,
        divergence="forward_kl",
    )
    return np.array([[exact.loss], [exact.ce], [exact.kd]])


register(
    Experiment(
        name="vocabulary-run",
        title=f"steps with a teacher of {PADDED} rows, with its first {NATIVE} alone, and at 152064 against 151936",
        needs=(),
        arms=tuple(
            Arm(name, functools.partial(_vocabulary_argv, name), timeout_s=120, stall_s=60, env=_ONE_THREAD)
            for name in ("native", "padded", "exact")
        ),
        prepare=lambda inputs: [_vocabulary_argv(name, inputs) for name in ("native", "padded", "exact")],
        collect=_collect_vocabulary,
    )
)


# --- vocabulary-widths: the padded teacher's logits beside the native one's, and the widths in the loss ---


def _ids(inputs: Inputs) -> Path:
    def make(path: Path) -> None:
        with path.open("wb") as file:
            np.save(file, np.random.default_rng(9).integers(0, NATIVE, POSITIONS))

    return inputs.file("vocabulary-ids.npy", make)


def _widths_argv(inputs: Inputs) -> list[str]:
    models = ["--native", str(_padded_teacher(inputs, NATIVE)), "--padded", str(_padded_teacher(inputs, PADDED))]
    student, ids = str(_student_with_weights(inputs)), str(_ids(inputs))
    out = ["--out", "logits.npz", "--facts", "probe.json"]
    return ["probe", "vocabulary-widths", *models, "--student", student, "--ids", ids, *out]


def _collect_widths(run_dir: Path, inputs: Inputs) -> dict[str, Any]:
    facts = collect_probe(run_dir, inputs)
    if not (run_dir / "logits.npz").is_file():
        return facts | {"comparators": {}}
    with np.load(run_dir / "logits.npz", allow_pickle=False) as arrays:
        native, padded = arrays["native"], arrays["padded"]
    columns = np.sort(np.random.default_rng(2).choice(NATIVE, COLUMNS, replace=False))
    pair = {"in-range": (padded[:, columns], native[:, columns])}
    return facts | {"comparators": save_pairs(run_dir, pair, ("teacher with padding rows", "teacher without them"))}


register(
    Experiment(
        name="vocabulary-widths",
        title="logits of a padded teacher beside the native one's, and the widths that meet in the loss",
        needs=(),
        arms=(Arm(None, _widths_argv, timeout_s=60, env=_ONE_THREAD),),
        prepare=_widths_argv,
        collect=_collect_widths,
    )
)


# --- refused-runs: runs that must not reach their first step, each beside one that must ---


def _teacher_as_student(inputs: Inputs, twin: Twin) -> Path:
    teacher, student = demo_teacher(inputs), demo_student(inputs)
    make = functools.partial(write_teacher_as_student, teacher=teacher, student=student, twin=twin)
    return inputs.file(f"student-{twin}-twin", make)


def _cases(inputs: Inputs) -> Path:
    teacher, padded = demo_teacher(inputs), _padded_teacher(inputs, PADDED)
    fresh, data = demo_student(inputs), training_text(inputs, 1)
    records: list[dict[str, Any]] = []

    def add(case: str, twin: str, bad: tuple[Path, Path, str], good: tuple[Path, Path, str]) -> None:
        words = [
            distill_words(of, student, data, *options.split(), out=f"{len(records)}-{kind}")
            for kind, (of, student, options) in (("refused", bad), ("accepted", good))
        ]
        records.append({"case": case, "argv": words[0], "twin": twin, "twin_argv": words[1]})

    add("0 steps", "1 step", (teacher, fresh, "--max-steps 0"), (teacher, fresh, "--max-steps 1"))
    wider = _student(inputs, "student-wider", {"vocab_size": WIDER})
    add("student wider than teacher", "padded teacher", (teacher, wider, ""), (padded, wider, ""))
    exchanged = _padded_teacher(inputs, PADDED, EXCHANGED)
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

    def make(path: Path) -> None:
        write_json(path, {"cases": records})

    return inputs.file("refused-runs.json", make)


def _collect_refused(run_dir: Path, inputs: Inputs) -> dict[str, Any]:
    """Return the cases, and whether the line about a student that is too wide names both sizes."""
    facts = collect_probe(run_dir, inputs)
    cases = facts.get("cases", [])
    message = next((case["message"] for case in cases if case["case"] == "student wider than teacher"), None)
    if message is None:
        return facts
    named = {f"names {size}": str(size) in message.replace(",", "") for size in (NATIVE, WIDER)}
    return {"cases": [{**case, "message": ""} for case in cases], "tables": {"too-wide": named}}


register(
    Experiment(
        name="refused-runs",
        title="runs that must be refused before their first step, each beside one that must reach it",
        needs=(),
        arms=(
            Arm(
                None,
                lambda inputs: ["probe", "start-runs", "--cases", str(_cases(inputs)), "--out", "probe.json"],
                timeout_s=180,
                env=_ONE_THREAD,
            ),
        ),
        prepare=_cases,
        collect=_collect_refused,
    )
)
