"""How many tokens and columns of logits the CUDA loss holds at one time, and the bytes that they take."""

from typing import Any

import torch
from torch import Tensor

from q4kd.trainer.loss.config import KDLossConfig

CHUNK_BYTES = 3_000_000_000
_CHUNKS = (8192, 4096, 2048, 1024, 512, 256)
SLICE = 1024
LOW_CHUNK, LOW_TILE = 2048, 8192


def slice_of(chunk: int, *, in_place: bool) -> int:
    """Return how many of a chunk's tokens have logits at one time.

    A slice whose logits become their gradient in place needs no buffer but the teacher's and is as long as the chunk:
    products of 1,024 rows take a tenth longer than those of 4,096 (H200).
    """
    return chunk if in_place else min(chunk, SLICE)


def chunk_bytes(chunk: int, vocab: int, *, logits_bytes: int, gradient_bytes: int, with_teacher: bool) -> int:
    """Return the bytes of ``fast``'s buffers for a chunk of ``chunk`` tokens; ``fused.py`` lists them."""
    rows = slice_of(chunk, in_place=logits_bytes == gradient_bytes)
    logits = rows * vocab * logits_bytes
    return chunk * vocab * gradient_bytes + logits * (with_teacher + (logits_bytes != gradient_bytes))


def choose_chunk(tokens: int, vocab: int, budget: int, **types: Any) -> int:
    """Return the largest chunk, of a fixed list, whose buffers fit ``budget`` bytes, else the smallest; at most P."""
    fitting = (chunk for chunk in _CHUNKS if chunk_bytes(min(chunk, tokens), vocab, **types) <= budget)
    return min(tokens, next(fitting, _CHUNKS[-1]))


def _budget(device: torch.device) -> int:
    if device.type != "cuda":
        return CHUNK_BYTES
    return min(CHUNK_BYTES, torch.cuda.get_device_properties(device).total_memory // 20)


def fast_chunk(tokens: int, vocab: int, config: KDLossConfig, hidden: Tensor, *, with_teacher: bool = True) -> int:
    """Return the tokens of a chunk of ``fast``: as set, else what fits the device's share of bytes.

    ``tokens`` is P, and ``hidden`` are the student's hidden states, for their type and device.
    """
    if config.chunk_tokens:
        return min(tokens, config.chunk_tokens)
    gradient_bytes = 2 if hidden.dtype == torch.bfloat16 else 4
    types = {
        "logits_bytes": 2 if config.logits == "bfloat16" and gradient_bytes == 2 else 4,
        "gradient_bytes": gradient_bytes,
        "with_teacher": with_teacher,
    }
    return choose_chunk(tokens, vocab, _budget(hidden.device), **types)
