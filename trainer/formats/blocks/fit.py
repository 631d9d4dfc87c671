"""Least-squares fits of K-quant superblocks: float32 ``[n, 256]`` to packed bytes, all superblocks at once.

Three steps, for each type:

1. per sub-block, try inverse scales around (levels / range), counted from either end of the range; round ``q``; the
   best scale (and min) for that ``q`` is a closed-form weighted least squares. Keep the candidate of least weighted
   squared error;
2. store scales as integers of the superblock's ``d``; try each integer's neighbours with ``q`` rounded anew against the
   values that will really be decoded. A sub-block that shares its superblock with an outlier is saved here: its scale
   would round to zero, and a coarse grid is far better than none;
3. refit ``d`` and ``dmin`` by least squares over the whole superblock, round to float16, and keep what improves.

Weights are ggml's, ``rms(x) + |x|``. The candidate search follows the idea of ggml's ``make_qkx3_quants`` and
``make_qx_quants``; counting from the upper end, and steps 2 and 3, go further. ``top`` is the largest q of a type with
a min: 15 for Q4_K, 31 for Q5_K, 3 for Q2_K. Types without a min are fitted in ``fit_signed.py``.
"""

from collections.abc import Callable
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from q4kd.trainer.errors import InputError

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
_Stored = Callable[[Floats], Floats]

_TINY_HALF = np.float32(2.0**-14)  # float16 is subnormal below this


def refuse_magnitude(scale: float) -> NoReturn:
    """Raise ``InputError`` for a scale beyond float16."""
    expected = "magnitudes that a float16 scale can reach"
    raise InputError("weights", expected=expected, got=f"a scale of {scale:.3g}", remedy="store this tensor as F32")


def normalise(blocks: Floats) -> tuple[Floats, Floats]:
    """Scale each superblock to a largest magnitude of 1, so that no square under- or overflows; return both."""
    unit = np.abs(blocks).max(axis=-1)
    unit = np.where(unit > 0, unit, np.ones_like(unit))
    return blocks / unit[:, None], unit


def to_half(value: Floats) -> Floats:
    """Round to float16 and back; upwards where subnormal, where rounding down would clip the largest sub-block."""
    with np.errstate(over="ignore"):
        half = value.astype(np.float16)
    short = (half.astype(np.float32) < value) & (value < _TINY_HALF)
    half = np.where(short, np.nextafter(half, np.float16(np.inf)), half)
    if not np.isfinite(half).all():
        refuse_magnitude(float(value.max()))
    return half.astype(np.float32)


def divide(above: Floats, below: Floats) -> Floats:
    """Divide, giving 0 where the divisor is 0."""
    return np.divide(above, below, out=np.zeros(np.broadcast(above, below).shape, np.float32), where=below != 0)


def dot(a: Floats, b: Floats) -> Floats:
    """Return the sums of products over the last axis."""
    result: Floats = np.einsum("...k,...k->...", a, b)
    return result


def default_weights(x: Floats) -> Floats:
    """Return ggml's weights of squared errors where no importance is known, ``rms(x) + |x|`` of each sub-block."""
    weights: Floats = np.sqrt(dot(x, x) / x.shape[-1])[..., None] + np.abs(x)
    return weights


def given_weights(blocks: Floats, importance: Floats) -> Floats:
    """Return ggml's weights from the importance of each column, ``importance * sqrt(2 rms(x)^2 + x^2)`` of each block.

    Importances matter relative to each other only; none counts less than a millionth of its block's greatest.
    """
    greatest = importance.max(axis=-1, keepdims=True)
    relative = np.where(greatest > 0, divide(importance, np.broadcast_to(greatest, importance.shape)), 1)
    spread = 2 * dot(blocks, blocks)[..., None] / blocks.shape[-1]
    weights: Floats = np.maximum(relative, np.float32(1e-6)) * np.sqrt(spread + blocks * blocks)
    return weights


def _search_scale_min(x: Floats, w: Floats, top: int) -> tuple[Floats, Floats]:
    """Fit ``x ~ s * q - m`` per sub-block (last axis), q in 0..top, s and m >= 0; return s and m without that axis.

    Levels counted upwards from the least value split what lies near it over two of them; where the greatest value is an
    outlier, one level for all the others is better, and that is found by counting downwards.
    """
    low = np.minimum(x.min(axis=-1), 0)
    span = x.max(axis=-1) - low
    best_s, best_m, best_error = np.zeros_like(low), -low, np.full_like(low, np.inf)
    sum_w, sum_wx = w.sum(axis=-1), dot(w, x)
    above, below = x - low[..., None], (low + span)[..., None] - x
    unit_span = divide(np.ones_like(span), span)
    candidates = [(above, levels, False) for levels in np.linspace(top - 1.6, top + 1.4, 14, dtype=np.float32)]
    candidates += [(below, levels, True) for levels in np.linspace(top - 0.4, top + 1.4, 7, dtype=np.float32)]
    for distance, levels, downwards in candidates:
        steps = np.rint(distance * (levels * unit_span)[..., None])
        q = np.clip(top - steps if downwards else steps, 0, top)
        wq = w * q
        sum_q, sum_qq, sum_qx = wq.sum(axis=-1), dot(wq, q), dot(wq, x)
        det = sum_w * sum_qq - sum_q * sum_q
        solvable = det > 1e-6 * sum_w * sum_qq
        s = divide(sum_w * sum_qx - sum_wx * sum_q, np.where(solvable, det, 0))
        m = divide(sum_q * sum_qx - sum_qq * sum_wx, np.where(solvable, det, 0))
        # Outside the allowed quadrant the optimum lies on an edge: no min, or (when every q is 0) no scale.
        edge = ~solvable | (m < 0) | (s < 0)
        s = np.where(edge, divide(sum_qx, sum_qq), s)
        m = np.where(edge, np.where(sum_qq > 0, 0, -low), m)
        residual = s[..., None] * q - m[..., None] - x
        error = dot(w * residual, residual)
        better = error < best_error
        best_s, best_m = np.where(better, s, best_s), np.where(better, m, best_m)
        best_error = np.where(better, error, best_error)
    return np.maximum(best_s, 0), np.maximum(best_m, 0)


def _round_above_min(x: Floats, w: Floats, step: Floats, floor: Floats, top: int) -> tuple[Floats, Floats]:
    """Round x to ``step * q - floor``, q in 0..top; return q and the weighted squared error of each sub-block."""
    q = np.clip(np.rint((x + floor[..., None]) * divide(np.ones_like(step), step)[..., None]), 0, top)
    residual = step[..., None] * q - floor[..., None] - x
    return q, dot(w * residual, residual)


def fit_q4_k(blocks: Floats, importance: Floats | None = None) -> Bytes:
    """Fit float32 superblocks ``[n, 256]`` as Q4_K: uint8 ``[n, 144]``.

    ``importance``, float32 ``[n, 256]``, weighs squared errors, here and in every fit.

    Raises:
        InputError: when a scale is beyond float16.
    """
    d, dmin, sc, mn, q = _fit_with_mins(blocks, importance, top=15)
    return np.concatenate([_pack_scales(d, dmin, sc, mn), _pack_nibbles(q)], axis=-1)


def fit_q5_k(blocks: Floats, importance: Floats | None = None) -> Bytes:
    """Fit float32 superblocks ``[n, 256]`` as Q5_K: uint8 ``[n, 176]``; sub-block j's fifth bits are bits j.

    Raises:
        InputError: when a scale is beyond float16.
    """
    d, dmin, sc, mn, q = _fit_with_mins(blocks, importance, top=31)
    fifth = np.packbits(q >> 4, axis=1, bitorder="little")[:, 0]
    return np.concatenate([_pack_scales(d, dmin, sc, mn), fifth, _pack_nibbles(q & np.uint8(15))], axis=-1)


def fit_q2_k(blocks: Floats, importance: Floats | None = None) -> Bytes:
    """Fit float32 superblocks ``[n, 256]`` as Q2_K: uint8 ``[n, 84]``; ``decode_low.py`` draws the layout.

    Raises:
        InputError: when a scale is beyond float16.
    """
    d, dmin, sc, mn, q = _fit_with_mins(blocks, importance, top=3, sub_block=16, most=15)
    factors = np.stack([d, dmin], axis=-1).astype("<f2").view(np.uint8)
    return np.concatenate([sc | mn << np.uint8(4), pack_pairs(q.reshape(-1, 2, 4, 32)), factors], axis=-1)


def _fit_with_mins(
    blocks: Floats, importance: Floats | None, *, top: int, sub_block: int = 32, most: int = 63
) -> tuple[Floats, Floats, Bytes, Bytes, Bytes]:
    """Fit superblocks ``[n, 256]``, J sub-blocks each, whose scales and mins are integers up to ``most``.

    Returns:
        d and dmin ``[n]``, scales and mins ``[n, J]``, and q ``[n, J, sub_block]``, up to ``top``.
    """
    normal, unit = normalise(blocks)
    x = normal.reshape(len(blocks), -1, sub_block)
    w = default_weights(x) if importance is None else given_weights(normal, importance).reshape(x.shape)
    s, m = _search_scale_min(x, w, top)

    def stored(value: Floats) -> Floats:
        """Return what float16 makes of a superblock's scale, in normalised units."""
        return to_half(value * unit) / unit

    d, dmin = stored(s.max(axis=-1) / most), stored(m.max(axis=-1) / most)
    sc = np.clip(np.rint(divide(s, d[:, None])), 0, most)
    mn = np.clip(np.rint(divide(m, dmin[:, None])), 0, most)
    for _ in range(2):
        sc, mn = _nearby_scale_min(x, w, d, dmin, sc, mn, top, most)
        d, dmin = _refit_scale_min(x, w, d, dmin, sc, mn, stored, top)
    sc, mn = _nearby_scale_min(x, w, d, dmin, sc, mn, top, most)
    q, _error = _round_above_min(x, w, d[:, None] * sc, dmin[:, None] * mn, top)
    return d * unit, dmin * unit, sc.astype(np.uint8), mn.astype(np.uint8), q.astype(np.uint8)


def _nearby_scale_min(
    x: Floats, w: Floats, d: Floats, dmin: Floats, sc: Floats, mn: Floats, top: int, most: int
) -> tuple[Floats, Floats]:
    """Move each sub-block's integer scale and min by at most one, to where the decoded error is least.

    One candidate is further away: a sub-block too small for its superblock's ``d`` is best decoded flat, as its mean.
    """
    best_sc, best_mn = sc, mn
    best_error = np.full(sc.shape, np.inf, dtype=np.float32)
    mean = divide(-dot(w, x), w.sum(axis=-1))
    candidates = [(np.zeros_like(sc), np.rint(divide(mean, dmin[:, None])))]
    candidates += [(sc + np.float32(by), mn + np.float32(up)) for by in (0, 1, -1) for up in (0, 1, -1)]
    for wide_sc, wide_mn in candidates:
        try_sc, try_mn = np.clip(wide_sc, 0, most), np.clip(wide_mn, 0, most)
        _q, error = _round_above_min(x, w, d[:, None] * try_sc, dmin[:, None] * try_mn, top)
        better = error < best_error
        best_sc, best_mn = np.where(better, try_sc, best_sc), np.where(better, try_mn, best_mn)
        best_error = np.where(better, error, best_error)
    return best_sc, best_mn


def _refit_scale_min(
    x: Floats, w: Floats, d: Floats, dmin: Floats, sc: Floats, mn: Floats, stored: _Stored, top: int
) -> tuple[Floats, Floats]:
    """Refit d and dmin by least squares over the superblock; keep them only where the decoded error falls."""
    q, error = _round_above_min(x, w, d[:, None] * sc, dmin[:, None] * mn, top)
    a, b = (sc[..., None] * q).reshape(len(x), -1), np.repeat(mn, x.shape[-1], axis=-1)
    w_flat, x_flat = w.reshape(len(x), -1), x.reshape(len(x), -1)
    aa, ab, bb = dot(w_flat * a, a), dot(w_flat * a, b), dot(w_flat * b, b)
    ax, bx = dot(w_flat * a, x_flat), dot(w_flat * b, x_flat)
    det = aa * bb - ab * ab
    det = np.where(det > 1e-6 * aa * bb, det, 0)
    try_d = np.where(det > 0, divide(ax * bb - ab * bx, det), d)
    try_dmin = np.where(det > 0, divide(ab * ax - aa * bx, det), dmin)
    try_d, try_dmin = stored(np.maximum(try_d, 0)), stored(np.maximum(try_dmin, 0))
    _q, try_error = _round_above_min(x, w, try_d[:, None] * sc, try_dmin[:, None] * mn, top)
    better = try_error.sum(axis=-1) < error.sum(axis=-1)
    return np.where(better, try_d, d), np.where(better, try_dmin, dmin)


def _pack_scales(d: Floats, dmin: Floats, sc: Bytes, mn: Bytes) -> Bytes:
    """Lay out ``half d, dmin | 12 bytes of 6-bit scales and mins``: uint8 ``[n, 16]``.

    The 12 bytes (a: scale, m: min; sub-blocks 0-3 whole, 4-7 as low nibble here and two high bits above):
        0-3   a4a4 a0a0a0a0a0a0      4-7   m4m4 m0m0m0m0m0m0      8-11  m4m4m4m4 a4a4a4a4
    """
    half = np.stack([d, dmin], axis=-1).astype("<f2").view(np.uint8)
    scales = [
        sc[:, :4] | (sc[:, 4:] >> 4) << 6,
        mn[:, :4] | (mn[:, 4:] >> 4) << 6,
        (sc[:, 4:] & 15) | (mn[:, 4:] & 15) << 4,
    ]
    return np.concatenate([half, *scales], axis=-1)


def _pack_nibbles(q: Bytes) -> Bytes:
    """Pack q ``[n, 8, 32]``, below 16: 32 bytes hold sub-block 2i in the low nibbles and 2i + 1 in the high ones."""
    return (q[:, 0::2] | q[:, 1::2] << np.uint8(4)).reshape(len(q), 128)


def pack_pairs(q: Bytes) -> Bytes:
    """Pack q ``[n, halves, 4, 32]``, below 4: ``[n, 32 * halves]``, the first run in the lowest bits."""
    packed: Bytes = np.bitwise_or.reduce(q << np.array([0, 2, 4, 6], np.uint8)[:, None], axis=2)
    return packed.reshape(len(q), -1)
