"""A teacher's weights on one device and the forward pass over them: which class serves, and how it is loaded."""

from typing import TYPE_CHECKING, TypeAlias

import torch

from q4kd.trainer.device.devices import Allocation
from q4kd.trainer.errors import InputError
from q4kd.trainer.formats.blocks.scales import LARGEST, check_scales
from q4kd.trainer.formats.model_file import ModelFile
from q4kd.trainer.formats.tensor_shapes import ROPE_FACTORS
from q4kd.trainer.teacher.cpu.forward import CpuForward

if TYPE_CHECKING:
    from q4kd.trainer.teacher.cuda.forward import CudaForward

# Every device's forward pass has the attributes and methods that ``Teacher`` and ``PackedHead`` use.
Forward: TypeAlias = "CpuForward | CudaForward"


def build_forward(
    model: ModelFile, backend: str, device: str, dtype: str, allocation: Allocation = "device"
) -> Forward:
    """Load a model's weights for a backend, a device and a compute dtype."""
    if device == "cuda":
        from q4kd.trainer.teacher.cuda.load import load_forward

        return load_forward(model, backend, dtype=getattr(torch, dtype), allocation=allocation)
    check_weights(model)
    return CpuForward(model, backend, getattr(torch, dtype))


def check_weights(model: ModelFile) -> None:
    """Refuse weights that are NaN, infinite or too large: one such scale makes every logit NaN.

    Divisors of rotary frequencies were checked when the file was opened; those of pairs that do not turn are 1e30.

    Raises:
        InputError: naming the first tensor that has one.
    """
    for tensor in model.tensors.values():
        if tensor.name == ROPE_FACTORS:
            continue
        count = check_scales(tensor.type, tensor.data)
        if count:
            subject, remedy = f"{model.path}: tensor {tensor.name}", "download or quantise the model again"
            got = f"{count} {tensor.type} blocks with NaN, infinity or more"
            expected = f"finite scales, and weights below {LARGEST:.2g}"
            raise InputError(subject, expected=expected, got=got, remedy=remedy)
