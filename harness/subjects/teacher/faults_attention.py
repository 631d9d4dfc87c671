"""Faults in attention by blocks, which short texts never reach, and one in attention over all positions at once."""

from typing import TYPE_CHECKING

from q4kd.harness.runs.faults import Call, patch

if TYPE_CHECKING:
    from torch import Tensor

_ATTENTION = "q4kd.trainer.kernels.attention"
_BLOCKED = f"{_ATTENTION}:blocked_attention"
_BLOCK = f"{_ATTENTION}:_attend_block"
_WHOLE = f"{_ATTENTION}:whole_attention"


@patch("dispatch", "attention-heads-exchanged", "a query head reads the key-value head n % K, by blocks", _BLOCKED)
def _heads_exchanged(
    original: Call, q: "Tensor", k: "Tensor", v: "Tensor", starts: object, **options: object
) -> object:
    (batch, heads, length, size), kv_heads = q.shape, k.shape[1]
    interleaved = q.view(batch, heads // kv_heads, kv_heads, length, size).transpose(1, 2).reshape(q.shape)
    mixed: Tensor = original(interleaved, k, v, starts, **options)  # type: ignore[assignment]
    return mixed.view(batch, length, kv_heads, heads // kv_heads, size).transpose(2, 3).reshape(mixed.shape)


@patch("dispatch", "attention-scale-halved", "scores are divided by sqrt(2 D) instead of sqrt(D), by blocks", _BLOCKED)
def _scale_halved(original: Call, q: "Tensor", *rest: object, **options: object) -> object:
    return original(q / 2**0.5, *rest, **options)


@patch("dispatch", "attention-last-block-short", "the last, partial block of queries is left as it was", _BLOCKED)
def _last_block_short(original: Call, q: "Tensor", *rest: object, **options: object) -> object:
    mixed: Tensor = original(q, *rest, **options)  # type: ignore[assignment]
    mixed[:, mixed.shape[1] // 128 * 128 :] = 0
    return mixed


@patch("dispatch", "attention-block-edge-dropped", "the key before each block of queries is not read", _BLOCK)
def _block_edge_dropped(
    original: Call,
    q: "Tensor",
    keys: "Tensor",
    values: "Tensor",
    hidden: object,
    starts: object,
    *rest: object,
) -> object:
    edge = len(keys) - q.shape[1]
    if edge > 1 and starts is None:
        import torch

        kept = torch.tensor([row for row in range(len(keys)) if row != edge - 1])
        keys, values = keys[kept], values[kept]
    return original(q, keys, values, hidden, starts, *rest)


@patch("dispatch", "attention-block-documents-merged", "a block's documents are all that of its first query", _BLOCK)
def _block_documents_merged(
    original: Call,
    q: object,
    keys: object,
    values: object,
    hidden: object,
    starts: "Tensor | None",
    *rest: object,
) -> object:
    return original(q, keys, values, hidden, None if starts is None else starts[:1].expand(len(starts)), *rest)


@patch("dispatch", "attention-whole-documents-merged", "attention over all positions sees other documents", _WHOLE)
def _whole_documents_merged(
    original: Call, q: object, k: object, v: object, _starts: object, **options: object
) -> object:
    return original(q, k, v, None, **options)
