"""The experiment on attention alone: both ways the CPU computes it, beyond every size of its blocks."""

from pathlib import Path

import numpy as np

from q4kd.harness.inputs.arrays import Array, Arrays, arrays_input, read_arrays, rows_around, seeded_columns
from q4kd.harness.inputs.collect import save_pairs
from q4kd.harness.inputs.command_lines import probe_words
from q4kd.harness.oracles.reference import reference_attention
from q4kd.harness.runs.experiment import ONE_THREAD, Arm, Facts, Inputs, experiment
from q4kd.harness.subjects.teacher.probes_attention import WAYS

# Sequences, query heads, key-value heads, positions and head size of each case, and the first positions of further
# documents in each sequence. A block has 128 queries, and 109 of 64 heads at 601 positions, since scores are bounded.
CASES: dict[str, tuple[tuple[int, int, int, int, int], tuple[tuple[int, ...], ...]]] = {
    "documents": ((2, 6, 2, 600, 16), ((1, 127, 128, 300, 511), (129, 256, 599))),
    "one-document": ((1, 6, 3, 600, 16), ()),
    "many-heads": ((1, 64, 1, 601, 8), ((108, 109, 400),)),
    "two-blocks": ((1, 4, 2, 257, 16), ((255,),)),
}
BLOCKS, COLUMNS = (109, 128), 8


def _make() -> Arrays:
    rng = np.random.default_rng(21)
    arrays: Arrays = {}
    for name, ((batch, heads, kv_heads, length, size), documents) in CASES.items():
        for part, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            arrays[f"{name}-{part}"] = rng.normal(0, 1.2, (batch, count, length, size)).astype(np.float32)
        if documents:
            starts = np.zeros((batch, length), np.int64)
            for row, firsts in enumerate(documents):
                for first in firsts:
                    starts[row, first:] = first
            arrays[f"{name}-starts"] = starts
    return arrays


def _given(inputs: Inputs) -> Path:
    return arrays_input(inputs, "attention.npz", _make)


def _kept(mixed_BTX: Array) -> Array:
    """Return the rows around the edges of blocks and documents, and a seeded choice of the heads' elements."""
    _, length, width = mixed_BTX.shape
    edges = [edge for block in BLOCKS for edge in range(block, length, block)]
    rows = rows_around(length, *edges, 300, 400, others=16)
    return mixed_BTX[:, rows][:, :, seeded_columns(width, COLUMNS)].reshape(-1, COLUMNS)


@experiment(
    "attention",
    "causal attention on the CPU, whole and by blocks, of documents longer than several blocks, against float64",
    Arm(None, lambda inputs: probe_words("attention", given=_given(inputs), out="mixed.npz"), env=ONE_THREAD),
)
def _collect_attention(run_dir: Path, inputs: Inputs) -> Facts:
    if not (found := read_arrays(run_dir / "mixed.npz")):
        return {"comparators": {}}
    given, exact = read_arrays(_given(inputs)), []
    for name, ((batch, _, _, length, _), _) in CASES.items():
        q, k, v = (given[f"{name}-{part}"].astype(np.float64) for part in "qkv")
        starts = given.get(f"{name}-starts", np.zeros((batch, length), np.int64))
        mixed = [reference_attention(q[row], k[row], v[row], starts[row]) for row in range(batch)]
        exact.append(_kept(np.stack(mixed).reshape(batch, length, -1)))
    reference = np.concatenate(exact).astype(np.float32)
    pairs = {way: (np.concatenate([_kept(found[f"{name}-{way}"]) for name in CASES]), reference) for way in WAYS}
    sources = ("the teacher's attention on the CPU", "float64 attention of the harness")
    return {"comparators": save_pairs(run_dir, pairs, sources)}
