"""The experiments on gpt-oss: logits of it whole, and of its two parts alone; and files of it that must be refused."""

import functools
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from q4kd.harness.inputs.arrays import Array, arrays_input, read_arrays, rows_around, seeded_columns
from q4kd.harness.inputs.collect import collect_probe, save_pairs
from q4kd.harness.inputs.models.synthetic_gpt_oss import BROKEN, PARTS, write_gpt_oss
from q4kd.harness.inputs.models.synthetic_mixtures import VOCAB
from q4kd.harness.oracles.families import read_family
from q4kd.harness.oracles.gpt_oss import gpt_oss_logits
from q4kd.harness.runs.experiment import ONE_THREAD, Arm, Facts, Inputs, declare, experiment

# A text; documents of it in one window, longer than a block of attention and than a sliding window; one token again
# and again, all given to the same experts; and one token alone.
POSITIONS, FIRSTS = 320, (37, 128, 250)
ROWS, COLUMNS = 16, 24


def _model(inputs: Inputs, part: str) -> Path:
    return inputs.file(f"models/gpt-oss-{part}.gguf", functools.partial(write_gpt_oss, part=part))


def _ids(inputs: Inputs) -> Path:
    text = np.random.default_rng(13).integers(0, VOCAB, (1, POSITIONS))
    starts = np.zeros_like(text)
    for first in FIRSTS:
        starts[:, first:] = first
    same = np.full((1, POSITIONS // 2), 11)
    cases = {"text": text, "text-starts": starts, "same": same, "one": np.full((1, 1), 23)}
    return arrays_input(inputs, "models/gpt-oss-ids.npz", lambda: cases)


def _argv(inputs: Inputs) -> list[str]:
    models = [str(_model(inputs, part)) for part in PARTS]
    return ["probe", "model-logits", "--ids", str(_ids(inputs)), "--out", "logits.npz", "--models", *models]


@experiment(
    "gpt-oss",
    "logits of a packed gpt-oss, and of its attention and its experts alone, against float64",
    Arm(None, _argv, timeout_s=60, env=ONE_THREAD),
)
def _collect(run_dir: Path, inputs: Inputs) -> Facts:
    if not (found := read_arrays(run_dir / "logits.npz")):
        return {"comparators": {}}
    ids = read_arrays(_ids(inputs))
    pairs = {f"gpt-oss-{part}": _pair(part, _model(inputs, part), ids, found) for part in PARTS}
    return {"comparators": save_pairs(run_dir, pairs, ("q4kd", "float64 forward over gguf"))}


def _pair(part: str, path: Path, ids: Mapping[str, Array], found: Mapping[str, Array]) -> tuple[Array, Array]:
    """Return logits of documents in one window, of a repeated token and of a lone one, and what each is alone."""
    model, columns = read_family(path), seeded_columns(VOCAB, COLUMNS)
    documents = [*np.split(ids["text"][0], FIRSTS), ids["same"][0], ids["one"][0]]
    exact = np.concatenate([gpt_oss_logits(model, document) for document in documents])
    ours = np.concatenate([found[f"gpt-oss-{part}-{case}"][0] for case in ("text", "same", "one")])
    rows = rows_around(len(exact), *FIRSTS, POSITIONS, others=ROWS)
    return ours[rows][:, columns], exact[rows][:, columns].astype(np.float32)


def _refused_argv(inputs: Inputs) -> list[str]:
    words = []
    for case in BROKEN:
        make = functools.partial(write_gpt_oss, broken=case)
        bad = inputs.file(f"models/broken/gpt-oss-{case.replace(' ', '-')}.gguf", make)
        words += [case, str(bad), str(_model(inputs, "whole"))]
    return ["probe", "open-models", "--out", "probe.json", "--cases", *words]


declare(
    "gpt-oss-refused",
    "gpt-oss files that would be silently wrong, each beside its valid twin",
    Arm(None, _refused_argv, timeout_s=60, env=ONE_THREAD),
    collect=collect_probe,
)
