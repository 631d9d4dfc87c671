"""The experiment on Gemma 4: logits of a dense model and of a mixture, against float64."""

import functools
from pathlib import Path

import numpy as np

from q4kd.harness.inputs.arrays import Array, Arrays, arrays_input, read_arrays, rows_around, seeded_columns
from q4kd.harness.inputs.collect import save_pairs
from q4kd.harness.inputs.models.synthetic_gemma4 import VOCAB, write_gemma4_model
from q4kd.harness.oracles.families import read_family
from q4kd.harness.oracles.gemma4 import gemma4_logits
from q4kd.harness.runs.experiment import ONE_THREAD, Arm, Facts, Inputs, experiment

# Documents shorter and longer than the window of 40, and a token alone.
POSITIONS, FIRSTS = 320, (37, 128, 250)
ROWS, COLUMNS = 24, 24
MODELS = {"gemma4": False, "gemma4-mixture": True}


def _model(inputs: Inputs, name: str) -> Path:
    return inputs.file(f"models/{name}.gguf", functools.partial(write_gemma4_model, mixture=MODELS[name]))


def _ids(inputs: Inputs) -> Path:
    def make() -> Arrays:
        text = np.random.default_rng(11).integers(0, VOCAB, (1, POSITIONS))
        starts = np.zeros_like(text)
        for first in FIRSTS:
            starts[:, first:] = first
        return {"text": text, "text-starts": starts, "one": np.full((1, 1), 23)}

    return arrays_input(inputs, "models/gemma4-ids.npz", make)


def _argv(inputs: Inputs) -> list[str]:
    models = [str(_model(inputs, name)) for name in MODELS]
    return ["probe", "model-logits", "--ids", str(_ids(inputs)), "--out", "logits.npz", "--models", *models]


@experiment(
    "gemma4",
    "logits of a packed Gemma 4, dense and a mixture, against float64: four documents in one window, one token alone",
    Arm(None, _argv, timeout_s=60, env=ONE_THREAD),
)
def _collect_gemma4(run_dir: Path, inputs: Inputs) -> Facts:
    if not (found := read_arrays(run_dir / "logits.npz")):
        return {"comparators": {}}
    pairs = {f"{name}-float64": _pair(inputs, name, found) for name in MODELS}
    return {"comparators": save_pairs(run_dir, pairs, ("q4kd", "float64 forward over gguf"))}


def _pair(inputs: Inputs, name: str, found: Arrays) -> tuple[Array, Array]:
    """Return logits of documents in one window and of a lone token, and what each is alone, at few places."""
    model, ids, columns = read_family(_model(inputs, name)), read_arrays(_ids(inputs)), seeded_columns(VOCAB, COLUMNS)
    documents = np.split(ids["text"][0], FIRSTS)
    exact = np.concatenate([gemma4_logits(model, part) for part in (*documents, ids["one"][0])])
    ours = np.concatenate([found[f"{name}-text"][0], found[f"{name}-one"][0]])
    rows = rows_around(len(exact), *FIRSTS, others=ROWS)
    return ours[rows][:, columns], exact[rows][:, columns].astype(np.float32)
