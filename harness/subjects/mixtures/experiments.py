"""The experiment on mixtures of experts: logits of one, and of another the weights of its experts, read from logits."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from q4kd.harness.inputs.arrays import Array, arrays_input, read_arrays, rows_around, seeded_columns
from q4kd.harness.inputs.collect import save_pairs
from q4kd.harness.inputs.models.synthetic_mixtures import (
    CONSTANT,
    MARKED,
    VOCAB,
    write_marked_mixture,
    write_mixture,
)
from q4kd.harness.oracles.families import FamilyModel, expert_weights, family_logits, read_family
from q4kd.harness.runs.experiment import ONE_THREAD, Arm, Facts, Inputs, experiment

# A text; documents of it in one window; one token again and again, all given to the same experts; and one token alone.
POSITIONS, FIRSTS = 320, (37, 128, 250)
CASES = ("text", "same", "one")
ROWS, COLUMNS = 24, 24


def mixture_file(inputs: Inputs) -> Path:
    """Return the mixture in which every part is alive."""
    return inputs.file("models/mixture.gguf", write_mixture)


def marked_file(inputs: Inputs) -> Path:
    """Return the mixture whose logits are the weights of its experts."""
    return inputs.file("models/marked.gguf", write_marked_mixture)


def ids_file(inputs: Inputs) -> Path:
    """Return the ids of every case, and where the documents of the text start."""
    text = np.random.default_rng(7).integers(0, VOCAB, (1, POSITIONS))
    starts = np.zeros_like(text)
    for first in FIRSTS:
        starts[:, first:] = first
    cases = {"text": text, "text-starts": starts, "same": np.full((1, POSITIONS), 11), "one": np.full((1, 1), 23)}
    return arrays_input(inputs, "models/mixture-ids.npz", lambda: cases)


def _argv(inputs: Inputs) -> list[str]:
    models = [str(mixture_file(inputs)), str(marked_file(inputs))]
    return ["probe", "model-logits", "--ids", str(ids_file(inputs)), "--out", "logits.npz", "--models", *models]


@experiment(
    "mixtures",
    "logits of packed mixtures of experts against float64: a text, one token again and again, one token alone",
    Arm(None, _argv, timeout_s=60, env=ONE_THREAD),
)
def _collect_mixtures(run_dir: Path, inputs: Inputs) -> Facts:
    if not (found := read_arrays(run_dir / "logits.npz")):
        return {"comparators": {}}
    ids = read_arrays(ids_file(inputs))
    marked = read_family(marked_file(inputs))
    weights = {case: marked_weights(marked, ids[case][0], found[f"marked-{case}"][0]) for case in CASES}
    pairs = {
        "mixture-float64": logits_pair(read_family(mixture_file(inputs)), ids, found),
        "expert-weights": weights["text"],
        "expert-loads": joined(weights["same"], weights["one"]),
    }
    return {"comparators": save_pairs(run_dir, pairs, ("q4kd", "float64 forward over gguf"))}


def logits_pair(model: FamilyModel, ids: Mapping[str, Array], found: Mapping[str, Array]) -> tuple[Array, Array]:
    """Return logits of documents in one window and of a lone token, and what each is alone, at few places."""
    columns = seeded_columns(VOCAB, COLUMNS)
    documents = np.split(ids["text"][0], FIRSTS)
    exact = np.concatenate([family_logits(model, part) for part in (*documents, ids["one"][0])])
    ours = np.concatenate([found["mixture-text"][0], found["mixture-one"][0]])
    rows = rows_around(len(exact), *FIRSTS, others=ROWS)
    return ours[rows][:, columns], exact[rows][:, columns].astype(np.float32)


def marked_weights(model: FamilyModel, ids: Array, logits_TV: Array) -> tuple[Array, Array]:
    """Return the weight of every expert for a choice of tokens, ``[rows, E]``: from logits, and from the router itself.

    Attention adds nothing and norms weigh nothing, so that the layer reads normalised embeddings. Of expert e, logit e
    over the constant's is its weight times what it writes, over the constant.
    """
    state, normed = model.weights["token_embd.weight"][ids], normed_embeddings(model, ids)
    gate, up = (
        np.einsum("efh,th->tef", model.weights[f"blk.0.ffn_{part}_exps.weight"], normed) for part in ("gate", "up")
    )
    places = CONSTANT + 1 + np.arange(MARKED)
    down = model.weights["blk.0.ffn_down_exps.weight"][np.arange(MARKED), places]
    written = np.einsum("tef,ef->te", gate / (1 + np.exp(-gate)) * up, down)
    rows = rows_around(len(ids), others=ROWS)
    read = logits_TV[:, :MARKED] / logits_TV[:, MARKED : MARKED + 1] * state[:, CONSTANT, None] / written
    return read[rows].astype(np.float32), expert_weights(model, 0, normed)[rows]


def normed_embeddings(model: FamilyModel, ids: Array) -> Array:
    """Return what the experts of the marked mixture read of tokens: normalised embeddings, float64 ``[T, H]``."""
    state = model.weights["token_embd.weight"][ids]
    eps = float(model.settings["attention.layer_norm_rms_epsilon"])
    return np.asarray(state / np.sqrt(np.mean(state**2, axis=-1, keepdims=True) + eps))


def joined(*pairs: tuple[Array, Array]) -> tuple[Array, Array]:
    """Return one pair of the rows of several."""
    return np.concatenate([ours for ours, _ in pairs]), np.concatenate([exact for _, exact in pairs])
