"""Copies from the host to a device for which the host does not wait."""

import torch
from torch import Tensor


def copy_from_host(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device.

    The host would wait for everything that is queued on the device if it copied from pageable memory. A copy to CUDA
    therefore goes through pinned memory, which torch keeps until the copy is made.
    """
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)
