"""Experiments on a CUDA device: decoders, parity of the forward pass, memory and utilisation of a 7B-shaped teacher."""

import functools
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from q4kd.harness.experiment import Arm, Experiment, Inputs, register
from q4kd.harness.experiments_teacher import (
    GOLDEN_LOGITS,
    gguf_facts,
    golden_teacher,
    save_pairs,
)
from q4kd.harness.reference import read_gguf, reference_logits
from q4kd.harness.synthetic_models import random_matrix
from q4kd.trainer.formats import FORMATS
from q4kd.trainer.synthetic import write_large_teacher

_CUDA = ("cuda",)

# --- cuda-decode: every type's decoder on random rows ---


def _rows(inputs: Inputs) -> Path:
    def make(path: Path) -> None:
        rng = np.random.default_rng(9)
        arrays: dict[str, Any] = {name.lower(): random_matrix(rng, name, 37, 1024, 0.02) for name in FORMATS}
        with path.open("wb") as file:
            np.savez(file, **arrays)

    return inputs.file("cuda-rows.npz", make)


def _collect_decode(run_dir: Path, inputs: Inputs) -> dict[str, Any]:
    if not (run_dir / "decoded.npz").is_file():
        return {"comparators": {}}
    comparators: dict[str, Any] = {}
    with np.load(_rows(inputs)) as rows, np.load(run_dir / "decoded.npz") as decoded:
        for name in rows.files:
            exact = gguf.quants.dequantize(rows[name], gguf.GGMLQuantizationType[name.upper()])
            pair = {name: (decoded[name], exact.reshape(len(rows[name]), -1))}
            comparators |= save_pairs(run_dir, pair, ("decoder on the device", "gguf.quants"))
    return {"comparators": comparators}


register(
    Experiment(
        name="cuda-decode",
        title="every type's decoder on the device, float32, against gguf",
        needs=_CUDA,
        arms=(
            Arm(
                None,
                lambda inputs: ["probe", "cuda-decode", "--rows", str(_rows(inputs)), "--out", "decoded.npz"],
                timeout_s=180,
            ),
        ),
        prepare=lambda inputs: _rows(inputs) and None,
        collect=_collect_decode,
        exclusive=True,
    )
)


# --- cuda-parity: the golden teacher's logits on the device, in both dtypes ---


def _ids(inputs: Inputs) -> Path:
    def make(path: Path) -> None:
        with np.load(GOLDEN_LOGITS, allow_pickle=False) as arrays, path.open("wb") as file:
            np.save(file, arrays["ids"])

    return inputs.file("cuda-ids.npy", make)


def _parity_argv(dtype: str, inputs: Inputs) -> list[str]:
    words = ["logits", str(golden_teacher(inputs)), "--ids", str(_ids(inputs)), "--out", "logits.npy"]
    return [*words, "--device", "cuda", "--dtype", dtype, "--events", "events.jsonl"]


def _collect_parity(run_dir: Path, inputs: Inputs) -> dict[str, Any]:
    if not (run_dir / "logits.npy").is_file():
        return {"comparators": {}}
    exact = reference_logits(read_gguf(golden_teacher(inputs)), np.load(_ids(inputs))).astype(np.float32)
    pair = {"float64": (np.load(run_dir / "logits.npy", allow_pickle=False), exact)}
    return {"comparators": save_pairs(run_dir, pair, ("q4kd logits on the device", "float64 forward over gguf"))}


def _prepare_parity(inputs: Inputs) -> None:
    golden_teacher(inputs)
    _ids(inputs)


register(
    Experiment(
        name="cuda-parity",
        title="q4kd logits of the golden teacher on the device, against a float64 forward",
        needs=_CUDA,
        arms=tuple(
            Arm(dtype, functools.partial(_parity_argv, dtype), timeout_s=180) for dtype in ("float32", "bfloat16")
        ),
        prepare=_prepare_parity,
        collect=_collect_parity,
        exclusive=True,
    )
)


# --- cuda-hold and cuda-busy: a teacher in the shapes of Qwen2.5-7B ---


def teacher_7b(inputs: Inputs) -> Path:
    """Return a 7B-shaped Q4_K_M file with random weights, 4.4 GB."""
    make = functools.partial(write_large_teacher, layers=28, hidden=3584, ffn=18944, vocab=152064, kv_heads=8)
    return inputs.file("teacher-7b.gguf", make)


def _hold_ids(inputs: Inputs) -> Path:
    def make(path: Path) -> None:
        with path.open("wb") as file:
            np.save(file, np.random.default_rng(1).integers(0, 4096, (1, 192)))

    return inputs.file("hold-ids.npy", make)


def _hold_argv(inputs: Inputs) -> list[str]:
    model, ids = str(teacher_7b(inputs)), str(_hold_ids(inputs))
    return ["probe", "cuda-hold", "--model", model, "--ids", ids, "--seconds", "3"]


def _prepare_hold(inputs: Inputs) -> None:
    teacher_7b(inputs)
    _hold_ids(inputs)


register(
    Experiment(
        name="load-teacher-7b",
        title="a 7B-shaped Q4_K_M teacher loaded to the device and held, its memory by process",
        needs=_CUDA,
        arms=(Arm(None, _hold_argv, timeout_s=300, stall_s=120, interval_s=0.02),),
        prepare=_prepare_hold,
        collect=lambda _run_dir, inputs: gguf_facts(teacher_7b(inputs)),
        exclusive=True,
    )
)

register(
    Experiment(
        name="teacher-busy-7b",
        title="forward passes of 32 x 256 tokens through a 7B-shaped teacher, utilisation by process",
        needs=_CUDA,
        arms=(
            Arm(
                None,
                lambda inputs: ["probe", "cuda-busy", "--model", str(teacher_7b(inputs)), "--seconds", "6"],
                timeout_s=300,
                stall_s=120,
            ),
        ),
        prepare=lambda inputs: teacher_7b(inputs) and None,
        exclusive=True,
    )
)
