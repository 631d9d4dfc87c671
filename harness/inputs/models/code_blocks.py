"""Random blocks of the types whose weights are codes of a table: IQ1 to IQ3, four-bit floats and ternary ones.

The gguf package cannot quantise to most of them.
"""

from collections.abc import Callable

import gguf
import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


def _at(offset: int) -> Callable[[Bytes, NDArray[np.uint16]], None]:
    def place(blocks: Bytes, halves: NDArray[np.uint16]) -> None:
        blocks[:, offset : offset + 2] = halves.view(np.uint8).reshape(-1, 2)

    return place


def _in_parts(blocks: Bytes, halves: NDArray[np.uint16]) -> None:
    """Put four bits each on top of IQ1_M's four scale words."""
    for part in range(4):
        at = 49 + 2 * part
        blocks[:, at] = (blocks[:, at] & 0x0F) | ((halves >> (4 * part) & 15) << 4).astype(np.uint8)


# Where a type's float16 scale lies.
PLACES = {name: _at(0) for name in ("IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_S")}
PLACES |= {"IQ1_M": _in_parts, "TQ1_0": _at(52), "TQ2_0": _at(64)}
CODE_TYPES = (*PLACES, "MXFP4", "NVFP4")
# How many scales of a byte open a block, from and to which random ones are drawn, and by how much one is doubled.
_BYTE_SCALES = {"MXFP4": (1, 126, 129, 1), "NVFP4": (4, 0x30, 0x40, 8)}


def decode(name: str, blocks: Bytes) -> NDArray[np.float32]:
    """Decode uint8 ``[n, block_bytes]`` by the gguf package: float32 ``[n, weights of a block]``."""
    return np.asarray(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name]))


def random_code_blocks(rng: np.random.Generator, name: str, count: int, sigma: float) -> Bytes:
    """Return ``count`` random blocks of one of ``CODE_TYPES``, whose weights have standard deviation about ``sigma``.

    That of MXFP4 and NVFP4 is within a factor of the square root of two, as their scales are changed by powers of two.
    """
    _, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    blocks = rng.integers(0, 256, (count, size), dtype=np.uint8)
    if name in _BYTE_SCALES:
        scales, low, high, doubling = _BYTE_SCALES[name]
        blocks[:, :scales] = rng.integers(low, high, (count, scales), dtype=np.uint8)
        blocks[:, :scales] += np.uint8(doubling * round(np.log2(sigma / float(decode(name, blocks).std()))) % 256)
        return blocks
    place = PLACES[name]
    place(blocks, np.full(count, 1.0, np.float16).view(np.uint16))
    scale = sigma / float(decode(name, blocks).std())
    place(blocks, np.full(count, scale, np.float16).view(np.uint16))
    return blocks


# float16 scales: zeros, subnormals, the least normal one, the greatest, and ordinary ones.
_EXTREME_HALVES = np.array([0x0000, 0x8000, 0x0001, 0x83FF, 0x0400, 0x7BFF, 0xFBFF, 0x2E66], np.uint16)
_EXTREME_E8M0 = np.array([0, 1, 2, 100, 127, 150, 252, 1], np.uint8)
_EXTREME_UE4M3 = np.array([0x00, 0x01, 0x07, 0x08, 0x7E, 0x7F, 0xFF, 0x38], np.uint8)
SAMPLES = len(_EXTREME_HALVES)


def sample_code_blocks(seed: int) -> dict[str, Bytes]:
    """Return eight blocks of random bits for each of ``CODE_TYPES``, by name, with extreme finite scales."""
    rng = np.random.default_rng(seed)
    found: dict[str, Bytes] = {}
    for name in CODE_TYPES:
        _, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
        blocks = rng.integers(0, 256, (SAMPLES, size), dtype=np.uint8)
        if name == "MXFP4":
            blocks[:, 0] = _EXTREME_E8M0
        elif name == "NVFP4":
            blocks[:, 0:4] = np.stack([np.roll(_EXTREME_UE4M3, turn) for turn in range(4)], axis=1)
        else:
            PLACES[name](blocks, _EXTREME_HALVES)
        found[name] = blocks
    return found
