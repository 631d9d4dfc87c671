"""Scales of whole tensors: a float32 ``NAME.scale`` beside an NVFP4 matrix ``NAME.weight`` multiplies all its weights.

llama.cpp multiplies products by them (``build_lora_mm``). ``NAME.input_scale`` is what engines divide activations by
before they quantise these; here activations are not quantised, so it has no part in the result.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from q4kd.trainer.errors import InputError
from q4kd.trainer.formats.blocks.scales import LARGEST
from q4kd.trainer.formats.model_file import PackedTensor

_SUFFIXES = (".scale", ".input_scale")
# What it multiplies is at most 1,440 (a block's scale of 240 and a quant of 6).
_LARGEST_SCALE = LARGEST / 2048
# llama.cpp has no scale for the embedding, nor for a head that is the embedding.
_WITHOUT = ("token_embd.weight",)


def take_scales(path: Path, tensors: Mapping[str, PackedTensor], own: tuple[str, ...] = ()) -> dict[str, PackedTensor]:
    """Return the tensors without those that are scales, each NVFP4 matrix with its own.

    ``own`` are the ends of the names of an architecture's own vectors, which stay.

    Raises:
        InputError: for a scale that is no finite float32, or too large a one, or that is beside no NVFP4 matrix.
    """
    scales = {name: tensor for name, tensor in tensors.items() if name.endswith(_SUFFIXES) and not name.endswith(own)}
    found = {name: tensor for name, tensor in tensors.items() if name not in scales}
    for name, tensor in scales.items():
        subject, matrix = f"{path}: tensor {name}", f"{name.rpartition('.')[0]}.weight"
        beside = found.get(matrix)
        if beside is None or beside.type != "NVFP4" or matrix in _WITHOUT:
            got = "none" if beside is None else f"{matrix} in {beside.type}"
            remedy = "use another teacher: what this scale is for is not implemented, and leaving it out would be wrong"
            raise InputError(subject, expected="an NVFP4 matrix beside it", got=got, remedy=remedy)
        if tensor.type != "F32" or tensor.shape != (1,):
            got = f"{tensor.type} of shape {tensor.shape}"
            raise InputError(subject, expected="one F32 number", got=got, remedy="convert the model again")
        scale = float(tensor.data.view("<f4")[0, 0])
        if not abs(scale) < _LARGEST_SCALE:
            expected, remedy = f"a finite scale below {_LARGEST_SCALE:.2g}", "download or quantise the model again"
            raise InputError(subject, expected=expected, got=str(scale), remedy=remedy)
        if name.endswith(".input_scale"):
            continue
        found[matrix] = dataclasses.replace(found[matrix], scale=scale)
    return found
