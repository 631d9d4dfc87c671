"""The fused loss with its chunks and tiles left to itself, on more tokens and columns than one of them holds.

These cases run beside those of ``fused.py``, in the same process; here are their inputs and their references.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from q4kd.harness.inputs.arrays import Array, Arrays, arrays_input, read_arrays, rows_around
from q4kd.harness.inputs.collect import Comparators, save_pairs
from q4kd.harness.oracles.events import exact_topk
from q4kd.harness.oracles.reference import log_softmax, reference_loss
from q4kd.harness.runs.experiment import Inputs

# By itself fast takes 1,024 tokens at once, low 256 tokens by 8,192 columns (2,048 by 8,192 on a device), and the loss
# against a cached teacher 1,024 tokens. Sums go to float64 half a million elements at a time.
SIZES = {
    "cpu": {"fast": (1100, 600), "low": (270, 8300), "topk": (1100, 600)},
    "cuda": {"fast": (1100, 600), "low": (2100, 8300), "topk": (1100, 600)},
}
HIDDEN, PADDING, LISTED, KEPT = 8, 4, 6, 48
CHUNK_EDGES, TILE_EDGES = (256, 512, 873, 1024, 2048), (8192,)
_CASES: dict[str, dict[str, Any]] = {
    "fast": {"mode": "fast", "divergence": "forward_kl", "temperature": 2.0},
    "low": {"mode": "low", "divergence": "reverse_kl", "temperature": 2.0},
    "topk": {"divergence": "forward_kl", "listed": LISTED},
}


def _bfloat16(x: Array) -> Array:
    """Drop the lower half of float32, so that a bfloat16 student is given exactly the same."""
    return np.asarray((x.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32))


def given_files(device: str, inputs: Inputs) -> list[Path]:
    """Return the input of each form, in the probe's format, with one case named ``unset-<form>``."""
    return [_given(device, form, inputs) for form in _CASES]


def _given(device: str, form: str, inputs: Inputs) -> Path:
    tokens, vocab = SIZES[device][form]

    def make() -> Arrays:
        rng = np.random.default_rng(31)
        labels = rng.integers(0, vocab, tokens)
        labels[5::50] = -100
        labels[-3:] = vocab - 1
        arrays: Arrays = {
            "hidden": _bfloat16(rng.normal(0, 1, (tokens, HIDDEN))),
            "weight": _bfloat16(rng.normal(0, 0.7, (vocab, HIDDEN))),
            "teacher_hidden": _bfloat16(rng.normal(0, 1, (tokens, HIDDEN))),
            "teacher_weight": _bfloat16(rng.normal(0, 0.7, (vocab + PADDING, HIDDEN))),
        }
        if form == "topk":
            log_p = log_softmax(_logits(arrays, "teacher_hidden", "teacher_weight")[:, :vocab])
            ids = np.argsort(-log_p, axis=1)[:, :LISTED]
            listed = np.take_along_axis(log_p, ids, 1)
            tail = np.log1p(-np.exp(listed).sum(1))
            arrays |= {f"ids-{LISTED}": ids, f"log_probs-{LISTED}": listed, f"tail-{LISTED}": tail}
        cases = {f"unset-{form}": {"alpha": 0.3, **_CASES[form]}}
        return arrays | {"labels": labels, "cases": np.array(json.dumps(cases))}

    return arrays_input(inputs, f"unset-{form}-{tokens}-{vocab}.npz", make)


def _logits(arrays: Arrays, hidden: str, weight: str) -> Array:
    return np.asarray(arrays[hidden].astype(np.float64) @ arrays[weight].astype(np.float64).T)


def _kept(count: int, edges: tuple[int, ...]) -> Array:
    """Return ``KEPT`` row numbers: those around the edges and the last ones, and seeded others."""
    near = rows_around(count, *edges, others=0)
    rest = np.setdiff1d(np.random.default_rng(4).permutation(count)[: 2 * KEPT], near)
    return np.sort(np.concatenate([near, rest[: KEPT - len(near)]]))


def collect_unset(device: str, found: Arrays, run_dir: Path, inputs: Inputs) -> Comparators:
    """Compare the loss and both gradients of every form with dense float64, a row for each."""
    pairs: dict[str, list[tuple[Array, Array]]] = {"loss": [], "grad-hidden": [], "grad-weight": []}
    for form, path in zip(_CASES, given_files(device, inputs), strict=True):
        given, name = read_arrays(path), f"unset-{form}"
        settings, kept = json.loads(str(given["cases"]))[name], given["labels"] >= 0
        student, labels = _logits(given, "hidden", "weight")[kept], given["labels"][kept]
        teacher = _logits(given, "teacher_hidden", "teacher_weight")[kept, : student.shape[1]]
        if form == "topk":
            loss, grad, _ = exact_topk(
                student, teacher, labels, given[f"ids-{LISTED}"][kept], {**settings, "beta": 0.5}
            )
        else:
            options = {key: settings[key] for key in ("alpha", "temperature", "divergence")}
            exact = reference_loss(student, teacher, labels, **options)
            loss, grad = exact.loss, exact.grad_logits
        rows, columns = _kept(len(labels), CHUNK_EDGES), _kept(student.shape[1], TILE_EDGES)
        places = np.flatnonzero(kept)[rows]
        hidden, weight = given["hidden"][kept].astype(np.float64), given["weight"].astype(np.float64)
        pairs["loss"].append((found[f"{name}-terms"][:1], np.array([loss])))
        pairs["grad-hidden"].append((found[f"{name}-grad_hidden"][places].ravel(), (grad[rows] @ weight).ravel()))
        of_weight = found[f"{name}-grad_weight"][columns].ravel(), (grad[:, columns].T @ hidden).ravel()
        pairs["grad-weight"].append(of_weight)
    columns_of = {
        f"unset-{name}": (np.array([a for a, _ in rows]), np.array([b for _, b in rows]))
        for name, rows in pairs.items()
    }
    sources = ("trainer fused loss, its sizes left to it", "dense float64 loss of the harness")
    return save_pairs(run_dir, columns_of, sources)
