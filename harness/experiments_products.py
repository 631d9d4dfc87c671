"""The experiment on products: every way in which a forward pass on the device multiplies, on random blocks."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from q4kd.harness.experiment import Arm, Experiment, Inputs, register
from q4kd.harness.experiments_teacher import save_pairs
from q4kd.harness.probes_precision import FUSED_TOKENS
from q4kd.harness.synthetic_models import random_matrix

# Through the scratch a product is judged eight tokens at a time: rounding the weights once is 1.7e-3 on average, and
# what single tokens have more or less of it says nothing of the kernels.
GROUP = 8
TOKENS = FUSED_TOKENS[-1] + 22 * GROUP
# Rows and columns: one row tile a block, and four of them (cuda.kernels.MANY_ROWS).
SHAPES = ((517, 3584), (8209, 512))
PRODUCT_COLUMNS = {"fused": 256, "decoded": 128}


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
            way, tail = name.rpartition("-")[2], wanted.shape[1] - 16
            # The last rows of a matrix end a tile that is not full; of the others, a seeded choice.
            rows = np.random.default_rng(7).choice(tail, PRODUCT_COLUMNS[way] - 16, replace=False)
            kept = np.concatenate([np.sort(rows), np.arange(tail, wanted.shape[1])])
            judged = (len(wanted) // GROUP, -1) if way == "decoded" else (len(wanted), -1)
            pair = {name: (found[name][:, kept].reshape(judged), wanted[:, kept].reshape(judged).astype(np.float32))}
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
