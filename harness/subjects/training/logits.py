"""Experiment on students with something of their own: scaled or capped logits, a window, transposed layers."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from q4kd.harness.inputs.arrays import read_arrays, save_arrays
from q4kd.harness.inputs.collect import collect_probe, save_pairs
from q4kd.harness.oracles.reference import reference_loss
from q4kd.harness.runs.experiment import ONE_THREAD, Arm, Facts, Inputs, experiment
from q4kd.trainer.files import write_json

_TOKENS, _VOCAB = 24, 64
_SCALING, _CAP = 8.0, 6.0
_SIZES = {
    "vocab_size": _VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    # So large that the cap bends the logits and the scale matters.
    "initializer_range": 0.5,
}
_STUDENTS: dict[str, dict[str, object]] = {
    "scaled": {"model_type": "granite", "logits_scaling": _SCALING},
    "capped": {"model_type": "gemma2", "final_logit_softcapping": _CAP},
}
# Windows shorter than the documents, on every layer or on some, and layers that keep their weight transposed, some of
# them square.
_OTHERS: dict[str, dict[str, object]] = {
    "windowed": {"model_type": "mistral", "sliding_window": 5},
    "layered": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 5,
        "query_pre_attn_scalar": 8,
    },
    "transposed": {
        "model_type": "gpt2",
        "n_embd": 32,
        "n_layer": 1,
        "n_head": 4,
        "n_inner": 48,
        "n_positions": 64,
        "tie_word_embeddings": True,
    },
}


def _folder(inputs: Inputs, name: str) -> Path:
    def make(folder: Path) -> None:
        folder.mkdir()
        write_json(folder / "config.json", {**_SIZES, **{**_STUDENTS, **_OTHERS}[name]})

    return inputs.file(name, make)


def _given(inputs: Inputs) -> Path:
    def make(path: Path) -> None:
        rng = np.random.default_rng(5)
        ids = rng.integers(0, _VOCAB, _TOKENS + 1)
        teacher = (3 * rng.standard_normal((_TOKENS, _VOCAB))).astype(np.float32)
        save_arrays(path, {"ids": ids[:-1], "labels": ids[1:], "teacher": teacher})

    return inputs.file("student-logits.npz", make)


def _argv(inputs: Inputs) -> list[str]:
    others, folders = ([str(_folder(inputs, name)) for name in names] for names in (_OTHERS, _STUDENTS))
    return ["probe", "student-logits", str(_given(inputs)), *others, "logits.npz", *folders]


def _slope(name: str, logits: NDArray[Any]) -> NDArray[Any]:
    """Return the derivative of a student's logits with respect to its head's products."""
    return np.full_like(logits, 1 / _SCALING) if name == "scaled" else 1 - (logits / _CAP) ** 2


@experiment(
    "student-logits",
    "students that scale or cap logits, have a window or transposed layers, beside transformers' own logits",
    Arm(None, _argv, timeout_s=60, env=ONE_THREAD),
)
def _collect(run_dir: Path, inputs: Inputs) -> Facts:
    facts, found = collect_probe(run_dir, inputs), read_arrays(run_dir / "logits.npz")
    if not found:
        return facts | {"comparators": {}}
    given, pairs = read_arrays(_given(inputs)), {}
    for name in _STUDENTS:
        logits = found[f"{name}.logits"].astype(np.float64)
        exact = reference_loss(
            logits,
            given["teacher"].astype(np.float64),
            given["labels"],
            alpha=0.4,
            temperature=2.0,
            divergence="forward_kl",
        )
        terms = [exact.loss, exact.ce, exact.kd]
        pairs[f"{name}-terms"] = found[f"{name}.terms"], np.array([*terms, *terms, exact.ce])
        products = exact.grad_logits * _slope(name, logits)
        pairs[f"{name}-gradient"] = found[f"{name}.gradient"], products.T @ found[f"{name}.hidden"].astype(np.float64)
    comparators = save_pairs(run_dir, pairs, ("the trainer's loss", "float64 on transformers' own logits"))
    pairs = {"packed": (found["packed"], found["alone"])}
    comparators |= save_pairs(run_dir, pairs, ("documents packed into one window", "transformers, each by itself"))
    pairs = {"merged": (found["merged"], found["in place"])}
    comparators |= save_pairs(run_dir, pairs, ("adapters merged", "adapters in place"))
    return facts | {"comparators": comparators}
