"""Experiments on rounding: a pass in bfloat16 beside a dense model's, and passes of several sizes beside each other."""

import functools
from pathlib import Path

import numpy as np

from q4kd.harness.inputs.arrays import Array, array_input, random_ids, read_array, read_arrays, seeded_columns
from q4kd.harness.inputs.collect import Comparators, arm_of, save_pairs
from q4kd.harness.inputs.command_lines import logits_words, probe_words
from q4kd.harness.inputs.demo import VOCAB, demo_teacher
from q4kd.harness.oracles.reference import read_gguf, reference_logits
from q4kd.harness.runs.experiment import Arm, Facts, Inputs, declare, experiment
from q4kd.harness.subjects.precision.probes import ALL, TOGETHER, WAYS

SEQUENCES, LENGTH, EVERY, COLUMNS = 64, 64, 4, 32

# --- bfloat16-errors, cuda-bfloat16-errors: logits of the demo teacher in bfloat16, packed and dense ---


def _ids(inputs: Inputs) -> Path:
    return random_ids(inputs, "precision-ids.npy", VOCAB, (SEQUENCES, LENGTH), seed=5)


def _kept(logits_STV: Array) -> Array:
    """Return every fourth position and a seeded choice of columns, since the evidence is kept for good."""
    return logits_STV[:, EVERY - 1 :: EVERY][:, :, seeded_columns(logits_STV.shape[-1], COLUMNS, seed=6)]


def _exact(inputs: Inputs) -> Path:
    """Return the kept float64 logits of every sequence, rounded to float32 (1e-7, far below bfloat16's 4e-3)."""

    def make() -> Array:
        model = read_gguf(demo_teacher(inputs))
        exact = np.stack([reference_logits(model, ids) for ids in read_array(_ids(inputs))])
        return _kept(exact).astype(np.float32)

    return array_input(inputs, "precision-exact.npy", make)


def _packed_argv(device: str, inputs: Inputs) -> list[str]:
    return logits_words(demo_teacher(inputs), _ids(inputs), "--device", device, "--dtype", "bfloat16")


def _dense_argv(device: str, inputs: Inputs) -> list[str]:
    return probe_words("dense-logits", model=demo_teacher(inputs), ids=_ids(inputs), device=device, out="logits.npy")


def _collect_errors(run_dir: Path, inputs: Inputs) -> Facts:
    path = run_dir / "logits.npy"
    if not path.is_file():
        return {"comparators": {}}
    found = _kept(read_array(path))
    path.unlink()  # it has 34 MB, of which what is judged is kept
    dense = "transformers, dense bfloat16 by gguf.quants"
    source = "q4kd logits, bfloat16" if arm_of(run_dir) == "packed" else dense
    pairs = {"float64": (found, read_array(_exact(inputs)))}
    return {"comparators": save_pairs(run_dir, pairs, (source, "float64 forward over gguf"))}


for _name, _device, _needs in (("bfloat16-errors", "cpu", ()), ("cuda-bfloat16-errors", "cuda", ("cuda",))):
    declare(
        _name,
        f"bfloat16 logits of the demo teacher on {_device}, packed and dense, against a float64 forward",
        Arm("packed", functools.partial(_packed_argv, _device), timeout_s=180),
        Arm("dense", functools.partial(_dense_argv, _device), timeout_s=180),
        needs=_needs,
        prepare=_exact,
        collect=_collect_errors,
    )


# --- passes: the same sequences in passes of several sizes and with several numbers of threads ---


def _passes_argv(inputs: Inputs) -> list[str]:
    ids = random_ids(inputs, "passes-ids.npy", VOCAB, (TOGETHER, ALL), seed=8)
    return probe_words("passes", model=demo_teacher(inputs), ids=ids, out="passes.npz")


@experiment(
    "passes",
    "logits of the same sequences on the CPU, computed in passes of several sizes, in both dtypes",
    Arm(None, _passes_argv, timeout_s=120),
)
def _collect_passes(run_dir: Path, _inputs: Inputs) -> Facts:
    logits, comparators = read_arrays(run_dir / "passes.npz"), Comparators()
    first, *others = WAYS
    for dtype in ("float32", "bfloat16") if logits else ():
        alone = logits[f"{dtype}-{first}"].astype(np.float64)
        distances = np.concatenate([distance(logits[f"{dtype}-{way}"], alone).ravel() for way in others])
        # Every row of every pass is judged by its distance alone: two passes may well agree to the last bit.
        pair = {dtype: (distances[:, None], np.zeros((len(distances), 1)))}
        sources = (f"distance of {dtype} logits in a pass from those in another", "no distance")
        comparators |= save_pairs(run_dir, pair, sources)
    return {"comparators": comparators}


def distance(logits_STV: Array, other_STV: Array) -> Array:
    """Return ``‖a - b‖ / ‖b‖`` of each position that ``logits_STV`` has, ``[S, T]``."""
    other_STV = other_STV[:, : logits_STV.shape[1]]
    found: Array = np.linalg.norm(logits_STV - other_STV, axis=-1) / np.linalg.norm(other_STV, axis=-1)
    return found
