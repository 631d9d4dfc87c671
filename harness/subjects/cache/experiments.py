"""Experiments on the teacher's cache: what it holds, to whom it belongs, how it resumes, and what is learnt from it."""

import functools
import json
import shutil
from pathlib import Path

import numpy as np

from q4kd.harness.inputs.arrays import Array, Ints, seeded_columns
from q4kd.harness.inputs.collect import collect_refusals, save_pairs, step_terms
from q4kd.harness.inputs.command_lines import distill_words, probe_words, run_program, set_words
from q4kd.harness.inputs.demo import BATCH, SEQ_LEN, VOCAB, demo_student, demo_teacher, training_text, windows_of
from q4kd.harness.oracles.reference import log_softmax, read_gguf, reference_logits
from q4kd.harness.runs.experiment import ONE_THREAD, Arm, Facts, Inputs, declare, experiment
from q4kd.trainer.files import read_json, sha256_file, write_json

BATCHES, K = 6, 512
WINDOWS = BATCHES * BATCH
# The float64 forward pass runs on these windows; this many of the k columns are kept as evidence.
CHECKED, COLUMNS = (0, 5, 14, 15, 23), 64
STEPS = 6


# Where an experiment runs, and what it needs there.
_PLACES: tuple[tuple[str, str, tuple[str, ...]], ...] = (("", "cpu", ()), ("cuda-", "cuda", ("cuda",)))


def _words(inputs: Inputs, out: str, k: int = K, device: str = "cpu") -> list[str]:
    """Return the arguments of a ``q4kd cache`` over a short text; with k = 512 it makes two shards."""
    return [
        *("cache", "--teacher", str(demo_teacher(inputs)), "--student", str(demo_student(inputs))),
        *("--data", str(training_text(inputs, BATCHES)), "--seq-len", str(SEQ_LEN), "--batch-size", str(BATCH)),
        *("--dtype", "float32", "--sample-tokens", "0", "--shard-mb", "1", "--k", str(k), "--out", out),
        *("--device", device),
    ]


def made_cache(inputs: Inputs, k: int = K, device: str = "cpu") -> Path:
    """Return a cache that the program, as it is, has written on a device."""

    def make(folder: Path) -> None:
        run_program(_words(inputs, str(folder), k, device), folder.parent, device)
        (folder / ".lock").unlink(missing_ok=True)

    return inputs.file(f"teacher-cache-{k}{'' if device == 'cpu' else f'-{device}'}", make)


# --- cached-signals: every figure beside a float64 forward over the teacher's file ---


def _ids(inputs: Inputs) -> Ints:
    """Return the windows' input ids, by the tokenizer itself, int ``[windows, T]``."""
    return windows_of(inputs, training_text(inputs, BATCHES), SEQ_LEN)[:, :-1]


@experiment(
    "cached-signals",
    f"q4kd cache of {WINDOWS} windows with k = {K}, beside a float64 forward over the teacher",
    Arm(None, lambda inputs: _words(inputs, "cache"), timeout_s=120, env=ONE_THREAD),
)
def _collect_signals(run_dir: Path, inputs: Inputs) -> Facts:
    from safetensors.numpy import load_file

    folder = run_dir / "cache"
    if not (folder / "cache.json").is_file():
        return {"comparators": {}}
    shards = [load_file(folder / name) for name in sorted(read_json(folder / "cache.json")["shards"])]
    parts = {name: np.concatenate([shard[name] for shard in shards]) for name in ("ids", "log_probs", "tail")}
    teacher, ids = read_gguf(demo_teacher(inputs)), _ids(inputs)
    columns = seeded_columns(K, COLUMNS, seed=4)
    found: dict[str, list[Array]] = {"stored": [], "largest": [], "there": [], "mass": [], "left": []}
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
    stored = arrays["stored"].astype(np.float32)  # exact: a cache holds float16
    pairs = {
        "largest": (stored, arrays["largest"]),
        "places": (stored, arrays["there"]),
        "masses": (arrays["mass"], arrays["left"]),
    }
    sources = ("q4kd cache", "float64 forward of the harness over the teacher's file")
    sizes = [sum(part.nbytes for part in shard.values()) for shard in shards]
    window, asked = sizes[0] // len(shards[0]["ids"]), 1_000_000
    table = {
        "shards": len(shards),
        "larger than asked": sum(size > asked for size in sizes),
        "room for another window in the first": sizes[0] + window <= asked,
    }
    return {"comparators": save_pairs(run_dir, pairs, sources), "tables": {"shards": table}}


# --- refused-caches: caches of something else, or changed, each beside the run they belong to ---


def _other_tokenizer(inputs: Inputs) -> Path:
    """Return the student with the ids of two tokens exchanged; the text holds neither."""

    def make(folder: Path) -> None:
        shutil.copytree(demo_student(inputs), folder)
        document = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        used, vocabulary = set(_ids(inputs).flatten().tolist()), document["model"]["vocab"]
        one, two = [token for token, index in vocabulary.items() if index not in used][-2:]
        vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
        (folder / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")

    return inputs.file("student-other-tokenizer", make)


def _damaged(inputs: Inputs) -> Path:
    """Return a cache with the lowest bit of one tail flipped, so that each row is still a distribution."""

    def make(folder: Path) -> None:
        shutil.copytree(made_cache(inputs, 8), folder)
        path = folder / "signal-000000.safetensors"
        data = bytearray(path.read_bytes())
        data[-2] ^= 1
        path.write_bytes(data)

    return inputs.file("teacher-cache-damaged", make)


def _refused_argv(inputs: Inputs) -> list[str]:
    cache, damaged = made_cache(inputs, 8), _damaged(inputs)
    other_data, other_student = training_text(inputs, BATCHES - 1), _other_tokenizer(inputs)
    text = training_text(inputs, BATCHES)

    records: list[dict[str, str | list[str]]] = []

    def add(case: str, *extra: str, student: Path | None = None, data: Path = text, folder: Path = cache) -> None:
        # Each run has a folder of its own: one that was started leaves it unlocked, but not empty.
        number, teacher, fresh = len(records), demo_teacher(inputs), demo_student(inputs)
        argv = distill_words(teacher, student or fresh, data, *extra, out=f"argv-{number}")
        twin = distill_words(teacher, fresh, text, out=f"twin_argv-{number}")
        record = {"argv": [*argv, "--teacher-cache", str(folder)], "twin_argv": [*twin, "--teacher-cache", str(cache)]}
        records.append({"case": case, "twin": "its own run", **record})

    add("another teacher", "--teacher", str(demo_student(inputs) / "config.json"))
    add("another tokenizer", student=other_student)
    add("other data", data=other_data)
    add("another packing", "--set", "packing=stream")
    add("another seq_len", "--set", "seq_len=16")
    add("a changed shard", folder=damaged)
    add("another temperature", "--set", "temperature=2")
    for option, bad, good in (("--k", 0, 1), ("--k", 4097, 1), ("--shard-mb", 1001, 1000), ("--sample-tokens", -1, 0)):
        wrong, right = (
            [*_words(inputs, f"{kind}-{len(records)}"), option, str(value)]
            for kind, value in (("wrong", bad), ("right", good))
        )
        names = {"case": f"{option[2:]} {bad}", "twin": f"{option[2:]} {good}"}
        records.append({**names, "argv": wrong, "twin_argv": right})
    cases = inputs.file("refused-caches.json", lambda path: write_json(path, {"cases": records}))
    return probe_words("start-runs", cases=cases, out="probe.json")


declare(
    "refused-caches",
    "runs that a teacher's cache does not belong to, each beside the one it does",
    Arm(None, _refused_argv, timeout_s=120, env=ONE_THREAD),
    collect=collect_refusals,
)


# --- interrupted-cache, cuda-interrupted-cache: killed in the middle of a shard, and finished ---


def _interrupted_argv(device: str, inputs: Inputs) -> list[str]:
    words = _words(inputs, "cache", device=device)
    return [*probe_words("cache-interrupted", cache="cache", facts="probe.json"), "--", *words]


def _collect_interrupted(device: str, run_dir: Path, inputs: Inputs) -> Facts:
    folder, whole = run_dir / "cache", made_cache(inputs, device=device)
    if not (run_dir / "probe.json").is_file():
        return {"tables": {}}
    names = {path.name for at in (folder, whole) for path in at.iterdir() if path.name != ".lock"}
    digests = [
        [sha256_file(at / name) if (at / name).is_file() else None for at in (folder, whole)] for name in sorted(names)
    ]
    same = {"files that differ from an uninterrupted cache": sum(one != other for one, other in digests)}
    return {"tables": {"writer": read_json(run_dir / "probe.json")["writer"] | same}}


for _prefix, _device, _needs in _PLACES:
    declare(
        f"{_prefix}interrupted-cache",
        f"q4kd cache on {_device} killed in the middle of its second shard and started again, beside one that was not",
        Arm(None, functools.partial(_interrupted_argv, _device), timeout_s=120, env=ONE_THREAD),
        needs=_needs,
        prepare=functools.partial(made_cache, device=_device),
        collect=functools.partial(_collect_interrupted, _device),
    )


# --- cached-training, cuda-cached-training: the same steps with a teacher, and from a cache of all its tokens ---


def _training_argv(device: str, arm: str, inputs: Inputs) -> list[str]:
    # Two micro-batches a step, each of which must read the signals of its own windows.
    settings = {"steps": STEPS, "eval_tokens": 0, "device": device, "student_dtype": "float32"}
    settings |= {"batch_size": BATCH // 2, "accumulation": 2}
    text = training_text(inputs, BATCHES)
    words = distill_words(demo_teacher(inputs), demo_student(inputs), text, *set_words(settings))
    if arm == "online":
        return words
    at = words.index("--teacher")
    return [*words[:at], *words[at + 2 :], "--teacher-cache", str(made_cache(inputs, VOCAB, device))]


def _collect_training(run_dir: Path, _inputs: Inputs) -> Facts:
    experiment_name, _, arm = run_dir.name.partition(".")
    if arm == "online" or not (run_dir / "events.jsonl").is_file():
        return {"comparators": {}}
    one, other = step_terms(run_dir), step_terms(run_dir.parent / f"{experiment_name}.online")
    if one.shape != other.shape or not len(one):
        return {"comparators": {}}
    return {"comparators": save_pairs(run_dir, {"steps": (one, other)}, ("--teacher-cache", "with the teacher"))}


for _prefix, _device, _needs in _PLACES:
    declare(
        f"{_prefix}cached-training",
        f"{STEPS} steps on {_device} with the teacher, and from a cache of all {VOCAB} tokens without it",
        *(
            Arm(arm, functools.partial(_training_argv, _device, arm), timeout_s=120, stall_s=60, env=ONE_THREAD)
            for arm in ("online", "cached")
        ),
        needs=_needs,
        collect=_collect_training,
    )
