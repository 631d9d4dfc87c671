"""Experiments on rounding: a forward pass in bfloat16 beside a dense model's, and products on the device."""

import functools
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from q4kd.harness.experiment import Arm, Experiment, Inputs, register
from q4kd.harness.experiments_teacher import demo_teacher, save_pairs
from q4kd.harness.probes_precision import FUSED_TOKENS
from q4kd.harness.reference import read_gguf, reference_logits
from q4kd.harness.synthetic_models import random_matrix

SEQUENCES, LENGTH, EVERY, COLUMNS = 64, 64, 4, 32
_SOURCES = ("q4kd.harness.probes_precision", "q4kd.harness.reference")

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
            sources=_SOURCES,
        )
    )


# --- cuda-products: every way in which a forward pass multiplies, on random blocks ---

TOKENS = 16 + 64
# Rows and columns: one row tile a block, and four of them (plans.MANY_ROWS).
SHAPES = ((517, 3584), (8209, 512))
PRODUCT_COLUMNS = 256


def _operands(inputs: Inputs) -> Path:
    def make(path: Path) -> None:
        with path.open("wb") as file:
            np.savez(file, **make_operands())

    return inputs.file("cuda-operands.npz", make)


def make_operands() -> dict[str, Any]:
    """Return packed matrices ``<type>-<rows>`` and activations ``x-<cols>``, bfloat16 as uint16 ``[TOKENS, K]``."""
    rng = np.random.default_rng(12)
    operands: dict[str, Any] = {}
    for rows, cols in SHAPES:
        for name in ("Q4_K", "Q6_K"):
            operands[f"{name.lower()}-{rows}"] = random_matrix(rng, name, rows, cols, 0.02)
        x = rng.standard_normal((TOKENS, cols)).astype(np.float32)
        # A sum far from zero: minimums and offsets must cancel exactly. Through bfloat16 they cannot.
        x[: FUSED_TOKENS[-1], 0] = 30.0
        operands[f"x-{cols}"] = (x.view(np.uint32) >> 16).astype(np.uint16)
    return operands


def exact_products(operands: dict[str, Any]) -> dict[str, Any]:
    """Return what ``multiply_all`` must give, by float64 products over gguf's decoding."""
    exact: dict[str, Any] = {}
    for name in [name for name in operands if not name.startswith("x-")]:
        kind = gguf.GGMLQuantizationType[name.partition("-")[0].upper()]
        weight = gguf.quants.dequantize(operands[name], kind).reshape(len(operands[name]), -1).astype(np.float64)
        x = (operands[f"x-{weight.shape[1]}"].astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        product = x @ weight.T
        exact[f"{name}-fused"] = np.concatenate([product[:tokens] for tokens in FUSED_TOKENS])
        exact[f"{name}-decoded"] = product[FUSED_TOKENS[-1] :]
    return exact


def _products_argv(inputs: Inputs) -> list[str]:
    return ["probe", "cuda-products", "--operands", str(_operands(inputs)), "--out", "products.npz"]


def _collect_products(run_dir: Path, inputs: Inputs) -> dict[str, Any]:
    if not (run_dir / "products.npz").is_file():
        return {"comparators": {}}
    with np.load(_operands(inputs), allow_pickle=False) as operands:
        exact = exact_products(dict(operands))
    comparators: dict[str, Any] = {}
    with np.load(run_dir / "products.npz", allow_pickle=False) as found:
        for name, wanted in exact.items():
            # The last rows of a matrix end a tile that is not full; of the others, a seeded choice.
            rows = np.random.default_rng(7).choice(wanted.shape[1] - 16, PRODUCT_COLUMNS - 16, replace=False)
            kept = np.concatenate([np.sort(rows), np.arange(wanted.shape[1] - 16, wanted.shape[1])])
            pair = {name: (found[name][:, kept], wanted[:, kept].astype(np.float32))}
            comparators |= save_pairs(run_dir, pair, ("product on the device", "float64 product over gguf.quants"))
    return {"comparators": comparators}


register(
    Experiment(
        name="cuda-products",
        title="products of packed matrices on the device, fused and through the scratch, against float64",
        needs=("cuda",),
        arms=(Arm(None, _products_argv, timeout_s=180),),
        prepare=lambda inputs: _operands(inputs) and None,
        collect=_collect_products,
        exclusive=True,
        sources=("q4kd.harness.probes_precision", "q4kd.harness.synthetic_models"),
    )
)
