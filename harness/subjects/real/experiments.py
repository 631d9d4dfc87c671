"""Experiments on a pair that somebody brought (``--teacher``, ``--student``, ``--data``).

Faults are shown on the demo's pair in their place, with small runs; what is given is run at its own size.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from q4kd.harness.inputs.arrays import Array, random_ids, read_array, seeded_columns
from q4kd.harness.inputs.collect import Event, arm_of, read_events, run_terms, save_pairs
from q4kd.harness.inputs.command_lines import named_run, probe_words, set_words
from q4kd.harness.inputs.demo import argparse_documents, demo_student, demo_teacher
from q4kd.harness.inputs.samples import growth, planned_bytes
from q4kd.harness.inputs.synthetic_students import student_shape, write_live_student
from q4kd.harness.oracles.reference import log_softmax
from q4kd.harness.runs.experiment import ONE_THREAD, Arm, Facts, Inputs, declare
from q4kd.harness.subjects.export.experiments import CHAT_TEMPLATE, SIZES, live_student
from q4kd.harness.subjects.runs.probes_commands import FORGET, REWIND
from q4kd.trainer.errors import InputError
from q4kd.trainer.files import read_json, write_json

POSITIONS, COLUMNS = 64, 128
# Settings by where it runs, and whether the pair is a real one. The steps after the stop are those that are compared.
_SIZES: Mapping[tuple[str, bool], Mapping[str, int]] = {
    ("cuda", True): {"steps": 200, "batch_size": 16, "seq_len": 512, "eval_tokens": 65_536},
    ("cpu", True): {"steps": 200, "batch_size": 1, "seq_len": 64, "eval_tokens": 1024},
    ("cuda", False): {"steps": 12, "batch_size": 4, "seq_len": 64, "eval_tokens": 512},
    ("cpu", False): {"steps": 8, "batch_size": 4, "seq_len": 64, "eval_tokens": 512},
}
AFTER_STOP = 4
# Nats between the first and the second token of a model that prefers neither; 8 bits a weight move logits by less.
_TIE = 0.02
# What stands for the given student on the CPU: of a smaller one, what a run takes is mostly what libraries take.
_LARGER = {**SIZES, **student_shape(hidden=512, ffn=1536, layers=6, heads=8, kv_heads=4)}
# As in planned.py: glibc gives freed blocks back at once, so that resident memory is what the program holds.
_GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def _pair(inputs: Inputs, device: str = "cuda") -> tuple[Path, Path, Path, bool]:
    """Return teacher, student and data, and whether all three were given."""
    if (given := inputs.given.pair()) is None:
        student = _larger_student(inputs) if device == "cpu" else live_student(inputs)
        return demo_teacher(inputs), student, argparse_documents(inputs), False
    return *given, True


def _larger_student(inputs: Inputs) -> Path:
    def make(folder: Path) -> None:
        write_live_student(folder, source=demo_student(inputs), changes=_LARGER, template=CHAT_TEMPLATE)

    return inputs.file("larger-live-student", make)


def _size(inputs: Inputs, device: str) -> dict[str, int]:
    return dict(_SIZES[device, inputs.given.pair() is not None])


# --- real-logits: the teacher beside transformers over the file that it decodes itself ---


def _vocabulary(path: Path) -> int:
    from q4kd.trainer.formats.open import open_model

    return open_model(path).config.vocab_size


def _ids(inputs: Inputs) -> Path:
    return random_ids(inputs, "real-ids.npy", min(_vocabulary(_pair(inputs)[0]), 2000), POSITIONS, seed=31, low=1)


def _text_ids(inputs: Inputs) -> Path:
    """Return the first tokens of the data, int64 ``[T]``: on text, llama.cpp rounds less than on random tokens."""

    def make(path: Path) -> None:
        from tokenizers import Tokenizer

        _, student, data, _ = _pair(inputs)
        files = [data] if data.is_file() else sorted(file for file in data.rglob("*") if file.is_file())
        text = "".join(file.read_bytes()[:20_000].decode("utf-8", "replace") for file in files[:8])
        tokenizer = Tokenizer.from_file(str(student / "tokenizer.json"))
        np.save(path, np.array(tokenizer.encode(text, add_special_tokens=False).ids[:POSITIONS], np.int64))

    return inputs.file("real-text-ids.npy", make)


def _logits_argv(ids_of: Callable[[Inputs], Path], arm: str, inputs: Inputs) -> list[str]:
    teacher, ids = _pair(inputs)[0], ids_of(inputs)
    if arm != "q4kd":
        return probe_words(f"{arm}-logits", model=teacher, ids=ids, out="logits.npy")
    words = ["--ids", str(ids), "--out", "logits.npy", "--dtype", "float32", "--events", "events.jsonl"]
    return ["logits", str(teacher), *words]


def _collect_logits(experiment: str, other_arm: str, run_dir: Path, inputs: Inputs) -> Facts:
    """Compare both where the second has run: every position and a seeded choice of columns."""
    other = run_dir.parent / f"{experiment}.{other_arm}" / "logits.npy"
    if arm_of(run_dir) == other_arm or not (other.is_file() and (run_dir / "logits.npy").is_file()):
        return {"comparators": {}}
    ours, theirs = read_array(run_dir / "logits.npy"), read_array(other)
    if ours.shape != theirs.shape:
        return {"comparators": {}, "shapes": [list(ours.shape), list(theirs.shape)]}
    columns = seeded_columns(ours.shape[1], COLUMNS)
    pair = {"logits": (ours[:, columns], theirs[:, columns])}
    top = {"positions": len(ours), "with another first token": int((ours.argmax(1) != theirs.argmax(1)).sum())}
    products = (ours.astype(np.float64) * theirs).sum(1)
    cosines = products / (np.linalg.norm(ours, axis=1).astype(np.float64) * np.linalg.norm(theirs, axis=1))
    # Everything attends to the first token, whose states are so large that 8 bits leave little of the rest.
    later = cosines[1:]
    tables = {
        "first tokens": top,
        "directions": {
            "positions after the first": len(later),
            "with a cosine below 0.99": int((later < 0.99).sum()),
            "mean cosine at least 0.999": bool(later.mean() >= 0.999),
        },
    }
    comparators = save_pairs(run_dir, pair, ("q4kd logits", f"{other_arm} over the same file"))
    return {
        "comparators": comparators,
        "tables": tables,
        "figures": {"cosines": [round(float(one), 6) for one in cosines]},
    }


# transformers decodes the file itself; llama.cpp computes with it packed, its activations rounded to 8 bits.
for _name, _arm, _of in (("real-logits", "transformers", _ids), ("real-llamacpp", "llamacpp", _text_ids)):
    declare(
        _name,
        f"the teacher's logits at {POSITIONS} positions beside {_arm}",
        *(Arm(arm, functools.partial(_logits_argv, _of, arm), timeout_s=900, env=ONE_THREAD) for arm in (_arm, "q4kd")),
        collect=functools.partial(_collect_logits, _name, _arm),
    )


# --- real-pair, cuda-real-pair: planned, trained, stopped and resumed, exported and compared ---


def _commands(device: str, inputs: Inputs) -> list[tuple[str, list[str]]]:
    """Return the commands by name, as they follow each other; what has no name only makes room on the disk."""
    teacher, student, data, is_given = _pair(inputs, device)
    size = _size(inputs, device)
    stop = size["steps"] // 2
    settings = {
        "lr": 2e-5 if is_given else 3e-3 if device == "cuda" else 1e-3,
        "warmup_steps": 4,
        "checkpoint_every": stop,
        "eval_every": stop,
        "seed": 1,
        "keep": 2,
        "device": device,
        "threads": 0 if is_given else 1,
        **size,
    }
    words = ["distill", "--teacher", str(teacher), "--student", str(student), "--data", str(data), "--out", "run"]
    words += ["--events", "events.jsonl", *set_words(settings)]
    smaller = {name: max(1, size[name] // 2) for name in ("batch_size", "seq_len")}
    small = set_words({**smaller, "eval_tokens": 0, "eval_every": 0, "checkpoint_every": 0})
    export = ["export", "whole", "--format", "gguf", "--quantize", "q8_0", "--out", "back.gguf"]
    tokens = ["--data", str(data), "--tokens", str(max(512, size["eval_tokens"])), "--seq-len", str(size["seq_len"])]
    ids = ["--ids", str(_ids(inputs)), "--out", "back.npy", "--dtype", "float32"]
    return [
        ("whole", named_run("whole", words)),
        ("stopped", [REWIND, "whole", "part", str(stop)]),
        ("resumed", [*named_run("part", words), "--resume", "--max-steps", str(stop + AFTER_STOP)]),
        ("", [FORGET, "whole", "part"]),
        ("smaller", [*named_run("smaller", words), *small, "--max-steps", "2"]),
        ("", [FORGET, "smaller"]),
        ("export", export),
        ("fidelity", ["fidelity", "back.gguf", "whole/model", *tokens, "--device", device, "--out", "fidelity.json"]),
        ("back", ["logits", "back.gguf", *ids]),
    ]


def _check_held_out(data: Path) -> None:
    """Refuse text of which nothing is held out: whether a student learnt could not be said after all its steps.

    Raises:
        InputError: with what to give instead.
    """
    from q4kd.trainer.data.corpus import split_rule
    from q4kd.trainer.data.documents import is_held_out
    from q4kd.trainer.data.readers import read_documents

    documents, splits = split_rule(read_documents(data), has_own_file=False)
    if not (splits and any(is_held_out(document.name) for document in documents)):
        expected = "text of which some is held out: about one document in ten, chosen by its name"
        remedy = "give a folder with more files; of a hundred about ten are held out"
        raise InputError("--data", expected=expected, got="none that is", remedy=remedy)


def _pair_argv(device: str, inputs: Inputs) -> list[str]:
    _check_held_out(_pair(inputs)[2])
    commands = _commands(device, inputs)
    cases = inputs.file(f"real-pair-{device}.json", lambda path: write_json(path, {"commands": commands}))
    return probe_words("commands", cases=cases, out="commands.json")


def _taken(run_dir: Path, device: str, plan: Event, name: str, measured: Mapping[str, int]) -> int | None:
    """Return what a run took: by torch's allocator on a GPU, else by the growth that the supervisor saw.

    The student's digest is taken beside all this, in pieces of 33.6 MB. The first command's plan waits for imports and
    comes after it; a later command has its plan within 0.2 s, while that buffer is there, and its growth lacks it.
    """
    if device == "cuda":
        return measured.get("allocated")
    return growth(run_dir, "rss", plan["t"], read_events(run_dir, "step", f"{name}.jsonl")[-1]["t"])


def _taken_anew(run_dir: Path, stop: int) -> dict[str, int | bool]:
    """Show that the copy took its steps itself: they follow the one it was made after, and the whole run's are over.

    Equal figures of two runs could otherwise be one run's, read twice.
    """
    whole, part = (read_events(run_dir, "step", f"{name}.jsonl") for name in ("whole", "part"))
    expected = [*range(stop + 1, stop + 1 + AFTER_STOP)]
    return {
        "the whole run took each step once": [event["step"] for event in whole] == [*range(1, 2 * stop + 1)],
        "steps of the copy": len(part),
        "they follow the step of the copy": [event["step"] for event in part] == expected,
        "taken when the whole run was over": all(event["t"] > whole[-1]["t"] for event in part),
    }


def _distance(run_dir: Path, inputs: Inputs) -> tuple[float, float]:
    """Return the mean KL(model || export) over the ids, and the share of equal first tokens; transformers is the model.

    q4kd's own fidelity reads both by the same code, so that an error of the export may be in both. Positions at which
    the model itself has two first tokens, less than ``_TIE`` nats apart, have no first token to keep.
    """
    import torch
    from transformers import AutoModelForCausalLM

    load: Any = AutoModelForCausalLM.from_pretrained
    model = load(run_dir / "whole" / "model", dtype=torch.float32, local_files_only=True).eval()
    with torch.inference_mode():
        theirs = model(torch.from_numpy(read_array(_ids(inputs))).long().unsqueeze(0)).logits[0].double().numpy()
    ours = read_array(run_dir / "back.npy").astype(np.float64)[:, : theirs.shape[1]]
    log_p, log_q = log_softmax(theirs), log_softmax(ours)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(1)
    first_two = np.partition(log_p, -2, axis=1)[:, -2:]
    decided = first_two.max(1) - first_two.min(1) >= _TIE
    same = theirs.argmax(1) == ours.argmax(1)
    return float(kl.mean()), float(same[decided].mean()) if decided.any() else 1.0


def _collect_pair(device: str, run_dir: Path, inputs: Inputs) -> Facts:
    """Lay plan beside need, the steps after the stop beside those of the whole run, and the export beside the model."""
    size, path = _size(inputs, device), run_dir / "commands.json"
    commands = read_json(path)["commands"] if path.is_file() else {}
    names = [name for name, _ in _commands(device, inputs) if name]
    codes = {name: commands[name]["exit code"] for name in names if name in commands}
    facts: Facts = {"comparators": {}, "tables": {"commands": codes}}
    if codes != dict.fromkeys(names, 0):
        return facts
    pairs: dict[str, tuple[Array, Array]] = {}
    plans = {name: read_events(run_dir, "memory_plan", f"{name}.jsonl")[0] for name in ("whole", "smaller")}
    taken = [_taken(run_dir, device, plan, name, commands[name]) for name, plan in plans.items()]
    if None not in taken:
        planned = [[planned_bytes(plan)] for plan in plans.values()]
        pairs["plan"] = (np.array(planned, np.float64), np.array([[size] for size in taken], np.float64))
    stop = size["steps"] // 2
    wanted = run_terms(run_dir, "whole")[stop : stop + AFTER_STOP]
    found = np.full(wanted.shape, np.nan)
    part = run_terms(run_dir, "part")[:AFTER_STOP]
    found[: len(part)] = part
    pairs["resumed"] = (found, wanted)
    # Steps on a GPU may be equal to the last bit too, and need not be: their distance says both.
    apart = np.linalg.norm(found - wanted, axis=1, keepdims=True) / np.linalg.norm(wanted, axis=1, keepdims=True)
    pairs["resumed-apart"] = (apart, np.zeros_like(apart))
    sources = ("plan, or the run that was stopped and resumed", "what was taken, or the whole run")
    facts = {"comparators": save_pairs(run_dir, pairs, sources)}
    report, evaluations = read_json(run_dir / "fidelity.json"), read_events(run_dir, "eval", "whole.jsonl")
    kl = [evaluation["kl"] for evaluation in evaluations]
    by_transformers, same = _distance(run_dir, inputs)
    tables: dict[str, object] = {
        "commands": codes,
        "resumed": _taken_anew(run_dir, stop),
        "back": {
            "KL by q4kd fidelity at most 0.01": bool(report["kl"]["mean"] <= 0.01),
            "KL to transformers at most 0.01": bool(by_transformers <= 0.01),
            "first tokens agree at 95 %": bool(same >= 0.95),
        },
    }
    # Without two evaluations nothing was learnt or not learnt: no table, and the claim is inconclusive.
    tables |= {"learnt": {"KL of held-out text has fallen": bool(kl[-1] < kl[0])}} if len(kl) > 1 else {}
    figures: dict[str, object] = {
        "held-out KL": kl,
        "export": {name: report[name] for name in ("kl", "top1_agreement")},
    }
    figures["export beside transformers"] = {"kl": by_transformers, "first tokens": same, "positions": POSITIONS}
    summary = read_json(run_dir / "whole" / "summary.json")
    return facts | {"tables": tables, "figures": figures, "summary": summary}


for _prefix, _device, _needs in (("", "cpu", ()), ("cuda-", "cuda", ("cuda",))):
    _env = _GIVES_BACK if _device == "cpu" else {}
    declare(
        f"{_prefix}real-pair",
        f"a pair on {_device}: planned, trained, stopped and resumed, exported to GGUF and compared with the model",
        Arm(None, functools.partial(_pair_argv, _device), timeout_s=10_800, interval_s=0.02, env=_env),
        needs=_needs,
        collect=functools.partial(_collect_pair, _device),
        measures=("memory",),
    )
