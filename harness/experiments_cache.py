"""Experiments on the teacher's cache: what it holds, to whom it belongs, how it resumes, and what is learnt from it."""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from q4kd.harness.experiment import Arm, Experiment, Inputs, register
from q4kd.harness.experiments_export import run_program
from q4kd.harness.experiments_loss import demo_student
from q4kd.harness.experiments_runs import BATCH, SEQ_LEN, distill_words, read_events, training_text
from q4kd.harness.experiments_teacher import collect_probe, demo_teacher, save_pairs
from q4kd.harness.reference import log_softmax, read_gguf, reference_logits
from q4kd.trainer.files import read_json, sha256_file, write_json

BATCHES, K, VOCAB = 6, 512, 2048
WINDOWS = BATCHES * BATCH
# Windows that the float64 forward is run on, and columns of the k that are kept as evidence.
CHECKED, COLUMNS = (0, 5, 14, 15, 23), 64
STEPS = 6
_ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def _words(inputs: Inputs, out: str, k: int = K) -> list[str]:
    """Return the arguments of a ``q4kd cache`` over a short text; with k = 512 it makes two shards."""
    return [
        *("cache", "--teacher", str(demo_teacher(inputs)), "--student", str(demo_student(inputs))),
        *("--data", str(training_text(inputs, BATCHES)), "--seq-len", str(SEQ_LEN), "--batch-size", str(BATCH)),
        *("--dtype", "float32", "--sample-tokens", "0", "--shard-mb", "1", "--k", str(k), "--out", out),
    ]


def made_cache(inputs: Inputs, k: int = K) -> Path:
    """Return a cache that the program, as it is, has written."""

    def make(folder: Path) -> None:
        run_program(_words(inputs, str(folder), k), folder.parent)
        (folder / ".lock").unlink(missing_ok=True)

    return inputs.file(f"teacher-cache-{k}", make)


# --- cached-signals: every figure beside a float64 forward over the teacher's file ---


def _ids(inputs: Inputs) -> Any:
    """Return the windows' input ids, by the tokenizer itself, int ``[windows, T]``."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(demo_student(inputs) / "tokenizer.json"))
    text = training_text(inputs, BATCHES).read_text(encoding="utf-8")
    return np.array(tokenizer.encode(text, add_special_tokens=False).ids)[: WINDOWS * SEQ_LEN].reshape(-1, SEQ_LEN)


def _collect_signals(run_dir: Path, inputs: Inputs) -> dict[str, Any]:
    from safetensors.numpy import load_file

    folder = run_dir / "cache"
    if not (folder / "cache.json").is_file():
        return {"comparators": {}}
    shards = [load_file(folder / name) for name in sorted(read_json(folder / "cache.json")["shards"])]
    parts = {name: np.concatenate([shard[name] for shard in shards]) for name in ("ids", "log_probs", "tail")}
    teacher, ids = read_gguf(demo_teacher(inputs)), _ids(inputs)
    columns = np.sort(np.random.default_rng(4).choice(K, COLUMNS, replace=False))
    found: dict[str, list[Any]] = {"stored": [], "largest": [], "there": [], "mass": [], "left": []}
    for window in CHECKED:
        exact = log_softmax(reference_logits(teacher, ids[window]))
        stored, listed = parts["log_probs"][window].astype(np.float64), parts["ids"][window].astype(np.int64)
        ordered = -np.sort(-exact, axis=1)
        found["stored"].append(stored[:, columns])
        found["largest"].append(ordered[:, columns])
        found["there"].append(np.take_along_axis(exact, listed, 1)[:, columns])
        tail = np.exp(parts["tail"][window].astype(np.float64))
        found["mass"].append(np.stack([tail, np.exp(stored).sum(1) + tail], 1))
        left = np.exp(ordered[:, K:]).sum(1)
        found["left"].append(np.stack([left, np.ones(SEQ_LEN)], 1))
    arrays = {name: np.concatenate(values) for name, values in found.items()}
    pairs = {
        "largest": (arrays["stored"], arrays["largest"]),
        "places": (arrays["stored"], arrays["there"]),
        "masses": (arrays["mass"], arrays["left"]),
    }
    sources = ("q4kd cache", "float64 forward of the harness over the teacher's file")
    return {"comparators": save_pairs(run_dir, pairs, sources)}


register(
    Experiment(
        name="cached-signals",
        title=f"q4kd cache of {WINDOWS} windows with k = {K}, beside a float64 forward over the teacher",
        needs=(),
        arms=(Arm(None, lambda inputs: _words(inputs, "cache"), timeout_s=120, env=_ONE_THREAD),),
        prepare=lambda inputs: _words(inputs, "cache"),
        collect=_collect_signals,
    )
)


# --- refused-caches: caches of something else, or changed, each beside the run they belong to ---


def _other_tokenizer(inputs: Inputs) -> Path:
    """Return the student with the ids of two tokens exchanged that the text does not hold."""

    def make(folder: Path) -> None:
        shutil.copytree(demo_student(inputs), folder)
        document = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        used, vocabulary = set(_ids(inputs).flatten().tolist()), document["model"]["vocab"]
        one, two = [token for token, index in vocabulary.items() if index not in used][-2:]
        vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
        (folder / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")

    return inputs.file("student-other-tokenizer", make)


def _damaged(inputs: Inputs) -> Path:
    """Return a cache with the lowest bit of one tail turned, which leaves it a distribution."""

    def make(folder: Path) -> None:
        shutil.copytree(made_cache(inputs, 8), folder)
        path = folder / "signal-000000.safetensors"
        data = bytearray(path.read_bytes())
        data[-2] ^= 1
        path.write_bytes(data)

    return inputs.file("teacher-cache-damaged", make)


def _refusals(inputs: Inputs) -> Path:
    cache, damaged = made_cache(inputs, 8), _damaged(inputs)
    other_data, other_student = training_text(inputs, BATCHES - 1), _other_tokenizer(inputs)
    text = training_text(inputs, BATCHES)

    def words(*extra: str, student: Path | None = None, data: Path = text, folder: Path = cache) -> list[str]:
        argv = distill_words(demo_teacher(inputs), student or demo_student(inputs), data, *extra)
        return [*argv, "--teacher-cache", str(folder)]

    twin = words()
    records = [
        {"case": case, "argv": argv, "twin": "its own run", "twin_argv": twin}
        for case, argv in (
            ("another teacher", words("--teacher", str(demo_student(inputs) / "config.json"))),
            ("another tokenizer", words(student=other_student)),
            ("other data", words(data=other_data)),
            ("another packing", words("--set", "packing=stream")),
            ("another seq_len", words("--set", "seq_len=16")),
            ("a changed shard", words(folder=damaged)),
            ("another temperature", words("--set", "temperature=2")),
        )
    ]
    # Each in a folder of its own: a run that was started leaves it locked to nobody, but not empty.
    for number, record in enumerate(records):
        for name in ("argv", "twin_argv"):
            argv = record[name] = list(record[name])
            argv[argv.index("--out") + 1] = f"{name}-{number}"

    def make(path: Path) -> None:
        write_json(path, {"cases": records})

    return inputs.file("refused-caches.json", make)


def _collect_refusals(run_dir: Path, inputs: Inputs) -> dict[str, Any]:
    """Return the cases: what was refused counts, and not by which words, since they name paths."""
    cases = [
        {**case, "error": "exit 2" if str(case["error"]).startswith("exit 2: ") else case["error"], "message": ""}
        for case in collect_probe(run_dir, inputs).get("cases", [])
    ]
    return {"cases": cases}


register(
    Experiment(
        name="refused-caches",
        title="runs that a teacher's cache does not belong to, each beside the one it does",
        needs=(),
        arms=(
            Arm(
                None,
                lambda inputs: ["probe", "start-runs", "--cases", str(_refusals(inputs)), "--out", "probe.json"],
                timeout_s=120,
                env=_ONE_THREAD,
            ),
        ),
        prepare=_refusals,
        collect=_collect_refusals,
    )
)


# --- interrupted-cache: killed in the middle of a shard, and finished ---


def _interrupted_argv(inputs: Inputs) -> list[str]:
    words = _words(inputs, "cache")
    return ["probe", "cache-interrupted", "--cache", "cache", "--facts", "probe.json", "--", *words]


def _collect_interrupted(run_dir: Path, inputs: Inputs) -> dict[str, Any]:
    facts, folder, whole = collect_probe(run_dir, inputs), run_dir / "cache", made_cache(inputs)
    if "writer" not in facts:
        return {"tables": {}}
    names = {path.name for at in (folder, whole) for path in at.iterdir() if path.name != ".lock"}
    digests = [
        [sha256_file(at / name) if (at / name).is_file() else None for at in (folder, whole)] for name in sorted(names)
    ]
    same = {"files that differ from an uninterrupted cache": sum(one != other for one, other in digests)}
    return {"tables": {"writer": facts["writer"] | same}}


register(
    Experiment(
        name="interrupted-cache",
        title="q4kd cache killed in the middle of its second shard and started again, beside one that was not",
        needs=(),
        arms=(Arm(None, _interrupted_argv, timeout_s=120, env=_ONE_THREAD),),
        prepare=lambda inputs: (made_cache(inputs), _interrupted_argv(inputs)),
        collect=_collect_interrupted,
    )
)


# --- cached-training: the same steps with a teacher, and from a cache of all its tokens ---


def _training_argv(arm: str, inputs: Inputs) -> list[str]:
    words = distill_words(
        *(demo_teacher(inputs), demo_student(inputs), training_text(inputs, BATCHES)),
        *("--set", f"steps={STEPS}", "--set", "eval_tokens=0"),
    )
    if arm == "online":
        return words
    at = words.index("--teacher")
    return [*words[:at], *words[at + 2 :], "--teacher-cache", str(made_cache(inputs, VOCAB))]


def _collect_training(run_dir: Path, _inputs: Inputs) -> dict[str, Any]:
    if run_dir.name.endswith(".online") or not (run_dir / "events.jsonl").is_file():
        return {"comparators": {}}
    one, other = (
        np.array([[event["loss"], event["ce"], event["kd"]] for event in read_events(at, "step")])
        for at in (run_dir, run_dir.parent / "cached-training.online")
    )
    if one.shape != other.shape or not len(one):
        return {"comparators": {}}
    return {"comparators": save_pairs(run_dir, {"steps": (one, other)}, ("--teacher-cache", "with the teacher"))}


register(
    Experiment(
        name="cached-training",
        title=f"{STEPS} steps with the teacher, and from a cache of all {VOCAB} tokens without it",
        needs=(),
        arms=tuple(
            Arm(arm, functools.partial(_training_argv, arm), timeout_s=120, stall_s=60, env=_ONE_THREAD)
            for arm in ("online", "cached")
        ),
        prepare=lambda inputs: _training_argv("cached", inputs),
        collect=_collect_training,
    )
)
