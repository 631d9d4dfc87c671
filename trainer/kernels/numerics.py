"""Products and attention with their arithmetic pinned, whatever the process has set globally."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from q4kd.trainer.kernels.attention import document_mask
from q4kd.trainer.kernels.sinks import attention_beside_sinks

# The cuDNN backend is left out, since it has corrupted long sequences silently (https://github.com/pytorch/pytorch/issues/193893).
_ATTENTION = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


@contextmanager
def pinned_numerics() -> Iterator[None]:
    """Have products accumulate in float32, float32 stay float32, and attention be flash or memory-efficient."""
    matmul = torch.backends.cuda.matmul
    reduced, tf32 = matmul.allow_bf16_reduced_precision_reduction, matmul.allow_tf32
    matmul.allow_bf16_reduced_precision_reduction, matmul.allow_tf32 = False, False
    try:
        with sdpa_kernel(list(_ATTENTION)):
            yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction, matmul.allow_tf32 = reduced, tf32


_FLASH_MAX_HEAD = 256


def multiply(x_MK: Tensor, weight_RK: Tensor, out_MR: Tensor) -> None:
    """Write ``x @ W.T`` to ``out``, of the operands' dtype or (for bfloat16 on CUDA) float32; it may be a row slice."""
    if out_MR.dtype == x_MK.dtype:
        torch.mm(x_MK, weight_RK.T, out=out_MR)
    else:
        torch.mm(x_MK, weight_RK.T, out_dtype=out_MR.dtype, out=out_MR)


def attention_bias(starts_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what is added to attention scores, ``[B, 1, T, T]``: 0 within a document, else minus infinity.

    ``2 B T^2`` bytes in bfloat16 (4 MB for 32 x 256, 134 MB for 1 x 8,192), made once per pass.
    """
    visible = document_mask(starts_BT)
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)


def attention(
    q_BNTD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    bias_B1TT: Tensor | None = None,
    *,
    scale: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Return grouped-query attention, ``[B * T, N * D]``, causal or as the bias of ``attention_bias`` says.

    Scores are multiplied by ``scale``; None stands for ``1 / sqrt(D)``. ``sinks`` are as in ``sinks.py``.
    """
    if bias_B1TT is not None or q_BNTD.dtype == torch.float32 or q_BNTD.shape[-1] > _FLASH_MAX_HEAD:
        # Flash attention takes no float32, no bias and no large heads, and the memory-efficient kernel no groups.
        groups = q_BNTD.shape[1] // k_BKTD.shape[1]
        k_BKTD, v_BKTD = k_BKTD.repeat_interleave(groups, 1), v_BKTD.repeat_interleave(groups, 1)
    if sinks is not None:
        mixed_BNTD = attention_beside_sinks(q_BNTD, k_BKTD, v_BKTD, bias_B1TT, sinks, scale=scale)
        return mixed_BNTD.transpose(1, 2).flatten(2).flatten(0, 1)
    grouped = q_BNTD.shape[1] != k_BKTD.shape[1]
    mixed_BNTD = F.scaled_dot_product_attention(
        q_BNTD, k_BKTD, v_BKTD, attn_mask=bias_B1TT, is_causal=bias_B1TT is None, scale=scale, enable_gqa=grouped
    )
    return mixed_BNTD.transpose(1, 2).flatten(2).flatten(0, 1)
