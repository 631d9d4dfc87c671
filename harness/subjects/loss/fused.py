"""Experiments on the forms of the fused loss: tiled, cached and on a device, beside float64; and what it allocates."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from q4kd.harness.inputs.arrays import Array, Arrays, Floats, arrays_input, read_arrays
from q4kd.harness.inputs.collect import save_pairs
from q4kd.harness.inputs.command_lines import probe_words
from q4kd.harness.oracles.events import exact_topk
from q4kd.harness.oracles.reference import log_softmax, reference_loss
from q4kd.harness.runs.experiment import ONE_THREAD, Arm, Facts, Inputs, declare, experiment
from q4kd.harness.subjects.loss.unset_sizes import collect_unset, given_files
from q4kd.trainer.files import read_json, write_json

_DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
TOKENS, VOCAB, PADDING, HIDDEN, SOURCE = 40, 300, 4, 24, 32
# Rows on the device are wide, since its kernels cut a row into segments of 8,192 columns.
CUDA_VOCAB = 16_640
LISTED = (8, 64)
ELEMENTS = 400
# Settings of a case, as the probe reads them from JSON.
_Case = dict[str, Any]


def loss_cases(vocab: int) -> dict[str, _Case]:
    """Return the settings of every case: both modes of each divergence, and on the CPU the cached teacher too."""
    cases: dict[str, _Case] = {}
    for divergence in _DIVERGENCES:
        common = {"divergence": divergence, "alpha": 0.2, "beta": 0.3, "chunk_tokens": 7}
        for temperature in (0.7, 3.0):
            name, warm = f"{divergence}-t{temperature:g}", common | {"temperature": temperature}
            cases[f"fast-{name}"] = {**warm, "mode": "fast"}
            # The tiles do not divide the vocabulary.
            cases[f"low-{name}"] = {**warm, "mode": "low", "vocab_tile": 64 if vocab < 1000 else 4096}
        for listed in _listed(vocab):
            cases[f"top{listed}-{divergence}"] = {**common, "listed": listed}
    return cases


def _listed(vocab: int) -> tuple[int, ...]:
    """Return how many tokens the cached teachers list; the device's vocabulary has none."""
    return (*LISTED, vocab) if vocab == VOCAB else ()


def _in_bfloat16(x: Floats) -> Array:
    """Drop the lower half of float32, so that a bfloat16 student is given exactly the same."""
    return (x.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)


def _given(vocab: int, inputs: Inputs) -> Path:
    def make() -> Arrays:
        rng = np.random.default_rng(8)
        labels = rng.integers(0, vocab, TOKENS)
        labels[::5] = -100
        # One chunk of seven tokens has no label, and some labels lie in the last columns, which end a short tile.
        labels[14:21] = -100
        labels[-3:-1] = vocab - 1
        drawn = {
            "hidden": rng.normal(0, 1, (TOKENS, HIDDEN)),
            "weight": rng.normal(0, 0.5, (vocab, HIDDEN)),
            "teacher_hidden": rng.normal(0, 1, (TOKENS, SOURCE)),
            # The rows past the student's vocabulary are the likeliest of all, so that keeping them would show.
            "teacher_weight": rng.normal(0, 0.4, (vocab + PADDING, SOURCE))
            * np.where(np.arange(vocab + PADDING) < vocab, 1, 3)[:, None],
        }
        arrays: Arrays = {name: _in_bfloat16(array) for name, array in drawn.items()}
        log_p = log_softmax(_teacher_logits(arrays, vocab))
        order = np.argsort(-log_p, axis=1)
        for listed in _listed(vocab):
            ids = order[:, :listed]
            rest = np.exp(np.take_along_axis(log_p, order[:, listed:], 1)).sum(1)
            with np.errstate(divide="ignore"):
                cached = {"ids": ids, "log_probs": np.take_along_axis(log_p, ids, 1), "tail": np.log(rest)}
            arrays |= {f"{name}-{listed}": array for name, array in cached.items()}
        return arrays | {"labels": labels, "cases": np.array(json.dumps(loss_cases(vocab)))}

    return arrays_input(inputs, f"fused-loss-{vocab}.npz", make)


def _teacher_logits(given: Arrays, vocab: int) -> Floats:
    hidden, weight = given["teacher_hidden"].astype(np.float64), given["teacher_weight"].astype(np.float64)
    return np.asarray(hidden @ weight.T)[:, :vocab]


def _collect_losses(device: str, vocab: int, run_dir: Path, inputs: Inputs) -> Facts:
    if not (found := read_arrays(run_dir / "losses.npz")):
        return {"comparators": {}}
    given = read_arrays(_given(vocab, inputs))
    kept = given["labels"] >= 0
    hidden, weight = given["hidden"].astype(np.float64), given["weight"].astype(np.float64)
    student, teacher, labels = hidden[kept] @ weight.T, _teacher_logits(given, vocab)[kept], given["labels"][kept]
    rng = np.random.default_rng(6)
    # A seeded choice of the head's gradient is kept, and all of the hidden states'.
    chosen = rng.choice(weight.size, ELEMENTS, replace=False)
    pairs: dict[str, tuple[list[Array], list[Array]]] = {}

    def add(name: str, subject: npt.ArrayLike, reference: npt.ArrayLike) -> None:
        subjects, references = pairs.setdefault(name, ([], []))
        subjects.append(np.atleast_1d(subject))
        references.append(np.atleast_1d(reference))

    excess, at_full = [], []
    for name, settings in loss_cases(vocab).items():
        form = name.partition("-")[0]
        options = {"temperature": 1.0} | {
            key: settings[key] for key in ("alpha", "temperature", "divergence", "beta") if key in settings
        }
        whole = reference_loss(student, teacher, labels, **options)
        loss, grad = whole.loss, whole.grad_logits
        if listed := settings.get("listed"):
            form = "topk"
            loss, grad, _ = exact_topk(student, teacher, labels, given[f"ids-{listed}"][kept], settings)
            if listed == vocab:
                at_full.append((found[f"{name}-terms"][2], whole.kd))
            else:
                excess.append(max(0.0, found[f"{name}-terms"][2] / whole.kd - 1))
        grad_hidden = np.zeros_like(hidden)
        grad_hidden[kept] = grad @ weight
        add(f"{form}-loss", found[f"{name}-terms"][0], loss)
        add(f"{form}-grad-hidden", found[f"{name}-grad_hidden"].ravel(), grad_hidden.ravel())
        add(
            f"{form}-grad-weight", found[f"{name}-grad_weight"].ravel()[chosen], (grad.T @ hidden[kept]).ravel()[chosen]
        )
    columns = {name: (np.array(subjects), np.array(references)) for name, (subjects, references) in pairs.items()}
    comparators = save_pairs(run_dir, columns, ("trainer fused loss", "dense float64 loss of the harness"))
    if excess:
        bound = {
            "topk-excess": (np.array(excess)[:, None], np.zeros((len(excess), 1))),
            "topk-whole": (np.array(at_full)[:, :1], np.array(at_full)[:, 1:]),
        }
        sources = ("trainer loss against a cached teacher", "dense float64 divergence of the harness")
        comparators |= save_pairs(run_dir, bound, sources)
    return {"comparators": comparators | collect_unset(device, found, run_dir, inputs)}


def _losses_argv(device: str, vocab: int, inputs: Inputs) -> list[str]:
    files = map(str, (_given(vocab, inputs), *given_files(device, inputs)))
    return [*probe_words("fused-losses", out="losses.npz", device=device), "--inputs", *files]


for _name, _device, _vocab in (("fused-losses", "cpu", VOCAB), ("cuda-fused-losses", "cuda", CUDA_VOCAB)):
    declare(
        _name,
        f"every mode of the fused loss on {_device}, values and gradients, against dense float64",
        Arm(
            None,
            functools.partial(_losses_argv, _device, _vocab),
            timeout_s=180,
            env=ONE_THREAD if _device == "cpu" else {},
        ),
        needs=("cuda",) if _device == "cuda" else (),
        collect=functools.partial(_collect_losses, _device, _vocab),
    )


# --- loss-allocations: what the loss makes, recorded from outside it ---

CHUNK, TILE = 64, 512
# These sides are so narrow that logits are larger than heads, hidden states and their gradients.
NARROW = {"tokens": 512, "vocab": 6000, "hidden": 4, "teacher_hidden": 4, "padding": 8}
# FULL stands for C = 256 and R = 8,192. SCALED has a sixteenth of every side, and chunks of a quarter.
FULL = {"tokens": 8192, "vocab": 151_936, "hidden": 896, "teacher_hidden": 3584}
SCALED = {name: size // 16 for name, size in FULL.items()} | {"padding": 8}


def allocation_cases() -> dict[str, _Case]:
    """Return the cases of every mode and divergence: sizes at which logits are largest, and for low the scaled ones."""
    cases: dict[str, _Case] = {}
    for divergence in _DIVERGENCES:
        common = {"divergence": divergence, "temperature": 2.0, "chunk_tokens": CHUNK, "vocab_tile": TILE}
        cases[f"fast-{divergence}"] = {**NARROW, "config": {**common, "mode": "fast"}}
        cases[f"low-{divergence}"] = {**NARROW, "config": {**common, "mode": "low"}}
        cases[f"scaled-{divergence}"] = {**SCALED, "config": {**common, "mode": "low"}}
    # A chunk that is chosen by itself must not be all tokens: 512 MiB / (6 x 4 x 40,000) = 559.
    chosen = {"tokens": 1200, "vocab": 40_000, "hidden": 2, "teacher_hidden": 2, "padding": 0}
    cases["fast-chosen"] = {**chosen, "config": {"mode": "fast"}}
    return cases


def low_bytes(sizes: Mapping[str, int], chunk: int, tile: int) -> int:
    """Return what mode low may take beyond parameters and gradients, as ``trainer/loss/tiled.py`` adds it up.

    Ten float32 ``[C, R]``; a tile of the teacher's head, of the student's and of its gradient in float32; hidden states
    of both in float32 and the student's gradient before it is rounded; ten float64 sums of every row.
    """
    logits = 10 * 4 * chunk * tile
    tiles = 4 * tile * (sizes["teacher_hidden"] + 2 * sizes["hidden"])
    states = 4 * sizes["tokens"] * (sizes["teacher_hidden"] + 2 * sizes["hidden"])
    return logits + tiles + states + 10 * 8 * sizes["tokens"]


def _allocation_argv(inputs: Inputs) -> list[str]:
    cases = inputs.file("loss-allocations.json", lambda path: write_json(path, allocation_cases()))
    return probe_words("loss-allocations", cases=cases, out="allocations.json")


@experiment(
    "loss-allocations",
    "every tensor that the fused loss makes, recorded by a dispatch mode around it",
    Arm(None, _allocation_argv, timeout_s=120, env=ONE_THREAD),
)
def _collect_allocations(run_dir: Path, _inputs: Inputs) -> Facts:
    if not (run_dir / "allocations.json").is_file():
        return {"comparators": {}}
    found = read_json(run_dir / "allocations.json")
    tables: dict[str, dict[str, int | bool]] = {}
    for name, case in allocation_cases().items():
        mode, _, divergence = name.partition("-")
        record = found[name]
        largest = int(np.prod(record["largest"][0], dtype=np.int64))
        if mode == "scaled":
            gradients = 2 * case["hidden"] * (case["tokens"] + case["vocab"])
            allowed = gradients + low_bytes(case, CHUNK, TILE)
            tables.setdefault("low-bytes", {})[f"{divergence}: within the sum of its parts"] = (
                record["peak_bytes"] <= allowed
            )
            # The recorder must have seen its gradients at the least.
            known = record["peak_bytes"] > gradients
        elif name == "fast-chosen":
            known = record["made"] > 0
            tables.setdefault("fast", {})["by itself: all tokens at once"] = largest >= case["tokens"] * case["vocab"]
        else:
            width = case["vocab"] if mode == "fast" else TILE
            # The control is that the recorder sees the logits that must exist: without it silence proves nothing.
            known = [CHUNK, width] in record["largest"] or largest > CHUNK * width
            tables.setdefault(mode, {})[f"{divergence}: elements of the largest tensor"] = largest
        if not known:
            return {"comparators": {}, "unseen": name, "allocations": found}
    tables["low-bytes"]["MB of the same sum at 8,192 x 151,936"] = low_bytes(FULL, 256, 8192) // 10**6
    return {"tables": tables, "allocations": found}
