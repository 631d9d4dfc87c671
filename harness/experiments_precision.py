"""Experiments on rounding: a forward pass in bfloat16 beside a dense model's."""

import functools
from pathlib import Path
from typing import Any

import numpy as np

from q4kd.harness.experiment import Arm, Experiment, Inputs, register
from q4kd.harness.experiments_teacher import demo_teacher, save_pairs
from q4kd.harness.reference import read_gguf, reference_logits

SEQUENCES, LENGTH, EVERY, COLUMNS = 64, 64, 4, 32

# --- bfloat16-errors, cuda-bfloat16-errors: logits of the demo teacher in bfloat16, packed and dense ---


def _ids(inputs: Inputs) -> Path:
    def make(path: Path) -> None:
        with path.open("wb") as file:
            np.save(file, np.random.default_rng(5).integers(0, 2048, (SEQUENCES, LENGTH)))

    return inputs.file("precision-ids.npy", make)


def _kept(logits_STV: Any) -> Any:
    """Return every fourth position and a seeded choice of columns: the evidence is kept for good."""
    columns = np.sort(np.random.default_rng(6).choice(logits_STV.shape[-1], COLUMNS, replace=False))
    return logits_STV[:, EVERY - 1 :: EVERY][:, :, columns]


def _exact(inputs: Inputs) -> Path:
    """Return float64 logits of every sequence, as kept, rounded to float32: 1e-7, far below bfloat16's 4e-3."""

    def make(path: Path) -> None:
        model = read_gguf(demo_teacher(inputs))
        exact = np.stack([reference_logits(model, ids) for ids in np.load(_ids(inputs), allow_pickle=False)])
        with path.open("wb") as file:
            np.save(file, _kept(exact).astype(np.float32))

    return inputs.file("precision-exact.npy", make)


def _packed_argv(device: str, inputs: Inputs) -> list[str]:
    words = ["logits", str(demo_teacher(inputs)), "--ids", str(_ids(inputs)), "--out", "logits.npy"]
    return [*words, "--device", device, "--dtype", "bfloat16", "--events", "events.jsonl"]


def _dense_argv(device: str, inputs: Inputs) -> list[str]:
    words = ["probe", "dense-logits", "--model", str(demo_teacher(inputs)), "--ids", str(_ids(inputs))]
    return [*words, "--device", device, "--out", "logits.npy"]


def _prepare_errors(inputs: Inputs) -> None:
    demo_teacher(inputs)
    _exact(inputs)


def _collect_errors(run_dir: Path, inputs: Inputs) -> dict[str, Any]:
    path = run_dir / "logits.npy"
    if not path.is_file():
        return {"comparators": {}}
    found = _kept(np.load(path, allow_pickle=False))
    path.unlink()  # 34 MB, of which what is judged is kept
    packed = run_dir.name.endswith(".packed")
    source = "q4kd logits, bfloat16" if packed else "transformers, dense bfloat16 by gguf.quants"
    pairs = {"float64": (found, np.load(_exact(inputs), allow_pickle=False))}
    return {"comparators": save_pairs(run_dir, pairs, (source, "float64 forward over gguf"))}


for _name, _device, _needs in (("bfloat16-errors", "cpu", ()), ("cuda-bfloat16-errors", "cuda", ("cuda",))):
    register(
        Experiment(
            name=_name,
            title=f"bfloat16 logits of the demo teacher on {_device}, packed and dense, against a float64 forward",
            needs=_needs,
            arms=(
                Arm("packed", functools.partial(_packed_argv, _device), timeout_s=180),
                Arm("dense", functools.partial(_dense_argv, _device), timeout_s=180),
            ),
            prepare=_prepare_errors,
            collect=_collect_errors,
            exclusive=bool(_needs),
        )
    )
