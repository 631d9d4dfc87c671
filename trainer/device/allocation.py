"""Allocates packed weights: by torch's allocator on classic devices, in managed memory on unified ones."""

from typing import TYPE_CHECKING

from q4kd.trainer.device.devices import Allocation

if TYPE_CHECKING:
    from torch import Tensor


def allocate_bytes(num_bytes: int, allocation: Allocation) -> "Tensor":
    """Return an uninitialised uint8 ``[num_bytes]`` on the current CUDA device.

    Managed memory (for unified devices: see ``devices.check_allocation``) comes from CuPy, since torch has no allocator
    for it, and is freed with the tensor.
    """
    import torch

    if allocation == "device":
        return torch.empty(num_bytes, dtype=torch.uint8, device="cuda")
    import cupy

    pointer = cupy.cuda.malloc_managed(num_bytes)
    return torch.as_tensor(cupy.ndarray((num_bytes,), dtype=cupy.uint8, memptr=pointer), device="cuda")
