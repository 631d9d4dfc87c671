"""Least-squares fits of the types without a minimum, ``x ~ d * scale * q``: float32 blocks to packed bytes.

A type is a grid of quants (``Grid``): evenly spaced integers (Q6_K, Q3_K, Q5_0, Q4_0), or the sixteen levels of IQ4_NL
and IQ4_XS. The steps are those of ``fit.py``: inverse scales around the one that puts the peak at an end of the grid
are tried, the best scale for the quants found is a closed-form weighted least squares, and what is stored is refined
against the values that will really be decoded. The idea is that of ggml's ``make_qx_quants`` and
``quantize_row_iq4_nl_impl``.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from q4kd.trainer.formats.blocks.fit import (
    Bytes,
    Floats,
    default_weights,
    divide,
    dot,
    given_weights,
    normalise,
    pack_pairs,
    to_half,
)
from q4kd.trainer.formats.blocks.layout import IQ4_LEVELS

_SIGNED_BYTES = (-128, 127)
_SIX_BITS = (-32, 31)


@dataclass(frozen=True)
class Grid:
    """The values that a quant may take, and the peaks to try.

    Attributes:
        low, high: the first and the last value.
        peaks: float32, values that the block's weight of greatest magnitude is scaled to, signed: a range beyond each
            end that is worth a try.
        levels: the values, float32, where they are not every integer from low to high.
        cells: int64, the number of the level that is nearest to every value of the half-open half steps ``[k / 2,
            (k + 1) / 2)`` from ``low``; the middle between two integer levels is always an end of a half step.
    """

    low: int
    high: int
    peaks: Floats
    levels: Floats | None = None
    cells: npt.NDArray[np.int64] | None = None

    def round(self, x: Floats) -> Floats:
        """Return the nearest value of the grid."""
        if self.levels is None or self.cells is None:
            return np.clip(np.rint(x), self.low, self.high)
        return self.levels.take(self.codes(x))

    def codes(self, x: Floats) -> npt.NDArray[np.int64]:
        """Return the numbers of the nearest values, counted from the lowest."""
        if self.cells is None:
            return (np.clip(np.rint(x), self.low, self.high) - self.low).astype(np.int64)
        cell = np.floor(np.clip(x, self.low, self.high) * 2).astype(np.int64) - 2 * self.low
        return self.cells.take(cell)


def _even(low: int, high: int, *ranges: tuple[float, float, int]) -> Grid:
    peaks = [np.linspace(first, last, count, dtype=np.float32) for first, last, count in ranges]
    return Grid(low, high, np.concatenate(peaks))


def _uneven(levels: tuple[int, ...], *ranges: tuple[float, float, int]) -> Grid:
    values = np.array(levels, np.float32)
    starts = np.arange(2 * levels[0], 2 * levels[-1] + 1) / 2
    cells = np.searchsorted((values[1:] + values[:-1]) / 2, starts, side="right")
    peaks = [np.linspace(first, last, count, dtype=np.float32) for first, last, count in ranges]
    return Grid(levels[0], levels[-1], np.concatenate(peaks), values, cells)


_SIX = _even(-32, 31, (-33.2, -30.2, 21))  # the peak takes the longer side
_FIVE = _even(-16, 15, (-17.2, -14.2, 21))
_FOUR = _even(-8, 7, (-9.0, -6.6, 17), (6.6, 8.0, 6))
_THREE = _even(-4, 3, (-4.9, -2.6, 19), (2.4, 3.6, 8))
_LEVELS = _uneven(IQ4_LEVELS, (-136, -110, 18), (104, 128, 9))


def _search_scale(x: Floats, w: Floats, grid: Grid) -> Floats:
    """Fit ``x ~ s * q``, q on the grid, per sub-block (last axis); return s, without the last axis."""
    peak = np.take_along_axis(x, np.abs(x).argmax(axis=-1)[..., None], axis=-1)[..., 0]
    best_s, best_gain = np.zeros_like(peak), np.zeros_like(peak)
    unit_peak = divide(np.ones_like(peak), peak)
    for target in grid.peaks:
        q = grid.round(x * (target * unit_peak)[..., None])
        wq = w * q
        sum_qx, sum_qq = dot(wq, x), dot(wq, q)
        s = divide(sum_qx, sum_qq)
        gain = s * sum_qx  # the weighted squared error falls from sum(w x^2) by this much
        better = gain > best_gain
        best_s, best_gain = np.where(better, s, best_s), np.where(better, gain, best_gain)
    return best_s


def _scaled(x: Floats, step: Floats) -> Floats:
    return x * divide(np.ones_like(step), step)[..., None]


def _round(x: Floats, w: Floats, step: Floats, grid: Grid) -> tuple[Floats, Floats]:
    """Round x to ``step * q``; return q and the weighted squared error of each sub-block."""
    q = grid.round(_scaled(x, step))
    residual = step[..., None] * q - x
    return q, dot(w * residual, residual)


def _fit_scaled(
    blocks: Floats, importance: Floats | None, sub_block: int, grid: Grid, scales: tuple[int, int]
) -> tuple[Floats, Floats, Bytes]:
    """Fit superblocks ``[n, 256]`` whose sub-blocks have integer scales in the given range.

    Returns:
        d ``[n]``, the scales ``[n, 256 / sub_block]``, and the quants' numbers ``[n, 256 / sub_block, sub_block]``.
    """
    normal, unit = normalise(blocks)
    x = normal.reshape(len(blocks), -1, sub_block)
    w = default_weights(x) if importance is None else given_weights(normal, importance).reshape(x.shape)
    s = _search_scale(x, w, grid)
    least, most = scales
    # The largest scale takes the least number, the longer side, whatever its sign: d carries the sign.
    peak = np.take_along_axis(s, np.abs(s).argmax(axis=-1)[:, None], axis=-1)[:, 0]
    sign = np.where(peak > 0, np.float32(-1), np.float32(1))
    d = sign * to_half(np.abs(peak) * np.float32(-1 / least) * unit) / unit
    sc = np.clip(np.rint(divide(s, d[:, None])), least, most)
    for _ in range(2):
        best_sc, best_error = sc, np.full(sc.shape, np.inf, dtype=np.float32)
        for by in (0, 1, -1):
            try_sc = np.clip(sc + np.float32(by), least, most)
            _q, error = _round(x, w, d[:, None] * try_sc, grid)
            better = error < best_error
            best_sc, best_error = np.where(better, try_sc, best_sc), np.where(better, error, best_error)
        sc = best_sc
        q, error = _round(x, w, d[:, None] * sc, grid)
        a = sc[..., None] * q
        fit = np.abs(divide(dot(w * a, x).sum(axis=-1), dot(w * a, a).sum(axis=-1)))
        try_d = sign * to_half(fit * unit) / unit
        _q, try_error = _round(x, w, try_d[:, None] * sc, grid)
        d = np.where(try_error.sum(axis=-1) < error.sum(axis=-1), try_d, d)
    return d * unit, sc, grid.codes(_scaled(x, d[:, None] * sc)).astype(np.uint8)


def fit_q6_k(blocks: Floats, importance: Floats | None = None) -> Bytes:
    """Fit float32 superblocks ``[n, 256]`` as Q6_K: uint8 ``[n, 210]``.

    Lays out ``128 bytes of low nibbles | 64 bytes of high pairs | 16 int8 scales | half d``. Each half of the
    superblock has four runs of 32, A B C D: its 64 bytes of nibbles are ``C|A`` then ``D|B``, and its 32 bytes of pairs
    are ``D|C|B|A``, high bits first.

    Raises:
        InputError: when a scale is beyond float16.
    """
    d, sc, q = _fit_scaled(blocks, importance, 16, _SIX, _SIGNED_BYTES)
    runs = q.reshape(-1, 2, 4, 32)
    low = (runs[:, :, :2] & 15) | (runs[:, :, 2:] & 15) << 4
    scales = sc.astype(np.int8).view(np.uint8)
    return np.concatenate([low.reshape(-1, 128), pack_pairs(runs >> np.uint8(4)), scales, _pack_half(d)], axis=-1)


def fit_q3_k(blocks: Floats, importance: Floats | None = None) -> Bytes:
    """Fit float32 superblocks ``[n, 256]`` as Q3_K: uint8 ``[n, 110]``; ``decode_low.py`` draws the layout.

    Raises:
        InputError: when a scale is beyond float16.
    """
    d, sc, q = _fit_scaled(blocks, importance, 16, _THREE, _SIX_BITS)
    codes = (sc + 32).astype(np.uint8)
    low = (codes[:, :8] & 15) | (codes[:, 8:] & 15) << 4
    high = codes.reshape(-1, 4, 4) >> 4 << np.array([0, 2, 4, 6], np.uint8)[:, None]
    mask = np.packbits(q.reshape(-1, 8, 32) >> 2, axis=1, bitorder="little")[:, 0]
    pairs = pack_pairs(q.reshape(-1, 2, 4, 32) & np.uint8(3))
    return np.concatenate([mask, pairs, low, np.bitwise_or.reduce(high, axis=1), _pack_half(d)], axis=-1)


def fit_iq4_xs(blocks: Floats, importance: Floats | None = None) -> Bytes:
    """Fit float32 superblocks ``[n, 256]`` as IQ4_XS: uint8 ``[n, 136]``; ``decode_low.py`` draws the layout.

    Raises:
        InputError: when a scale is beyond float16.
    """
    d, sc, q = _fit_scaled(blocks, importance, 32, _LEVELS, _SIX_BITS)
    codes = (sc + 32).astype(np.uint8)
    low = (codes[:, 0::2] & 15) | (codes[:, 1::2] & 15) << 4
    high = codes.reshape(-1, 2, 4) >> 4 << np.array([0, 2, 4, 6], np.uint8)
    nibbles = _pack_nibbles(q.reshape(-1, 32)).reshape(-1, 128)
    return np.concatenate([_pack_half(d), np.bitwise_or.reduce(high, axis=2), low, nibbles], axis=-1)


def _fit_single(blocks: Floats, importance: Floats | None, grid: Grid) -> tuple[Floats, Bytes]:
    """Fit blocks ``[n, 32]`` with one float16 scale each; return the scales ``[n]`` and the quants' numbers."""
    x, unit = normalise(blocks)
    w = default_weights(x) if importance is None else given_weights(x, importance)
    s = _search_scale(x, w, grid)
    best_d = np.zeros_like(s)
    best_error = dot(w * x, x)
    for _ in range(2):
        d = np.sign(s) * to_half(np.abs(s) * unit) / unit
        q, error = _round(x, w, d, grid)
        better = error < best_error
        best_d, best_error = np.where(better, d, best_d), np.where(better, error, best_error)
        s = divide(dot(w * q, x), dot(w * q, q))  # refit to what the stored scale rounds to
    return best_d * unit, grid.codes(_scaled(x, best_d)).astype(np.uint8)


def fit_q4_0(blocks: Floats, importance: Floats | None = None) -> Bytes:
    """Fit float32 blocks ``[n, 32]`` as Q4_0: uint8 ``[n, 18]``.

    Raises:
        InputError: when a scale is beyond float16.
    """
    d, q = _fit_single(blocks, importance, _FOUR)
    return np.concatenate([_pack_half(d), _pack_nibbles(q)], axis=-1)


def fit_q5_0(blocks: Floats, importance: Floats | None = None) -> Bytes:
    """Fit float32 blocks ``[n, 32]`` as Q5_0: uint8 ``[n, 22]``.

    Raises:
        InputError: when a scale is beyond float16.
    """
    d, q = _fit_single(blocks, importance, _FIVE)
    fifth = np.packbits(q >> 4, axis=-1, bitorder="little")
    return np.concatenate([_pack_half(d), fifth, _pack_nibbles(q & np.uint8(15))], axis=-1)


def fit_iq4_nl(blocks: Floats, importance: Floats | None = None) -> Bytes:
    """Fit float32 blocks ``[n, 32]`` as IQ4_NL: uint8 ``[n, 18]``.

    Raises:
        InputError: when a scale is beyond float16.
    """
    d, q = _fit_single(blocks, importance, _LEVELS)
    return np.concatenate([_pack_half(d), _pack_nibbles(q)], axis=-1)


def _pack_half(d: Floats) -> Bytes:
    return d[:, None].astype("<f2").view(np.uint8)


def _pack_nibbles(q: Bytes) -> Bytes:
    """Pack q ``[n, 32]``, below 16: byte l holds weight l in its low nibble and weight 16 + l in its high one."""
    return q[:, :16] | q[:, 16:] << np.uint8(4)
