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


def causal_attention(q_BNTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, starts_BT: Tensor | None = None) -> Tensor:
    """Return softmax(q k' / sqrt(D)) v over the keys not behind each query, float32 ``[B, T, N, D]``, contiguous.

    Query head ``n`` reads key-value head ``n // G``. Queries, keys and values are float32 and contiguous; ``starts_BT``
    is the int64 first position that each query may read, not falling along T; None stands for zeros.
    """
    batch, heads, length, head_dim = q_BNTD.shape
    if not _OWN_PRODUCTS or length < _LONG:
        mask = None if starts_BT is None else document_mask(starts_BT)
        mixed_BNTD = F.scaled_dot_product_attention(
            q_BNTD, k_BKTD, v_BKTD, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        return mixed_BNTD.transpose(1, 2).contiguous()
    kv_heads = k_BKTD.shape[1]
    groups = heads // kv_heads
    block = min(_BLOCK, max(1, _SCORES // (groups * length)))
    hidden_CC = torch.full((block, block), -math.inf).triu_(1)
    out_BTNKGD = torch.empty(batch, length, kv_heads, groups, head_dim)
    q_BKGTD = (q_BNTD * (1 / math.sqrt(head_dim))).view(batch, kv_heads, groups, length, head_dim)
    for row in range(batch):
        for head in range(kv_heads):
            for start in range(0, length, block):
                stop = min(start + block, length)
                # Keys before the first query's document are before every query's.
                first = 0 if starts_BT is None else int(starts_BT[row, start])
                q_GCD, keys_SD = q_BKGTD[row, head, :, start:stop], k_BKTD[row, head, first:stop]
                scores_CS = multiply(q_GCD.reshape(-1, head_dim), keys_SD)
                scores_GCS = scores_CS.view(groups, stop - start, stop - first)
                if starts_BT is not None:
                    keys_S = torch.arange(first, stop)
                    scores_GCS.masked_fill_(keys_S < starts_BT[row, start:stop, None], -math.inf)
                # Only the block's own square holds keys behind their query.
                scores_GCS[:, :, start - first :] += hidden_CC[: stop - start, : stop - start]
                torch.softmax(scores_CS, -1, out=scores_CS)
                mixed_CD = multiply(scores_CS, v_BKTD[row, head, first:stop].t().contiguous())
                out_BTNKGD[row, start:stop, head] = mixed_CD.view(groups, -1, head_dim).transpose(0, 1)
    return out_BTNKGD.view(batch, length, heads, head_dim)
