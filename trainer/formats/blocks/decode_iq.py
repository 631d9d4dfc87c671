"""Decode the IQ types: every eight weights are a point of a grid, or two of four, with signs and a block's scale.

Layouts are those of llama.cpp's ``ggml-common.h``; all blocks hold 256 weights. Weights are counted in *octets* of
eight, o = 0..31; ``b = o / 4`` is their sub-block of 32, ``g = o / 2`` their group of 16, ``l = o % 4``.
``nibble(x, i)`` is four bits of byte ``i / 2``, the low ones where i is even. ``even(s)`` is s with an eighth bit that
makes the number of ones even. Bit i of an octet's signs says that its weight i is negative. The grids are in
``grids.py``.

IQ3_S, 110 bytes (3.4375 bits a weight)::

    0        2               66             74               106               110
    | d: f16 | qs: 64 bytes  | qh: 8 bytes  | signs: 32 bytes | scales: 4 bytes |
    points qs[2o] | (qh[b] >> 2l & 1) << 8 and qs[2o+1] | (qh[b] >> 2l+1 & 1) << 8;  signs[o]
    weight = d * (1 + 2 nibble(scales, b)) * (+-point)

IQ3_XXS, 98 bytes (3.0625 bits)::

    0        2               66                               98
    | d: f16 | qs: 64 bytes  | 8 words: signs 4 x 7, scale: 4 |
    points qs[2o] and qs[2o+1];  signs even(word[b] >> 7l & 127)
    weight = d * (1/2 + (word[b] >> 28)) / 2 * (+-point)

IQ2_S, 82 bytes (2.5625 bits)::

    0        2              34                66            74               82
    | d: f16 | qs: 32 bytes | signs: 32 bytes | qh: 8 bytes | scales: 8 bytes |
    point qs[o] | (qh[b] >> 2l & 3) << 8;  signs[o];  weight = d * (1/2 + nibble(scales, g)) / 4 * (+-point)

IQ2_XS, 74 bytes (2.3125 bits)::

    0        2                66               74
    | d: f16 | 32 words: u16  | scales: 8 bytes |
    point word[o] & 511;  signs even(word[o] >> 9);  weight = d * (1/2 + nibble(scales, g)) / 4 * (+-point)

IQ2_XXS, 66 bytes (2.0625 bits)::

    0        2                                                    66
    | d: f16 | 8 pairs: points 4 x u8, then signs 4 x 7, scale: 4 |
    point byte l of pair b;  signs even(word[b] >> 7l & 127);  weight = d * (1/2 + (word[b] >> 28)) / 4 * (+-point)

IQ1_S, 50 bytes (1.5625 bits)::

    0        2              34              50
    | d: f16 | qs: 32 bytes | qh: 8 x u16   |     qh[b]: points' high bits 4 x 3, scale: 3, sign of the shift: 1
    point qs[o] | (qh[b] >> 3l & 7) << 8;  weight = d * (1 + 2 (qh[b] >> 12 & 7)) * (point +- 1/8)

IQ1_M, 56 bytes (1.75 bits)::

    0              32              48                56
    | qs: 32 bytes | qh: 16 bytes  | scales: 4 x u16 |     scales[i]: four scales of 3 bits, then four bits of d
    h = nibble(qh, o): point qs[o] | (h & 7) << 8, sign of the shift h & 8
    weight = d * (1 + 2 (scales[g / 4] >> 3 (g % 4) & 7)) * (point +- 1/8);  d: f16, its low four bits from scales[0]

Every step is exact in float32 (a weight needs at most 24 bits), so their order changes nothing.
"""

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from q4kd.trainer.formats.blocks.grids import GRIDS


@functools.cache
def _grid(name: str) -> Tensor:
    """Return a grid's points as whole words: int64 ``[points]`` of eight int8, or int32 of four."""
    points = GRIDS[name].points()
    return torch.from_numpy(points.view(np.int64 if points.shape[1] == 8 else np.int32)[:, 0])


@functools.cache
def _signs() -> Tensor:
    """Return int64 ``[256]``: eight int8, -1 where a bit of the index is set and 1 elsewhere."""
    byte = torch.arange(256).unsqueeze(1)
    return (1 - 2 * (byte >> torch.arange(8) & 1)).to(torch.int8).view(torch.int64)[:, 0]


@functools.cache
def _even_signs() -> Tensor:
    """Return the same for seven bits, int64 ``[128]``: the eighth makes the number of ones even."""
    seven = torch.arange(128)
    ones = sum(seven >> bit & 1 for bit in range(7))
    return _signs()[seven | (ones & 1) << 7]


def _words(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a block's bytes as int32 ``[n, words]``: uint16 as they are, int32 with the sign of their top bit."""
    # A copy, since a view needs strides and a place that are whole words.
    words = packed.clone(memory_format=torch.contiguous_format).view(dtype).int()
    return words if dtype == torch.int32 else words & 0xFFFF


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    """Return int8 ``[n, values]`` for int32 ``[n, points]``."""
    return table.to(index.device).index_select(0, index.reshape(-1)).view(torch.int8).view(len(index), -1)


def _spread(packed: Tensor, *shifts: int, mask: int) -> Tensor:
    """Return int32 ``[n, columns * shifts]``: each column's fields, the first shift first."""
    return (packed.unsqueeze(2) >> torch.tensor(shifts, dtype=torch.int32, device=packed.device) & mask).flatten(1)


def _half(packed: Tensor) -> Tensor:
    return packed[:, 0:2].view(torch.float16).float()


def _scale(out: Tensor, quants: Tensor, scales: Tensor) -> None:
    """Write int8 ``[n, 256]`` times float32 scales ``[n, groups]`` of as many weights each to ``out``."""
    out.copy_(quants)
    out.view(len(out), scales.shape[1], -1).mul_(scales.unsqueeze(2))


def decode_iq3_s(packed: Tensor, out: Tensor) -> None:
    """Decode IQ3_S blocks: uint8 ``[n, 110]`` to float32 ``[n, 256]``, written to ``out``."""
    index = packed[:, 2:66].int() | _spread(packed[:, 66:74].int(), *range(8), mask=1) << 8
    quants = _look_up(_grid("IQ3_S"), index).mul_(_look_up(_signs(), packed[:, 74:106].int()))
    _scale(out, quants, _half(packed) * (1 + 2 * _spread(packed[:, 106:110].int(), 0, 4, mask=15)))


def decode_iq3_xxs(packed: Tensor, out: Tensor) -> None:
    """Decode IQ3_XXS blocks: uint8 ``[n, 98]`` to float32 ``[n, 256]``, written to ``out``."""
    words = _words(packed[:, 66:98], torch.int32)
    signs = _look_up(_even_signs(), _spread(words, 0, 7, 14, 21, mask=127))
    quants = _look_up(_grid("IQ3_XXS"), packed[:, 2:66].int()).mul_(signs)
    _scale(out, quants, _half(packed) * (0.5 + (words >> 28 & 15)) * 0.5)


def decode_iq2_s(packed: Tensor, out: Tensor) -> None:
    """Decode IQ2_S blocks: uint8 ``[n, 82]`` to float32 ``[n, 256]``, written to ``out``."""
    index = packed[:, 2:34].int() | _spread(packed[:, 66:74].int(), 0, 2, 4, 6, mask=3) << 8
    quants = _look_up(_grid("IQ2_S"), index).mul_(_look_up(_signs(), packed[:, 34:66].int()))
    _scale(out, quants, _half(packed) * (0.5 + _spread(packed[:, 74:82].int(), 0, 4, mask=15)) * 0.25)


def decode_iq2_xs(packed: Tensor, out: Tensor) -> None:
    """Decode IQ2_XS blocks: uint8 ``[n, 74]`` to float32 ``[n, 256]``, written to ``out``."""
    words = _words(packed[:, 2:66], torch.int16)
    quants = _look_up(_grid("IQ2_XS"), words & 511).mul_(_look_up(_even_signs(), words >> 9))
    _scale(out, quants, _half(packed) * (0.5 + _spread(packed[:, 66:74].int(), 0, 4, mask=15)) * 0.25)


def decode_iq2_xxs(packed: Tensor, out: Tensor) -> None:
    """Decode IQ2_XXS blocks: uint8 ``[n, 66]`` to float32 ``[n, 256]``, written to ``out``."""
    pairs = packed[:, 2:66].reshape(len(packed), 8, 8)
    words = _words(pairs[:, :, 4:], torch.int32)[:, :, 0]
    signs = _look_up(_even_signs(), _spread(words, 0, 7, 14, 21, mask=127))
    quants = _look_up(_grid("IQ2_XXS"), pairs[:, :, :4].reshape(len(packed), 32).int()).mul_(signs)
    _scale(out, quants, _half(packed) * (0.5 + (words >> 28 & 15)) * 0.25)


@functools.cache
def _shifted_grid() -> Tensor:
    """Return eight times IQ1's points, shifted by 1 and, from 2048 on, by -1: int64 ``[4096]`` of eight int8."""
    points = 8 * torch.from_numpy(GRIDS["IQ1"].points())
    return torch.cat([points + 1, points - 1]).view(torch.int64)[:, 0]


def decode_iq1_s(packed: Tensor, out: Tensor) -> None:
    """Decode IQ1_S blocks: uint8 ``[n, 50]`` to float32 ``[n, 256]``, written to ``out``."""
    high = _words(packed[:, 34:50], torch.int16)
    index = packed[:, 2:34].int() | _spread(high, 0, 3, 6, 9, mask=7) << 8
    index.view(-1, 8, 4).bitwise_or_((high >> 15 << 11).unsqueeze(2))
    quants = _look_up(_shifted_grid(), index)
    _scale(out, quants, _half(packed) * (1 + 2 * (high >> 12 & 7)) * 0.125)


def decode_iq1_m(packed: Tensor, out: Tensor) -> None:
    """Decode IQ1_M blocks: uint8 ``[n, 56]`` to float32 ``[n, 256]``, written to ``out``."""
    words = _words(packed[:, 48:56], torch.int16)
    index = packed[:, 0:32].int() | _spread(packed[:, 32:48].int(), 0, 4, mask=15) << 8
    quants = _look_up(_shifted_grid(), index)
    parts = [(words[:, i : i + 1] >> 12) << 4 * i for i in range(4)]
    d = (parts[0] | parts[1] | parts[2] | parts[3]).to(torch.int16).view(torch.float16).float()
    _scale(out, quants, d * (1 + 2 * _spread(words, 0, 3, 6, 9, mask=7)) * 0.125)


# As ``decode.DECODERS``.
IQ_DECODERS: dict[str, Callable[[Tensor, Tensor], None]] = {
    "IQ3_S": decode_iq3_s,
    "IQ3_XXS": decode_iq3_xxs,
    "IQ2_S": decode_iq2_s,
    "IQ2_XS": decode_iq2_xs,
    "IQ2_XXS": decode_iq2_xxs,
    "IQ1_S": decode_iq1_s,
    "IQ1_M": decode_iq1_m,
}
