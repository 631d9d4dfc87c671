"""Measurements of the teacher: what it refuses, and how it decodes blocks and multiplies by them."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from q4kd.harness.inputs.arrays import Array, Arrays, read_arrays, save_arrays
from q4kd.harness.runs.probes import probe
from q4kd.trainer.files import write_json

if TYPE_CHECKING:
    from torch import Tensor

    from q4kd.trainer.teacher.cpu.weights import PackedMatrix

# How many rows are multiplied: all decoded at once, a tile of a head at a time, through a scratch of 20 rows, decoded
# into a buffer through that scratch, and held dense. In bfloat16 each rounds weights and activations once.
ROW_WAYS = ("whole", "projected", "tiled", "decoded", "dense", "dense-projected")
ROW_WAYS_BF16 = ("whole-bf16", "projected-bf16", "tiled-bf16", "dense-bf16")


@probe("frozen-teacher")
def frozen_teacher(model: Path, out: Path) -> None:
    """Ask the teacher for gradients in every way a user might, and for the valid twin of each."""
    import torch

    from q4kd.trainer.device.placement import place_teacher
    from q4kd.trainer.events import EventLog
    from q4kd.trainer.teacher.teacher import load_teacher

    teacher = load_teacher(place_teacher(model, dtype="float32"), events=EventLog(None))
    ids = torch.arange(8).unsqueeze(0)
    hidden = teacher.hidden(ids)[0]

    def no_graph() -> None:
        logits = teacher.logits(ids)
        if logits.requires_grad or logits.grad_fn is not None:
            raise AssertionError("logits carry a gradient function")

    def trained_through() -> None:
        torch.autograd.backward(teacher.head_logits(hidden.clone().requires_grad_(True)).sum())

    cases: list[tuple[str, Callable[[], object], Callable[[], object]]] = [
        ("requires_grad_", lambda: teacher.requires_grad_(True), lambda: teacher.requires_grad_(False)),
        ("parameters", lambda: list(teacher.parameters()), no_graph),
        ("backward", lambda: teacher.backward(), no_graph),
        ("gradient through the head", trained_through, lambda: teacher.head_logits(hidden)),
    ]
    records = [
        {"case": name, "error": _outcome(invalid), "twin": f"{name}, valid", "twin_error": _outcome(valid)}
        for name, invalid, valid in cases
    ]
    write_json(out, {"cases": records})


def _outcome(action: Callable[[], object]) -> str | None:
    """Return the type name of what ``action`` raises, or None."""
    try:
        action()
    except Exception as error:  # the type of whatever comes is the observation
        return type(error).__name__
    return None


@probe("superblock")
def superblock(blocks: Path, out: Path, facts: Path) -> None:
    """Decode given blocks and multiply by them with the trainer's own functions."""
    import torch

    from q4kd.trainer.formats.blocks.decode import decode_rows
    from q4kd.trainer.formats.blocks.layout import FORMATS, SUPERBLOCK
    from q4kd.trainer.formats.model_file import PackedTensor
    from q4kd.trainer.teacher.cpu.weights import PackedMatrix, Scratch

    given = read_arrays(blocks)
    activations = torch.from_numpy(given["activations"])

    def decode(name: str, packed: Array) -> Array:
        # The output is poisoned first: an element that the decoder leaves out shows as NaN.
        decoded = torch.full((len(packed), SUPERBLOCK), torch.nan)
        return decode_rows(name, torch.from_numpy(packed), decoded).numpy()

    def decode_codes(name: str, packed: Array) -> Array:
        decoded = torch.full((len(packed), FORMATS[name].block_size), torch.nan)
        return decode_rows(name, torch.from_numpy(packed), decoded).numpy()

    def matrix(name: str, packed: Array) -> "PackedMatrix":
        # A scratch of 20 rows makes the product run over several tiles, the last one short.
        tensor = PackedTensor("probe", name, (len(packed), SUPERBLOCK), packed)
        return PackedMatrix(tensor, Scratch(20 * SUPERBLOCK * 4))

    def multiply(name: str, packed: Array) -> Array:
        return matrix(name, packed).product(activations).numpy()

    results = {
        "q4_k": decode("Q4_K", given["q4_k"]),
        "q6_k": decode("Q6_K", given["q6_k"]),
        "q6_k-zero": decode("Q6_K", given["q6_k-zero"]),
        "q4_k-product": multiply("Q4_K", given["q4_k"]),
        "q6_k-product": multiply("Q6_K", given["q6_k"]),
        "q4_k-offset": multiply("Q4_K", given["q4_k-offset"]),
    }
    for name in (name for name in given if name.startswith("low-")):
        results[name] = decode(name.removeprefix("low-").upper(), given[name])
    results |= _products_of_rows(given["rows"], activations)
    results |= {key: decode_codes(key.removeprefix("code-"), given[key]) for key in given if key.startswith("code-")}
    save_arrays(out, results)
    k_quants = {name: form for name, form in FORMATS.items() if form.is_quantized and name.lower() in given}
    tables = {
        # A matrix is asked for the bytes that it holds, not the format.
        "superblock_bytes": {
            name: matrix(name, given[name.lower()]).resident_bytes // len(given[name.lower()]) for name in k_quants
        },
        "row_bytes": {
            f"{name} x {columns}": form.row_bytes(columns)
            for name, form in k_quants.items()
            for columns in (256, 512, 3584, 18944)
        },
        "not_finite": {name: int((~np.isfinite(results[name.lower()])).sum()) for name in k_quants},
    }
    write_json(facts, {"tables": tables})


def _products_of_rows(packed: Array, activations: "Tensor") -> Arrays:
    """Multiply a Q4_K matrix of many rows, uint8 ``[R, 144]``, in every way: ``rows-<way>``, float32 ``[M, R]``."""
    import torch

    from q4kd.trainer.formats.blocks.layout import SUPERBLOCK
    from q4kd.trainer.formats.model_file import PackedTensor
    from q4kd.trainer.teacher.cpu.weights import DenseMatrix, PackedMatrix, Scratch

    tensor = PackedTensor("probe", "Q4_K", (len(packed), SUPERBLOCK), packed)
    large, small = PackedMatrix(tensor, Scratch()), PackedMatrix(tensor, Scratch(20 * SUPERBLOCK * 4))
    dense, rounded = DenseMatrix(tensor), DenseMatrix(tensor, torch.bfloat16)
    decoded = torch.full((len(packed), SUPERBLOCK), torch.nan)
    small.decode(0, len(packed), decoded)
    half = activations.bfloat16()

    def poisoned() -> "Tensor":
        return torch.full((len(activations), len(packed)), torch.nan)

    found = {
        "whole": large.product(activations),
        "projected": large.project(activations, poisoned()),
        "tiled": small.product(activations),
        "decoded": activations @ decoded.T,
        "dense": dense.product(activations),
        "dense-projected": dense.project(activations, poisoned()),
        "whole-bf16": large.product(half),
        "projected-bf16": large.project(half, poisoned()),
        "tiled-bf16": small.product(half),
        "dense-bf16": rounded.product(half),
    }
    return {f"rows-{name}": product.float().numpy() for name, product in found.items()}
