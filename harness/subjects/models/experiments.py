"""Experiments on model files: every architecture and type, both containers, and what must be refused."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from q4kd.harness.inputs.arrays import Array, arrays_input, read_arrays, rows_around, seeded_columns
from q4kd.harness.inputs.collect import Comparators, collect_probe, save_pairs
from q4kd.harness.inputs.models.apr_write import Names, convert_gguf
from q4kd.harness.inputs.models.broken_apr import BROKEN_APR, write_broken_apr
from q4kd.harness.inputs.models.split_models import (
    BROKEN_SPLITS,
    ELSEWHERE,
    THREE,
    shards,
    write_broken_split,
    write_split,
)
from q4kd.harness.inputs.models.synthetic_families import FAMILIES, OTHERS, SCALINGS, WINDOWS, write_family_model
from q4kd.harness.inputs.models.synthetic_models import (
    BROKEN_GGUF,
    MODELS,
    VOCAB,
    model_ids,
    write_huge_norm,
    write_moved,
    write_nan_scale,
    write_small_model,
    write_truncated,
)
from q4kd.harness.oracles.families import family_logits, read_family
from q4kd.harness.oracles.reference import ReferenceModel, read_gguf, reference_logits
from q4kd.harness.runs.experiment import ONE_THREAD, Arm, Facts, Inputs, declare, experiment

# Longer than four blocks of attention, and no multiple of one; so is the vocabulary of a tile of the head.
POSITIONS, BLOCK, TILE = 600, 128, 1024
COLUMNS = 64
CASES = ("one", "documents")
# Evidence of sabotaged runs stays for good: of the families, few positions and columns are kept.
FAMILY_ROWS, FAMILY_COLUMNS = 8, 24
FAMILY_CLAIMS = {"windows": WINDOWS, "scalings": SCALINGS, "multipliers": OTHERS}
# These models also exist as .apr, with the tensor names of that convention.
APR_NAMES: dict[str, Names] = {"qwen2": "huggingface", "mistral": "gguf"}

# --- model-files: logits of every architecture from GGUF, and of two from .apr as well ---


def small_model(inputs: Inputs, name: str) -> Path:
    """Return one of the small models, made once."""
    return inputs.file(f"models/{name}.gguf", functools.partial(write_small_model, model=MODELS[name]))


def small_apr(inputs: Inputs, name: str) -> Path:
    """Return the same model as .apr."""
    source = small_model(inputs, name)
    # The suffix says GGUF, since a container is recognised by its content.
    return inputs.file(f"models/{name}-apr.gguf", lambda path: convert_gguf(source, path, names=APR_NAMES[name]))


def _ids(inputs: Inputs) -> Path:
    ids = model_ids(POSITIONS)[None]
    cases = {"one": ids, "documents": ids, "documents-starts": with_documents(ids, 37, 128, 450)}
    return arrays_input(inputs, "models/ids.npz", lambda: cases)


def _files(inputs: Inputs) -> dict[str, Path]:
    found = {name: small_model(inputs, name) for name in MODELS}
    return found | {f"{name}-apr": small_apr(inputs, name) for name in APR_NAMES}


def family_model(inputs: Inputs, name: str) -> Path:
    """Return one of the small models of the dense families, made once."""
    make = functools.partial(write_family_model, model=FAMILIES[name])
    return inputs.file(f"models/family-{name}.gguf", make)


def _models_argv(inputs: Inputs) -> list[str]:
    paths = [str(path) for path in (*_files(inputs).values(), *(family_model(inputs, name) for name in FAMILIES))]
    return ["probe", "model-logits", "--ids", str(_ids(inputs)), "--out", "logits.npz", "--models", *paths]


def _kept(logits_TV: Array) -> Array:
    """Return the rows of logits around the edges of blocks, and a seeded choice of columns on both sides of a tile."""
    rows = rows_around(len(logits_TV), *range(BLOCK, len(logits_TV), BLOCK), others=16)
    last = TILE + seeded_columns(logits_TV.shape[1] - TILE, COLUMNS // 4)
    return np.asarray(logits_TV[rows][:, np.concatenate([seeded_columns(TILE, COLUMNS - len(last)), last])])


def kept_logits(found: Mapping[str, Array], model: str, cases: Iterable[str]) -> Array:
    """Return what is judged of a probe's logits of a model: of every case's first and last sequence."""
    sequences = [sequence for case in cases for sequence in _ends(found[f"{model}-{case}"])]
    return np.concatenate([_kept(sequence) for sequence in sequences])


def exact_logits(model: ReferenceModel, ids: Mapping[str, Array], cases: Iterable[str]) -> Array:
    """Return the same of a float64 forward pass over each document alone, as float32."""
    kept = []
    for case in cases:
        starts = _ends(ids.get(f"{case}-starts", np.zeros_like(ids[case])))
        for sequence, first in zip(_ends(ids[case]), starts, strict=True):
            documents = np.split(sequence, np.flatnonzero(np.diff(first)) + 1)
            kept.append(_kept(np.concatenate([reference_logits(model, part) for part in documents])))
    return np.concatenate(kept).astype(np.float32)


def _ends(sequences: Array) -> list[Array]:
    return [sequences[index] for index in sorted({0, len(sequences) - 1})]


def with_documents(ids_BT: Array, *firsts: int) -> Array:
    """Return the starts of sequences of which further documents begin at ``firsts``, int64 ``[B, T]``."""
    starts = np.zeros(ids_BT.shape, np.int64)
    for first in firsts:
        starts[:, first:] = first
    return starts


@experiment(
    "model-files",
    "logits of small models of every architecture and type against float64; two of them also as .apr",
    Arm(None, _models_argv, timeout_s=120, env=ONE_THREAD),
)
def _collect_models(run_dir: Path, inputs: Inputs) -> Facts:
    if not (found := read_arrays(run_dir / "logits.npz")):
        return {"comparators": {}}
    logits = {name: kept_logits(found, path.stem, CASES) for name, path in _files(inputs).items()}
    ids = read_arrays(_ids(inputs))
    comparators: Comparators = {}
    for name in MODELS:
        pair = {f"{name}-float64": (logits[name], exact_logits(read_gguf(small_model(inputs, name)), ids, CASES))}
        comparators |= save_pairs(run_dir, pair, (f"q4kd, {name}", "float64 forward over gguf"))
    for claim, names in FAMILY_CLAIMS.items():
        pair = {f"{claim}-float64": _family_pair(found, inputs, ids, names)}
        comparators |= save_pairs(run_dir, pair, (f"q4kd, {claim}", "float64 forward over gguf"))
    for name in APR_NAMES:
        pair = {f"{name}-apr": (logits[f"{name}-apr"], logits[name])}
        comparators |= save_pairs(run_dir, pair, (f"q4kd, {name} as .apr", f"q4kd, {name} as GGUF"))
    return {"comparators": comparators}


def _family_pair(
    found: Mapping[str, Array], inputs: Inputs, ids: Mapping[str, Array], names: Iterable[str]
) -> tuple[Array, Array]:
    """Return logits of families, of packed documents, and what they are, at few positions and columns."""
    ours, exact = [], []
    columns = seeded_columns(VOCAB, FAMILY_COLUMNS)
    for name in names:
        model = read_family(family_model(inputs, name))
        documents = np.split(ids["documents"][0], np.flatnonzero(np.diff(ids["documents-starts"][0])) + 1)
        alone = np.concatenate([family_logits(model, part) for part in documents])
        rows = rows_around(len(alone), *range(BLOCK, len(alone), BLOCK), others=FAMILY_ROWS)
        ours.append(found[f"family-{name}-documents"][0][rows][:, columns])
        exact.append(alone[rows][:, columns].astype(np.float32))
    return np.concatenate(ours), np.concatenate(exact)


# --- refused-models: files that must be refused, each beside its valid twin ---


def _cases(inputs: Inputs) -> list[tuple[str, Path, Path]]:
    """Return (case, invalid file, valid twin), making the files."""
    llama = dataclasses.replace(MODELS["mistral"], sliding_window=None)
    twin = small_model(inputs, "mistral")
    found: list[tuple[str, Path, Path]] = []

    def add(case: str, file: str, make: Callable[[Path], object], valid: Path) -> None:
        found.append((case, inputs.file(f"models/broken/{file}", make), valid))

    for case, change in BROKEN_GGUF.items():
        plain = functools.partial(write_small_model, model=llama, change=change)
        add(case, f"{case.replace(' ', '-')}.gguf", plain, twin)
    add("truncated", "truncated.gguf", functools.partial(write_truncated, source=twin), twin)
    # Both would load: attn_q and attn_output of this layer have one type and shape, and ffn_up is F16.
    query, up = "blk.1.attn_q.weight", "blk.1.ffn_up.weight"
    overlap = functools.partial(write_moved, source=twin, name="blk.1.attn_output.weight", to=query)
    add("overlapping tensors", "overlapping.gguf", overlap, twin)
    add("shifted tensor", "shifted.gguf", functools.partial(write_moved, source=twin, name=up, to=up, by=32), twin)
    add("NaN scale", "nan-scale.gguf", functools.partial(write_nan_scale, source=twin), twin)
    add("huge norm", "huge-norm.gguf", functools.partial(write_huge_norm, source=twin), twin)
    add("a folder", "folder.gguf", lambda path: path.mkdir(), twin)
    whole = small_model(inputs, "llama3")
    split, elsewhere = (
        inputs.file(f"models/split-{tensors}", functools.partial(write_split, source=whole, tensors=tensors))
        for tensors in (THREE, ELSEWHERE)
    )
    for case in BROKEN_SPLITS:
        broken = functools.partial(write_broken_split, split=split, elsewhere=elsewhere, case=case)
        folder = inputs.file(f"models/broken/split-{case.replace(' ', '-')}", broken)
        found.append((f"split: {case}", shards(folder)[0], shards(split)[1]))
    apr = small_apr(inputs, "qwen2")
    for case in BROKEN_APR:
        make = functools.partial(write_broken_apr, source=apr, case=case)
        add(f"apr: {case}", f"{case.replace(' ', '-')}.apr", make, apr)
    return found


def _refused_argv(inputs: Inputs) -> list[str]:
    words = [word for case, bad, good in _cases(inputs) for word in (case, str(bad), str(good))]
    return ["probe", "open-models", "--out", "probe.json", "--cases", *words]


declare(
    "refused-models",
    "GGUF and .apr files that would be silently wrong, each beside its valid twin",
    Arm(None, _refused_argv, timeout_s=120, env=ONE_THREAD),
    collect=collect_probe,
)
