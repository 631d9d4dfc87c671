"""Causal grouped-query attention on the CPU (https://arxiv.org/abs/2305.13245), a block of queries at a time.

Letters in shapes: B sequences, T positions, N query heads, K key-value heads, G = N / K, D head size.
"""

import math

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from q4kd.trainer.kernels.gemm import has_avx512_product, multiply

# A block has at most so many queries, and so many scores. Keys behind its last query are not multiplied at all, so
# small blocks skip more of the causal half; below 128 the products become inefficient.
_BLOCK = 128
_SCORES = 4 << 20
# Below this length torch's own attention is faster, since the blocks are too few.
_LONG = 256
_OWN_PRODUCTS = has_avx512_product()


def document_mask(starts_BT: Tensor) -> Tensor:
    """Return which keys each query reads, bool ``[B, 1, T, T]``: those of its own document that are not behind it.

    Args:
        starts_BT: int64 first position of each position's document, ``[B, T]``.
    """
    positions_T = torch.arange(starts_BT.shape[1], device=starts_BT.device)
    return ((positions_T <= positions_T[:, None]) & (positions_T >= starts_BT[:, :, None])).unsqueeze(1)


def window_starts(length: int, window: int, starts_BT: Tensor | None, device: torch.device | None = None) -> Tensor:
    """Return the first position that each query reads where a window holds ``window`` keys, its own among them.

    Args:
        length: T.
        window: keys of a query, at least 1.
        starts_BT: int64 first position of each position's document, ``[B, T]``; None where a row is one document.
        device: of the result, where there are no starts.

    Returns:
        int64 ``[B, T]``, or ``[1, T]`` without ``starts_BT``.
    """
    if starts_BT is not None:
        device = starts_BT.device
    first_1T = (torch.arange(length, device=device) - (window - 1)).clamp_(min=0)[None]
    return first_1T if starts_BT is None else torch.maximum(first_1T, starts_BT)


def causal_attention(
    q_BNTD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    starts_BT: Tensor | None = None,
    *,
    window: int = 0,
    scale: float | None = None,
    cap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Return softmax(s) v over the keys not behind each query, float32 ``[B, T, N, D]``, contiguous.

    Scores s are q k' times ``scale``, or with a cap c, ``c tanh(s / c)`` of that. Query head ``n`` reads key-value head
    ``n // G``. Where a window is short, keys before that of a block's first query are not multiplied at all.

    Args:
        q_BNTD, k_BKTD, v_BKTD: float32, contiguous.
        starts_BT: int64, the first position that each query may read, not falling along T; None stands for zeros.
        window: how many keys a query reads, its own among them; 0 for all.
        scale: None stands for ``1 / sqrt(D)``.
        cap: c; 0 for none.
        sinks: float32 ``[N]``, a further score of each query head, of no key, that takes its share of the softmax and
            adds nothing (gpt-oss, https://arxiv.org/abs/2508.10925, section 2.2).
    """
    batch, _, length, head_dim = q_BNTD.shape
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    is_long = _OWN_PRODUCTS and length >= _LONG
    if 0 < window < length:
        starts_BT = window_starts(length, window, starts_BT).expand(batch, -1)
        is_long |= length >= _LONG
    if is_long or cap or sinks is not None:
        return blocked_attention(q_BNTD, k_BKTD, v_BKTD, starts_BT, scale=scale, cap=cap, sinks=sinks)
    return whole_attention(q_BNTD, k_BKTD, v_BKTD, starts_BT, scale=scale)


def whole_attention(
    q_BNTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, starts_BT: Tensor | None, *, scale: float | None = None
) -> Tensor:
    """Return what ``causal_attention`` does without a cap, by torch's own attention over all positions at once."""
    mask = None if starts_BT is None else document_mask(starts_BT)
    mixed_BNTD = F.scaled_dot_product_attention(
        q_BNTD, k_BKTD, v_BKTD, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
    )
    return mixed_BNTD.transpose(1, 2).contiguous()


def blocked_attention(
    q_BNTD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    starts_BT: Tensor | None,
    *,
    scale: float | None = None,
    cap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Return what ``causal_attention`` does, a block of queries at a time; right on every processor."""
    batch, heads, length, head_dim = q_BNTD.shape
    kv_heads = k_BKTD.shape[1]
    groups = heads // kv_heads
    block = min(_BLOCK, max(1, _SCORES // (groups * length)))
    hidden_CC = torch.full((block, block), -math.inf).triu_(1)
    out_BTNKGD = torch.empty(batch, length, kv_heads, groups, head_dim)
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    q_BKGTD = (q_BNTD * scale).view(batch, kv_heads, groups, length, head_dim)
    for row in range(batch):
        for head in range(kv_heads):
            for start in range(0, length, block):
                stop = min(start + block, length)
                starts_C = None if starts_BT is None else starts_BT[row, start:stop]
                # Keys before the first that the first query reads are read by none.
                first = 0 if starts_C is None else int(starts_C[0])
                keys_SD, values_SD = k_BKTD[row, head, first:stop], v_BKTD[row, head, first:stop]
                sinks_G = None if sinks is None else sinks[head * groups : (head + 1) * groups]
                mixed_GCD = _attend_block(
                    q_BKGTD[row, head, :, start:stop], keys_SD, values_SD, hidden_CC, starts_C, first, cap, sinks_G
                )
                out_BTNKGD[row, start:stop, head] = mixed_GCD.transpose(0, 1)
    return out_BTNKGD.view(batch, length, heads, head_dim)


def _attend_block(
    q_GCD: Tensor,
    keys_SD: Tensor,
    values_SD: Tensor,
    hidden_CC: Tensor,
    starts_C: Tensor | None,
    first: int,
    cap: float = 0.0,
    sinks_G: Tensor | None = None,
) -> Tensor:
    """Return the values that the last C of S positions mix for G heads, ``[G, C, D]``; q is scaled already.

    ``hidden_CC`` is minus infinity above its diagonal and zero elsewhere, of at least C rows; ``first`` is the position
    of the first key, and ``starts_C`` the first position that each query reads.
    """
    groups, queries, head_dim = q_GCD.shape
    scores_CS = multiply(q_GCD.reshape(-1, head_dim), keys_SD)
    if cap:
        scores_CS.div_(cap).tanh_().mul_(cap)
    scores_GCS = scores_CS.view(groups, queries, len(keys_SD))
    if starts_C is not None:
        keys_S = torch.arange(first, first + len(keys_SD))
        scores_GCS.masked_fill_(keys_S < starts_C[:, None], -math.inf)
    # Only the block's own square holds keys behind their query.
    scores_GCS[:, :, len(keys_SD) - queries :] += hidden_CC[:queries, :queries]
    if sinks_G is None:
        torch.softmax(scores_CS, -1, out=scores_CS)
    else:
        _softmax_beside(scores_GCS, sinks_G)
    return multiply(scores_CS, values_SD.t().contiguous()).view(groups, queries, head_dim)


def _softmax_beside(scores_GCS: Tensor, sinks_G: Tensor) -> None:
    """Make scores their shares of a softmax over them and the head's sink, in place; the sink's own is left out."""
    sinks_G11 = sinks_G[:, None, None]
    peak_GC1 = torch.maximum(scores_GCS.amax(-1, keepdim=True), sinks_G11)
    scores_GCS.sub_(peak_GC1).exp_()
    scores_GCS.div_(scores_GCS.sum(-1, keepdim=True) + (sinks_G11 - peak_GC1).exp_())
