"""The remaining blocks of two to five bits by the letter of the layout: scalar decoders, and test blocks.

As in ``block_spec.py``, no code is shared with the trainer or with gguf. Layout: llama.cpp ``ggml-common.h``
(block_q4_1, block_q5_1, block_q2_K, block_q3_K, block_iq4_nl, block_iq4_xs), restated in
``trainer/formats/blocks/decode_low.py``.
"""

import struct
from collections.abc import Callable

import numpy as np

from q4kd.harness.oracles.block_spec import WEIGHTS, Bytes, Floats

_f32 = np.float32
# ggml's kvalues_iq4nl, which the format fixes.
LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _nibble(quants: bytes, index: int) -> int:
    """Return the quant of one of 32 weights: 16 bytes, whose low nibbles come first."""
    return (quants[index % 16] >> (4 * (index // 16))) & 15


def _halves(raw: bytes, at: int) -> tuple[_f32, ...]:
    return tuple(_f32(value) for value in struct.unpack_from("<ee", raw, at))


def weight_q4_1(raw: bytes, index: int) -> _f32:
    """Decode one weight of a block of Q4_1."""
    d, m = _halves(raw, 0)
    return d * _f32(_nibble(raw[4:], index)) + m


def weight_q5_1(raw: bytes, index: int) -> _f32:
    """Decode one weight of a block of Q5_1."""
    d, m = _halves(raw, 0)
    fifth = (struct.unpack_from("<I", raw, 4)[0] >> index) & 1
    return d * _f32(_nibble(raw[8:], index) + 16 * fifth) + m


def weight_iq4_nl(raw: bytes, index: int) -> _f32:
    """Decode one weight of a block of IQ4_NL."""
    return _f32(struct.unpack_from("<e", raw)[0]) * _f32(LEVELS[_nibble(raw[2:], index)])


def _pair(quants: bytes, index: int) -> int:
    """Return two bits of one of 256 weights: 64 bytes in two halves, each four rounds of 32 weights."""
    half, inside = divmod(index, 128)
    return (quants[32 * half + inside % 32] >> (2 * (inside // 32))) & 3


def weight_q2_k(raw: bytes, index: int) -> _f32:
    """Decode one weight of a superblock of Q2_K."""
    d, dmin = _halves(raw, 80)
    scale = raw[index // 16]
    return (d * _f32(scale & 15)) * _f32(_pair(raw[16:80], index)) - dmin * _f32(scale >> 4)


def weight_q3_k(raw: bytes, index: int) -> _f32:
    """Decode one weight of a superblock of Q3_K."""
    group, scales = index // 16, raw[96:108]
    low = scales[group] & 15 if group < 8 else scales[group - 8] >> 4
    high = (scales[8 + group % 4] >> (2 * (group // 4))) & 3
    present = (raw[index % 32] >> (index // 32)) & 1
    step = _f32(struct.unpack_from("<e", raw, 108)[0]) * _f32(low + 16 * high - 32)
    return step * _f32(_pair(raw[32:96], index) - (0 if present else 4))


def weight_iq4_xs(raw: bytes, index: int) -> _f32:
    """Decode one weight of a superblock of IQ4_XS."""
    d, high = struct.unpack_from("<eH", raw)
    group = index // 32
    low = (raw[4 + group // 2] >> (4 * (group % 2))) & 15
    step = _f32(d) * _f32(low + 16 * ((high >> (2 * group)) & 3) - 32)
    return step * _f32(LEVELS[_nibble(raw[8 + 16 * group :], index % 32)])


# name -> (bytes of a block, weights of a block, where its float16 numbers lie, decoder of one weight)
LOW_SPECS: dict[str, tuple[int, int, tuple[int, ...], Callable[[bytes, int], _f32]]] = {
    "q4_1": (20, 32, (0, 2), weight_q4_1),
    "q5_1": (24, 32, (0, 2), weight_q5_1),
    "iq4_nl": (18, 32, (0,), weight_iq4_nl),
    "q2_k": (84, WEIGHTS, (80, 82), weight_q2_k),
    "q3_k": (110, WEIGHTS, (108,), weight_q3_k),
    "iq4_xs": (136, WEIGHTS, (0,), weight_iq4_xs),
}
EXTREMES = (0.0, -0.0, 6e-8, -6e-8, 6.1e-5, 65504.0, -65504.0)


def decode_low(name: str, rows: Bytes) -> Floats:
    """Decode uint8 ``[R, row_bytes]`` to float32 ``[R, K]``, one weight at a time."""
    size, weights, _, weight = LOW_SPECS[name]
    out = np.empty((len(rows), rows.shape[1] // size, weights), np.float32)
    for at in np.ndindex(out.shape[:2]):
        raw = rows[at[0], at[1] * size : (at[1] + 1) * size].tobytes()
        out[at] = [weight(raw, index) for index in range(weights)]
    return out.reshape(len(rows), -1)


def sample_low_rows(seed: int, count: int = 12) -> dict[str, Bytes]:
    """Make rows of 256 random weights of every type, uint8 ``[count, row_bytes]``.

    The scales are finite: in the first rows zero, subnormal or the greatest, each beside another, elsewhere ordinary.
    """
    rng = np.random.default_rng(seed)
    samples = {}
    for name, (size, weights, places, _) in LOW_SPECS.items():
        blocks = rng.integers(0, 256, (count * WEIGHTS // weights, size), dtype=np.uint8)
        extreme = len(EXTREMES) * WEIGHTS // weights
        for place in places:
            values = rng.normal(0, 0.01, len(blocks))
            values[:extreme] = rng.permutation(np.repeat(EXTREMES, WEIGHTS // weights))
            blocks[:, place : place + 2] = values.astype(np.float16).view(np.uint8).reshape(-1, 2)
        samples[name] = blocks.reshape(count, -1)
    return samples
