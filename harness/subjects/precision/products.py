"""The experiment on products: every way in which a forward pass on the device multiplies, on random blocks."""

from pathlib import Path

import gguf
import numpy as np

from q4kd.harness.inputs.arrays import Arrays, arrays_input, read_arrays
from q4kd.harness.inputs.collect import Comparators, save_pairs
from q4kd.harness.inputs.command_lines import probe_words
from q4kd.harness.inputs.models.synthetic_models import random_matrix
from q4kd.harness.runs.experiment import Arm, Facts, Inputs, experiment
from q4kd.harness.subjects.precision.probes import FUSED_TOKENS

# A product through the scratch is judged eight tokens at a time: rounding the weights once costs 1.7e-3 on average,
# and how much single tokens deviate from that says nothing of the kernels.
GROUP = 8
TOKENS = FUSED_TOKENS[-1] + 22 * GROUP
# Rows and columns of the matrices: a block takes one row tile of the first, four of the second (``MANY_ROWS``).
SHAPES = ((517, 3584), (8209, 512))
OUT = "products.npz"
PRODUCT_COLUMNS = {"fused": 256, "decoded": 64}


def _operands(inputs: Inputs) -> Path:
    return arrays_input(inputs, "cuda-operands.npz", make_operands)


def make_operands() -> Arrays:
    """Return packed matrices ``<type>-<rows>`` and activations ``x-<cols>``, bfloat16 as uint16 ``[TOKENS, K]``."""
    rng = np.random.default_rng(12)
    operands: Arrays = {}
    for rows, cols in SHAPES:
        for name in ("Q4_K", "Q6_K"):
            operands[f"{name.lower()}-{rows}"] = random_matrix(rng, name, rows, cols, 0.02)
        x = rng.standard_normal((TOKENS, cols)).astype(np.float32)
        # The sum is far from zero, so that minimums and offsets must cancel exactly. Through bfloat16 they cannot.
        x[: FUSED_TOKENS[-1], 0] = 30.0
        operands[f"x-{cols}"] = (x.view(np.uint32) >> 16).astype(np.uint16)
    return operands


def exact_products(operands: Arrays) -> Arrays:
    """Return what ``multiply_all`` must give, by float64 products over gguf's decoding."""
    exact: Arrays = {}
    for name in [name for name in operands if not name.startswith("x-")]:
        kind = gguf.GGMLQuantizationType[name.partition("-")[0].upper()]
        weight = gguf.quants.dequantize(operands[name], kind).reshape(len(operands[name]), -1).astype(np.float64)
        x = (operands[f"x-{weight.shape[1]}"].astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        product = x @ weight.T
        exact[f"{name}-fused"] = np.concatenate([product[:tokens] for tokens in FUSED_TOKENS])
        exact[f"{name}-decoded"] = product[FUSED_TOKENS[-1] :]
    return exact


@experiment(
    "cuda-products",
    "products of packed matrices on the device, fused and through the scratch, against float64",
    Arm(None, lambda inputs: probe_words("cuda-products", operands=_operands(inputs), out=OUT), timeout_s=180),
    needs=("cuda",),
)
def _collect_products(run_dir: Path, inputs: Inputs) -> Facts:
    comparators: Comparators = {}
    if not (found := read_arrays(run_dir / OUT)):
        return {"comparators": comparators}
    for name, wanted in exact_products(read_arrays(_operands(inputs))).items():
        way, tail = name.rpartition("-")[2], wanted.shape[1] - 16
        # The last rows of a matrix end a tile that is not full and are all kept; of the others a seeded choice is.
        rows = np.random.default_rng(7).choice(tail, PRODUCT_COLUMNS[way] - 16, replace=False)
        kept = np.concatenate([np.sort(rows), np.arange(tail, wanted.shape[1])])
        judged = (len(wanted) // GROUP, -1) if way == "decoded" else (len(wanted), -1)
        pair = {name: (found[name][:, kept].reshape(judged), wanted[:, kept].reshape(judged).astype(np.float32))}
        comparators |= save_pairs(run_dir, pair, ("product on the device", "float64 product over gguf.quants"))
    return {"comparators": comparators}
