"""Allocates packed weights: by torch's allocator on classic devices, in managed memory on unified ones."""

import os
import platform
from collections.abc import MutableMapping
from typing import TYPE_CHECKING

from q4kd.trainer.device.devices import Allocation

if TYPE_CHECKING:
    from torch import Tensor

# torch reads the first from 2.9 on, and warns of the second.
_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def let_segments_grow(environment: MutableMapping[str, str] = os.environ, machine: str = platform.machine()) -> None:
    """Ask torch's allocator for segments that grow, unless the user has settled its settings.

    Segments of fixed sizes leave gaps that the next, larger tensor does not fit: with a head of 152 k tokens the
    allocator reserved 30 % more than was ever allocated at once, which no plan can foresee (evidence/LOG.md). It has an
    effect before the first use of CUDA. Other machines than x86-64 have not been measured and are left as they are.
    """
    import torch

    if machine != "x86_64" or any(name in environment for name in _ALLOCATOR_VARIABLES):
        return
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    environment[_ALLOCATOR_VARIABLES[0 if version >= (2, 9) else 1]] = "expandable_segments:True"


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
