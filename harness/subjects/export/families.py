"""Experiment on exported students of families with something of their own, one of every kind of particular."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from q4kd.harness.inputs.arrays import random_ids, read_array, read_arrays, seeded_columns
from q4kd.harness.inputs.collect import collect_probe, save_pairs
from q4kd.harness.inputs.demo import VOCAB, demo_student
from q4kd.harness.oracles.families import family_logits, read_family
from q4kd.harness.runs.experiment import ONE_THREAD, Arm, Facts, Inputs, experiment
from q4kd.trainer.files import write_json

_POSITIONS, _COLUMNS, _WINDOW, _ORIGINAL = 20, 16, 5, 8
_SIZES: dict[str, object] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    # So large that every layer moves the logits.
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
# Windows on every other layer, caps and norms of 1 + w; four multipliers and permuted rows; fused matrices and divisors
# for texts longer than eight tokens; layers with a rotary base and a scaling of their own.
_STUDENTS: dict[str, dict[str, object]] = {
    "gemma2": {
        "sliding_window": _WINDOW,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 6.0,
    },
    "gemma3_text": {
        "num_hidden_layers": 6,
        "sliding_window": _WINDOW,
        "query_pre_attn_scalar": 8,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        },
    },
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.7,
        "logits_scaling": 2.5,
    },
    "phi3": {
        "sliding_window": None,
        "original_max_position_embeddings": _ORIGINAL,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "original_max_position_embeddings": _ORIGINAL,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.5, 2.2, 2.9, 3.6],
        },
    },
}


def _folder(inputs: Inputs, name: str) -> Path:
    """Return a student's folder without weights."""

    def make(folder: Path) -> None:
        folder.mkdir()
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(demo_student(inputs) / file, folder / file)
        write_json(folder / "config.json", {**_SIZES, "model_type": name, **_STUDENTS[name]})

    return inputs.file(f"family-{name}", make)


def _ids(inputs: Inputs) -> Path:
    return random_ids(inputs, "family-ids.npy", VOCAB, _POSITIONS, seed=15, low=1)


def _argv(inputs: Inputs) -> list[str]:
    folders = [str(_folder(inputs, name)) for name in _STUDENTS]
    return ["probe", "exported-families", str(_ids(inputs)), "families.npz", "probe.json", *folders]


@experiment(
    "exported-families",
    "random students of four families exported as GGUF in f32, beside transformers' own logits",
    Arm(None, _argv, timeout_s=120, env=ONE_THREAD),
)
def _collect(run_dir: Path, inputs: Inputs) -> Facts:
    facts, found = collect_probe(run_dir, inputs), read_arrays(run_dir / "families.npz")
    if not found:
        return facts | {"comparators": {}}
    ids, columns = read_array(_ids(inputs)), seeded_columns(VOCAB, _COLUMNS)
    exact: list[Any] = []
    teacher: list[Any] = []
    reference: list[Any] = []
    for name in (f"family-{name}" for name in _STUDENTS):
        exact.append(found[name][:, columns].astype(np.float64))
        teacher.append(found[f"{name}.teacher"][:, columns])
        reference.append(family_logits(read_family(run_dir / f"{name}.gguf"), ids)[:, columns].astype(np.float32))
    comparators: dict[str, object] = {}
    for name, arrays in (("families-teacher", teacher), ("families-reference", reference)):
        pair = {name: (np.concatenate(arrays), np.concatenate(exact))}
        sources = (f"f32 exports, {name.partition('-')[2]} forward", "transformers, the students")
        comparators |= save_pairs(run_dir, pair, sources)
    return facts | {"comparators": comparators}
