"""Experiments on a CUDA device: decoders, parity of the forward pass, memory and utilisation of a 7B-shaped teacher."""

import functools
from pathlib import Path

import gguf
import numpy as np

from q4kd.harness.inputs.arrays import Array, Arrays, arrays_input, random_ids, read_array, read_arrays, seeded_columns
from q4kd.harness.inputs.collect import Comparators, save_pairs
from q4kd.harness.inputs.command_lines import logits_words, probe_words
from q4kd.harness.inputs.demo import gguf_facts, golden_ids, golden_teacher, teacher_7b
from q4kd.harness.inputs.models.code_blocks import CODE_TYPES
from q4kd.harness.inputs.models.synthetic_models import MODELS, random_matrix
from q4kd.harness.inputs.models.synthetic_models import VOCAB as SMALL_VOCAB
from q4kd.harness.oracles.reference import read_gguf, reference_logits
from q4kd.harness.runs.experiment import Arm, Facts, Inputs, declare, experiment
from q4kd.harness.subjects.models.experiments import exact_logits, kept_logits, small_model, with_documents
from q4kd.trainer.bench.synthetic import write_large_teacher
from q4kd.trainer.formats.blocks.layout import FORMATS

_CUDA = ("cuda",)
COLUMNS, CODE_COLUMNS = 256, 64

# --- cuda-decode: every type's decoder on random rows ---


def _rows(inputs: Inputs) -> Path:
    def make() -> Arrays:
        rng = np.random.default_rng(9)
        return {name.lower(): random_matrix(rng, name, 13, 1024, 0.02) for name in FORMATS}

    return arrays_input(inputs, "cuda-rows.npz", make)


@experiment(
    "cuda-decode",
    "every type's decoder on the device, float32, against gguf",
    Arm(None, lambda inputs: probe_words("cuda-decode", rows=_rows(inputs), out="decoded.npz"), timeout_s=180),
    needs=_CUDA,
)
def _collect_decode(run_dir: Path, inputs: Inputs) -> Facts:
    decoded, comparators = read_arrays(run_dir / "decoded.npz"), Comparators()
    pairs: dict[str, tuple[Array, Array]] = {}
    for name, rows in read_arrays(_rows(inputs)).items() if decoded else ():
        exact = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[name.upper()])
        pairs[name] = decoded[name], exact.reshape(len(rows), -1)
    # Those of codes are one array, of which a seeded choice of columns is kept.
    codes = [pairs.pop(name.lower()) for name in CODE_TYPES if pairs]
    if codes:
        chosen = seeded_columns(1024, CODE_COLUMNS)
        subject, exact = (np.concatenate([pair[side] for pair in codes])[:, chosen] for side in (0, 1))
        pairs["codes"] = subject, exact
    for name, pair in pairs.items():
        comparators |= save_pairs(run_dir, {name: pair}, ("decoder on the device", "gguf.quants"))
    return {"comparators": comparators}


# --- cuda-parity: the golden teacher's logits on the device, in both dtypes ---


def _parity_argv(dtype: str, inputs: Inputs) -> list[str]:
    return logits_words(golden_teacher(inputs), golden_ids(inputs), "--device", "cuda", "--dtype", dtype)


@experiment(
    "cuda-parity",
    "q4kd logits of the golden teacher on the device, against a float64 forward",
    *(Arm(dtype, functools.partial(_parity_argv, dtype), timeout_s=180) for dtype in ("float32", "bfloat16")),
    needs=_CUDA,
)
def _collect_parity(run_dir: Path, inputs: Inputs) -> Facts:
    if not (run_dir / "logits.npy").is_file():
        return {"comparators": {}}
    exact = reference_logits(read_gguf(golden_teacher(inputs)), read_array(golden_ids(inputs))).astype(np.float32)
    # Every position and half of the columns are kept, since the evidence of sabotaged runs stays for good.
    columns = seeded_columns(exact.shape[1], COLUMNS)
    pair = {"float64": (read_array(run_dir / "logits.npy")[:, columns], exact[:, columns])}
    return {"comparators": save_pairs(run_dir, pair, ("q4kd logits on the device", "float64 forward over gguf"))}


# --- cuda-lengths: small models of every architecture beyond each size at which the forward pass changes its way ---

# 16 tokens are multiplied straight from the blocks; from 512 the next weight is decoded beside the product; up to 1,024
# a pass is replayed as a graph; 4,096 tokens go through the feed-forward at once. With documents there is no graph.
# Two graphs are kept, so a third length goes without. The large model's file is read in pieces of 8 MiB.
LENGTHS = {"few": (1, 13), "graph": (1, 600), "third": (1, 130), "again": (1, 600)}
LENGTHS |= {"documents": (2, 600), "many": (9, 600)}
LARGE_CASES = ("few", "graph", "third")


def _length_models(inputs: Inputs) -> dict[str, Path]:
    found = {name: small_model(inputs, name) for name in MODELS}
    return found | {"large": inputs.file("large-2.gguf", functools.partial(write_large_teacher, layers=2))}


def _lengths(inputs: Inputs) -> Path:
    def make() -> Arrays:
        rng = np.random.default_rng(17)
        ids: Arrays = {name: rng.integers(0, SMALL_VOCAB, shape) for name, shape in LENGTHS.items()}
        return ids | {"documents-starts": with_documents(ids["documents"], 37, 128, 450)}

    return arrays_input(inputs, "cuda-lengths.npz", make)


def _lengths_argv(dtype: str, inputs: Inputs) -> list[str]:
    words = probe_words("model-logits", ids=_lengths(inputs), out="logits.npz", device="cuda", dtype=dtype)
    return [*words, "--models", *map(str, _length_models(inputs).values())]


@experiment(
    "cuda-lengths",
    "logits of small models on the device, from 13 to 5,400 tokens and of several documents, against float64",
    *(Arm(dtype, functools.partial(_lengths_argv, dtype), timeout_s=300) for dtype in ("float32", "bfloat16")),
    needs=_CUDA,
)
def _collect_lengths(run_dir: Path, inputs: Inputs) -> Facts:
    found, ids, comparators = read_arrays(run_dir / "logits.npz"), read_arrays(_lengths(inputs)), Comparators()
    for name, path in _length_models(inputs).items() if found else ():
        cases = LARGE_CASES if name == "large" else tuple(LENGTHS)
        pair = {name: (kept_logits(found, path.stem, cases), exact_logits(read_gguf(path), ids, cases))}
        comparators |= save_pairs(run_dir, pair, ("the teacher on the device", "float64 forward over gguf"))
    return {"comparators": comparators}


# --- cuda-hold and cuda-busy: a teacher in the shapes of Qwen2.5-7B ---


def _hold_argv(inputs: Inputs) -> list[str]:
    ids = random_ids(inputs, "hold-ids.npy", 4096, (1, 192))
    return probe_words("cuda-hold", model=teacher_7b(inputs), ids=ids, seconds=3)


declare(
    "load-teacher-7b",
    "a 7B-shaped Q4_K_M teacher loaded to the device and held, its memory by process",
    Arm(None, _hold_argv, timeout_s=300, stall_s=120, interval_s=0.02),
    needs=_CUDA,
    collect=lambda _run_dir, inputs: gguf_facts(teacher_7b(inputs)),
    exclusive=True,
)

declare(
    "teacher-busy-7b",
    "forward passes of 32 x 256 tokens through a 7B-shaped teacher, utilisation by process",
    Arm(None, lambda inputs: probe_words("cuda-busy", model=teacher_7b(inputs), seconds=6), timeout_s=300, stall_s=120),
    needs=_CUDA,
    exclusive=True,
)
