"""The experiment on tokens that a teacher rules out: their logits are minus infinity, and every divergence a number.

A model's authors may name tokens that it must never write; engines give them minus infinity. To forward_kl and jsd such
a token adds 0 log 0 = 0. reverse_kl is infinite wherever the student gives it probability, so that a rule takes the
place of the limit: whole vocabularies take its logit to be -65,504, cached ones its log-probability -87.33.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from q4kd.harness.inputs.arrays import Array, Arrays, Floats, arrays_input, read_arrays
from q4kd.harness.inputs.collect import save_pairs
from q4kd.harness.inputs.command_lines import probe_words
from q4kd.harness.oracles.events import exact_topk
from q4kd.harness.oracles.reference import log_softmax, reference_loss
from q4kd.harness.runs.experiment import ONE_THREAD, Arm, Facts, Inputs, experiment

TOKENS, VOCAB, HIDDEN, SOURCE = 40, 300, 24, 32
LISTED = (8, VOCAB)
LEAST_LOGIT, LEAST_LOG_PROB = -65504.0, -87.33
# The first eights of a row, one token by itself, a whole tile of 64, and the last columns.
RULED_OUT = np.r_[0:16, 40, 64:128, 290:300]
ELEMENTS = 400


def _cases() -> dict[str, dict[str, Any]]:
    cases: dict[str, dict[str, Any]] = {}
    for divergence in ("forward_kl", "reverse_kl", "jsd"):
        common = {"divergence": divergence, "alpha": 0.2, "beta": 0.3, "chunk_tokens": 7}
        for temperature in (1.0, 2.0):
            warm = common | {"temperature": temperature}
            cases[f"fast-{divergence}-t{temperature:g}"] = {**warm, "mode": "fast"}
            cases[f"low-{divergence}-t{temperature:g}"] = {**warm, "mode": "low", "vocab_tile": 64}
        for listed in LISTED:
            cases[f"top{listed}-{divergence}"] = {**common, "listed": listed}
    return cases


def _given(inputs: Inputs) -> Path:
    def make() -> Arrays:
        rng = np.random.default_rng(12)
        labels = rng.integers(0, VOCAB, TOKENS)
        labels[::5] = -100
        arrays: Arrays = {
            "hidden": rng.normal(0, 1, (TOKENS, HIDDEN)).astype(np.float32),
            "weight": rng.normal(0, 0.5, (VOCAB, HIDDEN)).astype(np.float32),
            "teacher_hidden": rng.normal(0, 1, (TOKENS, SOURCE)).astype(np.float32),
            "teacher_weight": rng.normal(0, 0.4, (VOCAB, SOURCE)).astype(np.float32),
        }
        # The head's rows of these tokens multiply an element that is one for every token.
        arrays["teacher_hidden"][:, 0] = 1
        arrays["teacher_weight"][RULED_OUT, 0] = -np.inf
        log_p = log_softmax(_teacher_logits(arrays))
        order = np.argsort(-log_p, axis=1, kind="stable")
        for listed in LISTED:
            ids = order[:, :listed]
            rest = np.exp(np.take_along_axis(log_p, order[:, listed:], 1)).sum(1)
            with np.errstate(divide="ignore"):
                cached = {"ids": ids, "log_probs": np.take_along_axis(log_p, ids, 1), "tail": np.log(rest)}
            arrays |= {f"{name}-{listed}": array for name, array in cached.items()}
        return arrays | {"labels": labels, "cases": np.array(json.dumps(_cases()))}

    return arrays_input(inputs, "ruled-out.npz", make)


def _teacher_logits(given: Arrays) -> Floats:
    return np.asarray(given["teacher_hidden"].astype(np.float64) @ given["teacher_weight"].astype(np.float64).T)


@experiment(
    "ruled-out-tokens",
    "every form of the loss and its gradients with tokens whose teacher logits are minus infinity, against float64",
    Arm(
        None,
        lambda inputs: [*probe_words("fused-losses", out="losses.npz"), "--inputs", str(_given(inputs))],
        timeout_s=60,
        env=ONE_THREAD,
    ),
)
def _collect_ruled_out(run_dir: Path, inputs: Inputs) -> Facts:
    if not (found := read_arrays(run_dir / "losses.npz")):
        return {"comparators": {}}
    given = read_arrays(_given(inputs))
    kept = given["labels"] >= 0
    hidden, weight, labels = given["hidden"].astype(np.float64), given["weight"].astype(np.float64), given["labels"]
    student, teacher = hidden[kept] @ weight.T, np.maximum(_teacher_logits(given)[kept], LEAST_LOGIT)
    chosen = np.random.default_rng(6).choice(weight.size, ELEMENTS, replace=False)
    rows: dict[str, list[tuple[Array, Array]]] = {}
    for name, settings in _cases().items():
        options = {"temperature": 1.0} | {
            key: settings[key] for key in ("alpha", "temperature", "divergence", "beta") if key in settings
        }
        form = name.partition("-")[0].rstrip("0123456789")
        if listed := settings.get("listed"):
            log_p = np.maximum(log_softmax(teacher), LEAST_LOG_PROB)
            loss, grad, _ = exact_topk(student, log_p, labels[kept], given[f"ids-{listed}"][kept], settings)
        else:
            whole = reference_loss(student, teacher, labels[kept], **options)
            loss, grad = whole.loss, whole.grad_logits
        grad_hidden = np.zeros_like(hidden)
        grad_hidden[kept] = grad @ weight
        of_head = (grad.T @ hidden[kept]).ravel()[chosen]
        parts = {
            "loss": (found[f"{name}-terms"][:1], np.array([loss])),
            "grad-hidden": (found[f"{name}-grad_hidden"].ravel(), grad_hidden.ravel()),
            "grad-weight": (found[f"{name}-grad_weight"].ravel()[chosen], of_head),
        }
        for part, pair in parts.items():
            rows.setdefault(f"{form}-{part}", []).append(pair)
    pairs = {name: (np.array([a for a, _ in of]), np.array([b for _, b in of])) for name, of in rows.items()}
    sources = ("trainer fused loss", "dense float64 loss of the harness, 0 log 0 = 0")
    return {"comparators": save_pairs(run_dir, pairs, sources)}
