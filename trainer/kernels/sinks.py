"""Attention whose softmax has a further score for each query head, a sink, on top of torch's own kernels.

A sink takes a share of the softmax and adds nothing (gpt-oss, https://arxiv.org/abs/2508.10925, section 2.2). With L
the logarithm of the sum of the exponentials of a query's scores, which torch's kernels give beside their output,

    Σ_j exp(s_j) v_j / (exp(sink) + Σ_j exp(s_j)) = sigmoid(L - sink) · Σ_j exp(s_j) v_j / Σ_j exp(s_j)

so that the output is multiplied by one number for each query and head.

Letters in shapes: B sequences, T queries, S keys, N query heads, K key-value heads, D head size.
"""

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

# The memory-efficient kernel reads biases from rows that begin at multiples of so many elements.
_BIAS_ALIGNMENT = 16


def attention_beside_sinks(
    q_BNTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, bias_B1TS: Tensor | None, sinks_N: Tensor, *, scale: float | None
) -> Tensor:
    """Return what queries mix of values, ``[B, N, T, D]`` of the inputs' dtype.

    Args:
        q_BNTD, k_BKSD, v_BKSD: bfloat16 or float32; with a bias, or in float32, K is N.
        bias_B1TS: what is added to scores; None for causal attention.
        sinks_N: float32.
        scale: what products of queries and keys are multiplied by; None stands for ``1 / sqrt(D)``.
    """
    if q_BNTD.device.type == "cpu":
        groups = q_BNTD.shape[1] // k_BKSD.shape[1]
        k_BKSD, v_BKSD = k_BKSD.repeat_interleave(groups, 1), v_BKSD.repeat_interleave(groups, 1)
        mixed_BNTD, sums_BNT = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_BNTD, k_BKSD, v_BKSD, 0.0, bias_B1TS is None, attn_mask=bias_B1TS, scale=scale
        )
    elif bias_B1TS is None and q_BNTD.dtype == torch.bfloat16:
        mixed_BNTD, sums_BNT = torch.ops.aten._scaled_dot_product_flash_attention(
            q_BNTD, k_BKSD, v_BKSD, 0.0, True, False, scale=scale
        )[:2]
    else:
        bias = None if bias_B1TS is None else _aligned(bias_B1TS).expand(*q_BNTD.shape[:2], -1, -1)
        mixed_BNTD, sums_BNT = torch.ops.aten._scaled_dot_product_efficient_attention(
            q_BNTD, k_BKSD, v_BKSD, bias, True, 0.0, bias is None, scale=scale
        )[:2]
        sums_BNT = sums_BNT[..., : q_BNTD.shape[2]]  # the kernel pads them
    out: Tensor = mixed_BNTD.mul_(torch.sigmoid(sums_BNT - sinks_N[:, None]).unsqueeze(-1))
    return out


def _aligned(bias_B1TS: Tensor) -> Tensor:
    """Return the same bias, copied where its rows do not begin at multiples of ``_BIAS_ALIGNMENT`` elements."""
    length = bias_B1TS.shape[-1]
    missing = -length % _BIAS_ALIGNMENT
    return F.pad(bias_B1TS, (0, missing))[..., :length] if missing else bias_B1TS
