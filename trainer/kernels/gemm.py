"""Matrix products on the CPU, by oneDNN's kernels where torch would take MKL's.

For float32, torch hands ``x @ W.T`` to MKL, which on AMD processors keeps to AVX2; oneDNN, built into the same torch,
uses AVX-512 there and is about twice as fast. Its product is reached by the operator that torch's own compiler emits
for a linear layer with frozen weights. Where that operator is missing, or the processor has no AVX-512, this module
does what torch does by default.
"""

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor


def has_avx512_product() -> bool:
    """Return whether oneDNN's float32 product is there and the processor has AVX-512."""
    has_avx512 = getattr(torch.cpu, "_is_avx512_supported", lambda: False)
    return bool(has_avx512()) and torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")


_AVX512_PRODUCT = has_avx512_product()
# This is just below the largest block that raises glibc's thresholds, its header and alignment included.
_LARGEST_KEPT = 31 << 20
# Up to so many tokens the more exact product is as fast, since decoding the weights takes most of the time.
_FEW_TOKENS = 64


def multiply(x_MK: Tensor, weight_RK: Tensor) -> Tensor:
    """Return ``x @ weight.T``, contiguous ``[M, R]``, in the dtype of both (float32 or bfloat16).

    Sums are accumulated in float32. Both arguments are contiguous: oneDNN's float32 product is a slow reference
    implementation for weights with other strides (measured: 500 times slower).

    oneDNN adds up to 1,024 terms in one chain, MKL fewer: over 4,864 columns their products are 5.6e-7 and 2.7e-7 from
    float64, relative, and logits of real teachers follow. Few tokens get MKL's, which takes about 1 % more of a pass
    over 64 positions; of one over 127 it would take 6 % more, of one over 512 11 %.
    """
    if _AVX512_PRODUCT and x_MK.dtype == torch.float32 and x_MK.shape[0] > _FEW_TOKENS:
        out_MR: Tensor = torch.ops.mkldnn._linear_pointwise(x_MK, weight_RK, None, "none", [], "")
        return out_MR
    return F.linear(x_MK, weight_RK)


def keep_freed_memory() -> None:
    """Have glibc keep what is freed between products, up to 62 MiB, instead of giving it back to the kernel.

    oneDNN's product allocates its result. If its pages are given back, a 1,024 x 3,072 result faults them in anew at
    every product, which took a fifth of a feed-forward's time. glibc raises its own thresholds when a large block is
    freed: to that block's size for mapping apart, at most 32 MiB, and to twice that for giving back (mallopt(3),
    M_MMAP_THRESHOLD). The block freed here is never touched, so it takes no memory; other allocators ignore it.
    """
    torch.empty(_LARGEST_KEPT, dtype=torch.uint8)


def empty_huge(rows: int, cols: int) -> Tensor:
    """Return uninitialised float32 ``[rows, cols]`` for a large result.

    NumPy asks the kernel for huge pages, which torch does not: the first write of a fresh 134 MB took 8 ms instead of
    54 ms of page faults.
    """
    return torch.from_numpy(np.empty((rows, cols), np.float32))
