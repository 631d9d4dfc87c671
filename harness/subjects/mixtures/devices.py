"""Experiments on mixtures of experts as a GPU computes them; and what they share with the CPU, in the same code."""

import functools
from pathlib import Path

import numpy as np

from q4kd.harness.inputs.arrays import Array, Arrays, random_ids, read_array, read_arrays, seeded_columns
from q4kd.harness.inputs.collect import Comparators, arm_of, read_events, save_pairs
from q4kd.harness.inputs.command_lines import logits_words, probe_words
from q4kd.harness.inputs.demo import gguf_facts
from q4kd.harness.inputs.models.synthetic_mixtures import VOCAB
from q4kd.harness.oracles.families import expert_weights, read_family
from q4kd.harness.runs.experiment import ONE_THREAD, Arm, Facts, Inputs, declare, experiment
from q4kd.harness.subjects.mixtures.experiments import (
    CASES,
    COLUMNS,
    ids_file,
    joined,
    logits_pair,
    marked_file,
    marked_weights,
    mixture_file,
    normed_embeddings,
)
from q4kd.harness.subjects.mixtures.large import held_mixture

_CUDA = ("cuda",)
WAYS = ("float32", "bfloat16", "slabs")
POSITIONS = 64
# Where two experts are as likely to the last bits, products in bfloat16 choose the other one: of each four rows of
# logits, three are judged.
MOST = 0.75


# --- cuda-mixtures: logits of packed mixtures in every way in which the device cuts them ---


def passes_words(inputs: Inputs, device: str) -> list[str]:
    """Return the arguments of the passes over both small mixtures on a device."""
    words = probe_words("mixture-passes", ids=ids_file(inputs), out="logits.npz", device=device)
    return [*words, "--models", str(mixture_file(inputs)), str(marked_file(inputs))]


@experiment(
    "cuda-mixtures",
    "logits of packed mixtures on the device, whole and in slabs, against float64 and the CPU, and experts' weights",
    Arm(None, lambda inputs: passes_words(inputs, "cuda"), timeout_s=120),
    needs=_CUDA,
)
def collect_passes(run_dir: Path, inputs: Inputs) -> Facts:
    """Compare every way with float64, float32 also with the CPU, and experts' weights with those of the router."""
    if not (found := read_arrays(run_dir / "logits.npz")):
        return {"comparators": {}}
    ids, mixture, marked = (
        read_arrays(ids_file(inputs)),
        read_family(mixture_file(inputs)),
        read_family(marked_file(inputs)),
    )
    comparators: Comparators = {}
    for way in WAYS:
        mine = {name.removeprefix(f"{way}-"): array for name, array in found.items() if name.startswith(f"{way}-")}
        weights = {case: marked_weights(marked, ids[case][0], mine[f"marked-{case}"][0]) for case in CASES}
        pairs = {
            f"{way}-float64": _most(logits_pair(mixture, ids, mine), MOST if way == "bfloat16" else 1.0),
            f"{way}-weights": weights["text"],
            f"{way}-loads": joined(weights["same"], weights["one"]),
        }
        comparators |= save_pairs(run_dir, pairs, ("the teacher on the device", "float64 forward over gguf"))
    pair = {"cpu": (_text_logits(found, "float32"), _text_logits(found, "cpu"))}
    return {
        "comparators": comparators | save_pairs(run_dir, pair, ("the teacher on the device", "the teacher on the CPU"))
    }


def _most(pair: tuple[Array, Array], share: float) -> tuple[Array, Array]:
    """Return that share of the rows of a pair, those that differ least, in their order."""
    errors = np.linalg.norm(pair[0] - pair[1], axis=1) / np.linalg.norm(pair[1], axis=1)
    rows = np.sort(np.argsort(errors, kind="stable")[: round(share * len(errors))])
    return pair[0][rows], pair[1][rows]


def _text_logits(found: Arrays, way: str) -> Array:
    columns = seeded_columns(VOCAB, COLUMNS)
    return np.asarray(found[f"{way}-mixture-text"][0][::5, columns])


# --- mixture-decodes and cuda-mixture-decodes: which experts are decoded for a text, one token again, and one token ---


def decodes_words(inputs: Inputs, device: str) -> list[str]:
    """Return the arguments of the passes of which is recorded which experts are decoded."""
    options = {"ids": ids_file(inputs), "model": marked_file(inputs), "out": "decoded.npz", "device": device}
    return probe_words("expert-decodes", **options)


def collect_decodes(run_dir: Path, inputs: Inputs) -> Facts:
    """Count, for each case, experts without a token, those of them decoded, and those with one that were not."""
    ids, marked, table = read_arrays(ids_file(inputs)), read_family(marked_file(inputs)), {}
    for case, decoded in read_arrays(run_dir / "decoded.npz").items():
        has_tokens = expert_weights(marked, 0, normed_embeddings(marked, ids[case][0])).any(axis=0)
        table[f"{case}: experts without a token"] = int((~has_tokens).sum())
        table[f"{case}: decoded without a token"] = int((decoded & ~has_tokens).sum())
        table[f"{case}: not decoded with a token"] = int((has_tokens & ~decoded).sum())
    return {"tables": {"decoded": table}} if table else {}


for _device, _name in (("cpu", "mixture-decodes"), ("cuda", "cuda-mixture-decodes")):
    declare(
        _name,
        f"which experts of a packed mixture the {_device} decodes: for a text, one token again and again, one token",
        Arm(None, functools.partial(decodes_words, device=_device), timeout_s=60, env=ONE_THREAD),
        needs=_CUDA if _device == "cuda" else (),
        collect=collect_decodes,
    )


# --- mixture-backends and cuda-mixture-backends: a mixture by default and, as its control, dequantised on request ---


def _backends_argv(device: str, words: tuple[str, ...], inputs: Inputs) -> list[str]:
    ids = random_ids(inputs, "mixture-backends-ids.npy", VOCAB, POSITIONS)
    return logits_words(mixture_file(inputs), ids, "--device", device, "--dtype", "float32", *words)


def collect_backends(run_dir: Path, inputs: Inputs) -> Facts:
    """Read what was announced and what is held, and compare the logits of the two backends with one another."""
    ready = next(iter(read_events(run_dir, "teacher_ready")), None)
    facts = gguf_facts(mixture_file(inputs))
    if ready is None or not (run_dir / "logits.npy").is_file():
        return facts
    sizes, held = facts["gguf_bytes_by_type"], ready["resident_bytes"]
    total = sum(held.values())
    choice = read_events(run_dir, "backend_selected")[0]
    lines = (run_dir / "stdout.log").read_text(encoding="utf-8").splitlines()
    told = {
        "backend of the event": str(choice["backend"]),
        "device of the event": str(choice["device"]),
        "reason of the event is the log's": f"teacher backend: {choice['backend']} ({choice['reason']})" in lines,
        "held as in the file": held == sizes,
        "dequantised bytes": int(ready["dense_bytes_of_quantised"]),
        "within 1.02 of the file": total <= 1.02 * int(str(facts["gguf_tensor_bytes"])),
    }
    facts |= {"tables": {"announced": told}}
    other = run_dir.parent / run_dir.name.replace(".dense", ".default") / "logits.npy"
    if arm_of(run_dir) != "dense" or not other.is_file():
        return facts
    columns = seeded_columns(VOCAB, COLUMNS)
    pair = {"backends": (read_array(run_dir / "logits.npy")[:, columns], read_array(other)[:, columns])}
    sources = ("q4kd logits --backend dense", "q4kd logits, default backend")
    return facts | {"comparators": save_pairs(run_dir, pair, sources)}


def _backends_arm(device: str, name: str, *words: str) -> Arm:
    return Arm(name, functools.partial(_backends_argv, device, words), timeout_s=120, env=ONE_THREAD)


for _device, _name in (("cpu", "mixture-backends"), ("cuda", "cuda-mixture-backends")):
    declare(
        _name,
        f"q4kd logits of a mixture of experts on the {_device}, by default and with --backend dense",
        _backends_arm(_device, "default"),
        _backends_arm(_device, "dense", "--backend", "dense"),
        needs=_CUDA if _device == "cuda" else (),
        collect=collect_backends,
    )


# --- cuda-mixture-held: four layers of Qwen3-30B-A3B, 1.5 GB, loaded to the device and held ---


def _held_argv(inputs: Inputs) -> list[str]:
    ids = random_ids(inputs, "mixture-held-ids.npy", 4096, (1, 192))
    return probe_words("cuda-hold", model=held_mixture(inputs), ids=ids, seconds=1.5)


declare(
    "cuda-mixture-held",
    "four layers of Qwen3-30B-A3B's shapes in Q4_K_M loaded to the device and held, its memory by process",
    Arm(None, _held_argv, timeout_s=120, stall_s=60, interval_s=0.02),
    needs=_CUDA,
    collect=lambda _run_dir, inputs: gguf_facts(held_mixture(inputs)),
    exclusive=True,
)
