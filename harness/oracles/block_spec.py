"""Superblocks by the letter of the layout: scalar decoders written from the format's description, and test blocks.

These loops are the reference of FALSIFY-QS-006 and -007; they share no code with the trainer or with gguf.
Layout: llama.cpp ``ggml-common.h`` (block_q4_K, block_q6_K), restated in ``trainer/formats/blocks/decode.py``.
"""

import struct
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
WEIGHTS = 256  # of a superblock
_f32 = np.float32


def scale_and_min(scales: bytes, sub_block: int) -> tuple[int, int]:
    """Return the 6-bit scale and min of one of the eight sub-blocks, from Q4_K's 12 scale bytes."""
    if sub_block < 4:
        return scales[sub_block] & 63, scales[sub_block + 4] & 63
    scale = (scales[sub_block + 4] & 15) | ((scales[sub_block - 4] >> 6) << 4)
    minimum = (scales[sub_block + 4] >> 4) | ((scales[sub_block] >> 6) << 4)
    return scale, minimum


def decode_q4_k(blocks: Bytes) -> Floats:
    """Decode uint8 ``[n, 144]`` to float32 ``[n, 256]``, one weight at a time."""
    out = np.empty((len(blocks), 256), np.float32)
    for row, block in enumerate(blocks):
        raw = block.tobytes()
        d, dmin = (_f32(value) for value in struct.unpack_from("<ee", raw))
        for sub_block in range(8):
            scale, minimum = scale_and_min(raw[4:16], sub_block)
            step, offset = d * _f32(scale), dmin * _f32(minimum)
            shift = 4 * (sub_block % 2)
            for lane in range(32):
                nibble = (raw[16 + 32 * (sub_block // 2) + lane] >> shift) & 15
                out[row, 32 * sub_block + lane] = step * _f32(nibble) - offset
    return out


def decode_q6_k(blocks: Bytes) -> Floats:
    """Decode uint8 ``[n, 210]`` to float32 ``[n, 256]``, one weight at a time."""
    out = np.empty((len(blocks), 256), np.float32)
    for row, block in enumerate(blocks):
        raw = block.tobytes()
        scales = struct.unpack_from("<16b", raw, 192)
        d = _f32(struct.unpack_from("<e", raw, 208)[0])
        for index in range(256):
            half, inside = divmod(index, 128)
            quarter, lane = divmod(inside, 32)
            low = (raw[64 * half + 32 * (quarter % 2) + lane] >> (4 * (quarter // 2))) & 15
            high = (raw[128 + 32 * half + lane] >> (2 * quarter)) & 3
            out[row, index] = (d * _f32(scales[index // 16])) * _f32((low | high << 4) - 32)
    return out


DECODERS: dict[str, Callable[[Bytes], Floats]] = {"q4_k": decode_q4_k, "q6_k": decode_q6_k}


def offset_product(blocks: Bytes, activations: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return what a product with all-zero quants must be: minus the sum of dmin * m_j * (block sum j of x).

    Args:
        blocks: Q4_K superblocks with qs = 0, uint8 ``[n, 144]``; each is one row of 256 weights.
        activations: float32 ``[M, 256]``.

    Returns:
        float64 ``[M, n]``. The sums depend on the activations only.
    """
    block_sums = activations.astype(np.float64).reshape(len(activations), 8, 32).sum(-1)
    offsets = np.empty((len(blocks), 8))
    for row, block in enumerate(blocks):
        raw = block.tobytes()
        dmin = struct.unpack_from("<e", raw, 2)[0]
        offsets[row] = [dmin * scale_and_min(raw[4:16], sub_block)[1] for sub_block in range(8)]
    return np.asarray(-block_sums @ offsets.T)


def _with_half(blocks: Bytes, column: int, values: NDArray[np.float16]) -> None:
    blocks[:, column : column + 2] = values.view(np.uint8).reshape(-1, 2)


def sample_blocks(seed: int, count: int = 32) -> dict[str, NDArray[np.generic]]:
    """Make blocks of random bits with finite scales: ordinary, zero, subnormal and maximal ones among them.

    Returns:
        ``q4_k`` uint8 ``[count, 144]``, ``q6_k`` uint8 ``[count, 210]``; ``q4_k-offset``: qs = 0; ``q6_k-zero``: every
        quant at its midpoint 32; ``activations`` float32 ``[5, 256]``.
    """
    rng = np.random.default_rng(seed)
    extremes = np.array([0.0, 6e-8, -6e-8, 6.1e-5, 65504.0, -65504.0], np.float16)
    q4_k = rng.integers(0, 256, (count, 144), dtype=np.uint8)
    q6_k = rng.integers(0, 256, (count, 210), dtype=np.uint8)
    for blocks, column in ((q4_k, 0), (q4_k, 2), (q6_k, 208)):
        values = rng.normal(0, 0.01, count).astype(np.float16)
        values[: len(extremes)] = extremes
        _with_half(blocks, column, values)
    offset = q4_k[len(extremes) :].copy()
    offset[:, 16:] = 0
    zero = q6_k.copy()
    zero[:, 0:128] = 0
    zero[:, 128:192] = 0b10101010
    return {
        "q4_k": q4_k,
        "q6_k": q6_k,
        "q4_k-offset": offset,
        "q6_k-zero": zero,
        "activations": rng.normal(0, 1, (5, 256)).astype(np.float32),
    }
