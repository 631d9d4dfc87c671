"""Finds scales that are no usable numbers: one NaN, or a norm's weight of 3e38, makes every logit NaN.

A load checks them. Only the scales' own bytes are read, and nothing is decoded. A weight is finite when its block's
scales are, since the largest product of a float16 scale, a stored integer scale and a quant is below 1e9. Types that
hold larger weights (F32, BF16, MXFP4) have to keep below ``LARGEST``.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from q4kd.trainer.formats.blocks.layout import block_format

# So many bytes are checked at once, which bounds what a check allocates whatever the tensor's size.
_CHUNK_BYTES = 8 << 20
# Squares of 65,536 weights below it, scaled by 256 as embeddings may be, add up to a float32. Engines that take larger
# ones end in infinities and NaN; no trained weight comes near.
LARGEST = 2.0**48
# Exponents from here on, in a number's own place, are those of ``LARGEST`` and above; elsewhere only all ones are bad.
_LARGE_EXPONENT = {"F32": 127 + 48 << 23, "BF16": 127 + 48 << 7}
# Each type has the offsets of a block's floating-point numbers, their unsigned storage, and the bits of their exponent.
FLOATS: dict[str, tuple[tuple[int, ...], type[np.unsignedinteger], int]] = {
    "Q4_K": ((0, 2), np.uint16, 0x7C00),
    "Q5_K": ((0, 2), np.uint16, 0x7C00),
    "Q6_K": ((208,), np.uint16, 0x7C00),
    "Q8_0": ((0,), np.uint16, 0x7C00),
    "Q5_0": ((0,), np.uint16, 0x7C00),
    "Q4_0": ((0,), np.uint16, 0x7C00),
    "Q4_1": ((0, 2), np.uint16, 0x7C00),
    "Q5_1": ((0, 2), np.uint16, 0x7C00),
    "Q2_K": ((80, 82), np.uint16, 0x7C00),
    "Q3_K": ((108,), np.uint16, 0x7C00),
    "IQ4_NL": ((0,), np.uint16, 0x7C00),
    "IQ4_XS": ((0,), np.uint16, 0x7C00),
    "BF16": ((0,), np.uint16, 0x7F80),
    "F16": ((0,), np.uint16, 0x7C00),
    "F32": ((0,), np.uint32, 0x7F800000),
}
FLOATS |= dict.fromkeys(("IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_S"), ((0,), np.uint16, 0x7C00))
FLOATS |= {"TQ1_0": ((52,), np.uint16, 0x7C00), "TQ2_0": ((64,), np.uint16, 0x7C00)}
# Types whose scales are no plain floats: which blocks, uint8 ``[n, block_bytes]`` of NumPy or torch, hold one that can
# make a weight NaN or too large. IQ1_M's float16 lies in four parts, its exponent in the last two. MXFP4's scale is
# 2^(e - 128), and its largest quant 12. NVFP4 has none: its scales end at 240, and its only NaN reads as zero.
BAD_BLOCKS: dict[str, Callable[[Any], Any]] = {
    "IQ1_M": lambda blocks: (blocks[:, 53] & 0xC0 == 0xC0) & (blocks[:, 55] & 0x70 == 0x70),
    "MXFP4": lambda blocks: blocks[:, 0] >= 173,
    "NVFP4": lambda blocks: blocks[:, 0] > 0xFF,
}


def check_scales(type_name: str, packed: npt.NDArray[np.uint8]) -> int:
    """Return how many blocks have a scale that is NaN, infinite or gives weights of ``LARGEST`` or more.

    For F32, F16 and BF16 that is how many values are.

    ``packed`` is uint8, contiguous, a whole number of blocks.

    Raises:
        InputError: when the type is not supported.
    """
    size = block_format(type_name).block_bytes
    blocks = packed.reshape(-1, size)
    find = BAD_BLOCKS.get(type_name)
    if find is None:
        offsets, storage, exponent = FLOATS[type_name]
        find = functools.partial(_bad_floats, offsets, storage, exponent, _LARGE_EXPONENT.get(type_name, exponent))
    step = _CHUNK_BYTES // size
    return sum(int(np.count_nonzero(find(blocks[start : start + step]))) for start in range(0, len(blocks), step))


def _bad_floats(
    offsets: tuple[int, ...],
    storage: type[np.unsignedinteger],
    exponent: int,
    least: int,
    blocks: npt.NDArray[np.uint8],
) -> npt.NDArray[np.bool_]:
    """Return which blocks have an exponent of at least ``least``; all ones is that of an infinity or a NaN."""
    width = np.dtype(storage).itemsize
    bad = [(blocks[:, at : at + width].view(storage)[:, 0] & exponent) >= least for at in offsets]
    return np.asarray(bad[0] if len(bad) == 1 else np.logical_or(*bad))
