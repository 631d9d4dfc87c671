"""The experiments on hybrid decoders: logits of two, and the delta rule by itself, token by token."""

import functools
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from q4kd.harness.inputs.arrays import Array, Arrays, arrays_input, read_arrays, rows_around, seeded_columns
from q4kd.harness.inputs.collect import save_pairs
from q4kd.harness.inputs.command_lines import probe_words
from q4kd.harness.inputs.models.synthetic_hybrids import HYBRIDS, VOCAB, write_hybrid_model
from q4kd.harness.oracles.delta_net import recurrence
from q4kd.harness.oracles.families import family_logits, read_family
from q4kd.harness.runs.experiment import ONE_THREAD, Arm, Facts, Inputs, experiment
from q4kd.harness.subjects.hybrids.probes import AT_ONCE

# Chunks have 64 positions. Documents begin within one, at its last position, at its first, and right behind that.
CHUNK, POSITIONS, FIRSTS = 64, 330, (37, 127, 192, 193, 250)
ROWS, COLUMNS = 24, 24


def hybrid_model(inputs: Inputs, name: str) -> Path:
    """Return one of the small hybrid decoders, made once."""
    return inputs.file(f"models/hybrid-{name}.gguf", functools.partial(write_hybrid_model, architecture=name))


def _ids(inputs: Inputs) -> Path:
    text = np.random.default_rng(8).integers(0, VOCAB, (1, POSITIONS))
    cases = {"text": text, "packed": text, "packed-starts": _starts(1)}
    return arrays_input(inputs, "models/hybrid-ids.npz", lambda: cases)


def _starts(rows: int) -> Array:
    starts = np.zeros((rows, POSITIONS), np.int64)
    for first in FIRSTS:
        starts[:, first:] = first
    return starts


def _argv(inputs: Inputs) -> list[str]:
    models = [str(hybrid_model(inputs, name)) for name in HYBRIDS]
    return ["probe", "model-logits", "--ids", str(_ids(inputs)), "--out", "logits.npz", "--models", *models]


@experiment(
    "hybrids",
    "logits of packed hybrid decoders, a text alone and as several documents of one window, against float64",
    Arm(None, _argv, timeout_s=60, env=ONE_THREAD),
)
def _collect_hybrids(run_dir: Path, inputs: Inputs) -> Facts:
    if not (found := read_arrays(run_dir / "logits.npz")):
        return {"comparators": {}}
    ids = read_arrays(_ids(inputs))["text"][0]
    models = {name: (hybrid_model(inputs, name), read_family(hybrid_model(inputs, name))) for name in HYBRIDS}
    texts, packed = [], []
    for path, model in models.values():
        texts.append((found[f"{path.stem}-text"][0], family_logits(model, ids)))
        alone = [family_logits(model, part) for part in np.split(ids, FIRSTS)]
        packed.append((found[f"{path.stem}-packed"][0], np.concatenate(alone)))
    pairs = {"hybrid-text": _kept(texts), "hybrid-documents": _kept(packed)}
    return {"comparators": save_pairs(run_dir, pairs, ("q4kd", "float64 forward, token by token"))}


def _kept(pairs: list[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Return few logits of pairs of ours and exact ones: around edges of chunks and documents, and seeded."""
    rows = rows_around(POSITIONS, *range(CHUNK, POSITIONS, CHUNK), *FIRSTS, others=ROWS)
    columns = seeded_columns(VOCAB, COLUMNS)
    ours, exact = (np.concatenate([pair[side][rows][:, columns] for pair in pairs]) for side in (0, 1))
    return ours, exact.astype(np.float32)


# Sequences, key heads, value heads and head size of each case, and whether it holds several documents.
CASES: dict[str, tuple[tuple[int, int, int, int], bool]] = {
    "text": ((1, 2, 4, 32), False),
    "documents": ((2, 1, 3, 16), True),
}


def _make() -> Arrays:
    """Keys that resemble each other, so that corrections depend on many before them, and decays of every size."""
    rng = np.random.default_rng(31)
    arrays: Arrays = {}
    for name, ((batch, keys, values, size), has_documents) in CASES.items():
        for part, heads, mean in (("q", keys, 0.0), ("k", keys, 0.7), ("v", values, 0.0)):
            arrays[f"{name}-{part}"] = rng.normal(mean, 1, (batch, POSITIONS, heads, size)).astype(np.float32)
        decay = -rng.uniform(0, 1, (batch, POSITIONS, values)) * np.geomspace(1e-3, 1, values)
        # Now and then a token makes a head forget everything, beside tokens that make it forget nearly nothing.
        forgets = rng.uniform(0, 1, decay.shape) < 0.02
        arrays[f"{name}-decay"] = np.where(forgets, -30_000, decay).astype(np.float32)
        arrays[f"{name}-strength"] = rng.uniform(0.1, 1, decay.shape).astype(np.float32)
        if has_documents:
            arrays[f"{name}-starts"] = _starts(batch)
    return arrays


def _given(inputs: Inputs) -> Path:
    return arrays_input(inputs, "delta-rule.npz", _make)


@experiment(
    "delta-rule",
    "the gated delta rule by chunks, over decays of every size, against the recurrence token by token in float64",
    Arm(None, lambda inputs: probe_words("delta-rule", given=_given(inputs), out="read.npz"), env=ONE_THREAD),
)
def _collect_delta_rule(run_dir: Path, inputs: Inputs) -> Facts:
    if not (found := read_arrays(run_dir / "read.npz")):
        return {"comparators": {}}
    given = read_arrays(_given(inputs))
    exact = {name: _exact(given, name) for name in CASES}
    rows = rows_around(POSITIONS, *range(CHUNK, POSITIONS, CHUNK), *FIRSTS, others=3 * ROWS)
    pairs = {}
    for count in AT_ONCE:
        ours = [found[f"{name}-{count}"] for name in CASES]
        kept = [
            tuple(side[:, rows][:, :, seeded_columns(side.shape[2], COLUMNS)].reshape(-1, COLUMNS) for side in pair)
            for pair in zip(ours, exact.values(), strict=True)
        ]
        subject, reference = (np.concatenate([pair[side] for pair in kept]) for side in (0, 1))
        pairs[f"{count}-at-once"] = (subject, reference.astype(np.float32))
    sources = ("the teacher's delta rule", "float64 recurrence of the harness")
    return {"comparators": save_pairs(run_dir, pairs, sources)}


def _exact(given: Mapping[str, Array], name: str) -> Array:
    """Return what each document's queries read of its own states, float64 ``[B, T, V * D]``."""
    (batch, keys, values, _), has_documents = CASES[name]
    parts = {part: given[f"{name}-{part}"].astype(np.float64) for part in ("q", "k", "v", "decay", "strength")}
    read = np.empty_like(parts["v"])
    for row in range(batch):
        for document in np.split(np.arange(POSITIONS), FIRSTS if has_documents else []):
            for head in range(values):
                key = head % keys
                read[row, document, head] = recurrence(
                    parts["q"][row, document, key],
                    parts["k"][row, document, key],
                    parts["v"][row, document, head],
                    np.exp(parts["decay"][row, document, head]),
                    parts["strength"][row, document, head],
                )
    return read.reshape(batch, POSITIONS, -1)
