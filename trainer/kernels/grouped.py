"""Products of rows sorted by group, each with the matrix of its group: torch's grouped kernel, or one product a group.

Letters in shapes: R rows, e groups, N outputs, K inputs.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

# On other GPUs torch's operator is a loop of its own, for which the host waits on the device.
_GROUPED_CAPABILITIES = ((9, 0), (10, 0))


@functools.cache
def has_grouped_kernel(device: torch.device) -> bool:
    """Return whether torch multiplies bfloat16 groups on a device in one launch."""
    if device.type != "cuda" or not hasattr(torch, "_grouped_mm"):
        return False
    return torch.cuda.get_device_capability(device) in _GROUPED_CAPABILITIES


def grouped_multiply(x_RK: Tensor, weights_eNK: Tensor, ends_e: Tensor, host_ends: Sequence[int]) -> Tensor:
    """Return ``x[r] @ weights[g].T`` for every row r of each group g, ``[R, N]`` of the operands' dtype.

    Args:
        x_RK: bfloat16 or float32, contiguous.
        weights_eNK: same type, contiguous; what it holds for a group without rows does not matter.
        ends_e: int32, the first row behind each group's; the last is R.
        host_ends: the same numbers on the host.
    """
    is_aligned = all(size % 8 == 0 for size in weights_eNK.shape[1:])  # rows begin at multiples of 16 bytes
    if x_RK.dtype == torch.bfloat16 and is_aligned and has_grouped_kernel(x_RK.device):
        out: Tensor = torch._grouped_mm(x_RK, weights_eNK.transpose(1, 2), offs=ends_e)
        return out
    out = x_RK.new_empty(len(x_RK), weights_eNK.shape[1])
    start = 0
    for weight_NK, end in zip(weights_eNK, host_ends, strict=True):
        if start < end:
            torch.mm(x_RK[start:end], weight_NK.T, out=out[start:end])
        start = end
    return out
