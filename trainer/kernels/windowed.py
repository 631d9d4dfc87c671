"""Attention on a device where torch's kernels alone do not do: over sliding windows, and of capped scores.

``attention`` (numerics.py) reads every key of a sequence. These read those of a window only: a sequence longer
than two windows is cut into blocks of one window, each of which attends to itself and to the block before it.

Letters in shapes: B sequences, T positions, N query heads, K key-value heads, D head size, W keys of a window, S blocks
of W positions.
"""

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from q4kd.trainer.formats.architecture import TeacherConfig
from q4kd.trainer.kernels.attention import window_starts
from q4kd.trainer.kernels.numerics import attention, attention_bias

# Capped scores are held for so many queries at a time, and in so many bytes.
_BLOCK, _SCORE_BYTES = 256, 256 << 20


def attention_bytes(config: TeacherConfig, batch: int, length: int, size: int) -> int:
    """Return the bytes that attention takes at its peak beside its inputs and output, where it is none of torch's own.

    Args:
        config: the model's dimensions.
        batch, length: B and T.
        size: bytes of an element of queries, keys and values.
    """
    tokens = batch * length
    if config.attention_cap:
        scores = 4 * batch * config.num_heads * length * min(_BLOCK, length)
        return 2 * min(_SCORE_BYTES, scores) + 4 * tokens * (config.q_size + 2 * config.kv_size)
    windows = {window for window in config.windows if 0 < window < length}
    blocks = [window for window in windows if 2 * window < length]
    # Keys and values are copied twice over, for every query head; each window has a mask.
    copies = 2 * 2 * tokens * config.q_size * size if blocks else 0
    # Of each query and head: the logarithm of its sum, what that leaves beside the sink, and the share of the keys.
    copies += 3 * 4 * tokens * config.num_heads if config.family.sinks else 0
    return copies + sum(tokens * (2 * window if window in blocks else length) * size for window in windows)


class Reach:
    """Which keys the queries of one pass read, in each kind of layer; masks are made once a pass.

    Args:
        batch, length: B and T.
        starts_BT: int64 first position of each position's document, on the device; None where a row is one document.
        dtype: of queries, keys and values.
        device: theirs.
    """

    def __init__(
        self, batch: int, length: int, starts_BT: Tensor | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._batch, self._length, self._starts_BT = batch, length, starts_BT
        self._dtype, self._device = dtype, device
        self._biases: dict[int, Tensor | None] = {}

    def attend(
        self,
        q_BNTD: Tensor,
        k_BKTD: Tensor,
        v_BKTD: Tensor,
        *,
        window: int,
        scale: float,
        cap: float,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Return what queries mix of values, ``[B * T, N * D]``.

        Args:
            q_BNTD, k_BKTD, v_BKTD: bfloat16 or float32.
            window: keys that a query reads, its own among them; 0 for all.
            scale: what scores are multiplied by.
            cap: c of ``c tanh(score / c)``; 0 for none.
            sinks: float32 ``[N]``, as in ``sinks.py``; not beside a cap.

        Raises:
            ValueError: for a cap and sinks.
        """
        if cap and sinks is not None:
            raise ValueError(f"cap {cap} and sinks: expected one of them")
        window = window if window < self._length else 0
        if cap:
            return capped_attention(q_BNTD, k_BKTD, v_BKTD, self._starts(window), scale=scale, cap=cap, window=window)
        bias = self._bias(window)
        if 0 < 2 * window < self._length and bias is not None:
            return _in_blocks(q_BNTD, k_BKTD, v_BKTD, bias, window, scale, sinks)
        return attention(q_BNTD, k_BKTD, v_BKTD, bias, scale=scale, sinks=sinks)

    def _starts(self, window: int) -> Tensor | None:
        if not window:
            return self._starts_BT
        return window_starts(self._length, window, self._starts_BT, self._device)

    def _bias(self, window: int) -> Tensor | None:
        if window not in self._biases:
            starts_BT = self._starts(window)
            if starts_BT is None:
                self._biases[window] = None
            elif 0 < 2 * window < self._length:
                self._biases[window] = _block_bias(starts_BT.expand(self._batch, -1), window, self._dtype)
            else:
                self._biases[window] = attention_bias(starts_BT, self._dtype)
        return self._biases[window]


def _block_bias(starts_BT: Tensor, window: int, dtype: torch.dtype) -> Tensor:
    """Return what is added to the scores of each block, ``[B * S, 1, W, 2 W]``; see ``attention_bias``."""
    batch, length = starts_BT.shape
    blocks = -(-length // window)
    padded = F.pad(starts_BT, (0, blocks * window - length)).view(batch, blocks, window, 1)
    place_SW1 = torch.arange(blocks * window, device=starts_BT.device).view(blocks, window, 1)
    # The first key of block s is the first position of block s - 1; before the first block there are none.
    before_S11 = place_SW1[:, :1] - window
    key_S1W = before_S11 + torch.arange(2 * window, device=starts_BT.device)
    is_read = (key_S1W <= place_SW1) & (key_S1W >= padded) & (key_S1W >= 0)
    bias = torch.zeros(is_read.shape, dtype=dtype, device=starts_BT.device).masked_fill_(~is_read, -torch.inf)
    return bias.view(batch * blocks, 1, window, 2 * window)


def _in_blocks(
    q_BNTD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    bias: Tensor,
    window: int,
    scale: float,
    sinks: Tensor | None,
) -> Tensor:
    """Return attention over windows of W keys, each block of W queries over 2 W keys, ``[B * T, N * D]``."""
    batch, heads, length, head_dim = q_BNTD.shape
    blocks = -(-length // window)
    behind = blocks * window - length
    q_BNSWD = F.pad(q_BNTD, (0, 0, 0, behind)).view(batch, heads, blocks, window, head_dim)
    q_SNWD = q_BNSWD.transpose(1, 2).flatten(0, 1)

    def keys(x_BKTD: Tensor) -> Tensor:
        x_BKSDW = F.pad(x_BKTD, (0, 0, window, behind)).unfold(2, 2 * window, window)
        return x_BKSDW.permute(0, 2, 1, 4, 3).flatten(0, 1)

    mixed = attention(q_SNWD, keys(k_BKTD), keys(v_BKTD), bias, scale=scale, sinks=sinks)
    return mixed.view(batch, blocks * window, -1)[:, :length].flatten(0, 1)


def capped_attention(
    q_BNTD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    starts_BT: Tensor | None,
    *,
    scale: float,
    cap: float,
    window: int = 0,
) -> Tensor:
    """Return attention whose scores s are ``cap * tanh(s / cap)``, ``[B * T, N * D]``, in float32 inside.

    torch's kernels have no cap; a block of queries reads the keys from the first one of its window to its last one.
    ``starts_BT`` says which each query may read, ``window`` how far back that is at most; 0 for any distance.
    """
    batch, heads, length, head_dim = q_BNTD.shape
    kv_heads = k_BKTD.shape[1]
    q_BKGTD = (q_BNTD.float() * scale).reshape(batch, kv_heads, heads // kv_heads, length, head_dim)
    k_BK1DT, v_BK1TD = k_BKTD.float().transpose(2, 3).unsqueeze(2), v_BKTD.float().unsqueeze(2)
    if starts_BT is None:
        starts_BT = torch.zeros(1, length, dtype=torch.int64, device=q_BNTD.device)
    out_BTKGD = torch.empty(batch, length, *q_BKGTD.shape[1:3], head_dim, dtype=q_BNTD.dtype, device=q_BNTD.device)
    block = max(1, min(_BLOCK, _SCORE_BYTES // (4 * batch * heads * length)))
    for first in range(0, length, block):
        last = min(first + block, length)
        begin = max(0, first - window + 1) if window else 0
        scores = q_BKGTD[..., first:last, :] @ k_BK1DT[..., begin:last]
        scores.div_(cap).tanh_().mul_(cap)
        places, keys = torch.arange(first, last, device=q_BNTD.device), torch.arange(begin, last, device=q_BNTD.device)
        is_read = (keys <= places[:, None]) & (keys >= starts_BT[:, first:last, None])
        scores.masked_fill_(~is_read[:, None, None], -torch.inf)
        mixed = torch.softmax(scores, -1) @ v_BK1TD[..., begin:last, :]
        out_BTKGD[:, first:last] = mixed.permute(0, 3, 1, 2, 4)
    return out_BTKGD.view(batch * length, -1)
