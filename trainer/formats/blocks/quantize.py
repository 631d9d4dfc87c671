"""Quantisation of float32 weights: the inverse of ``gguf.quants.dequantize``, which ``gguf`` has for few types.

A superblock is 256 consecutive weights of one row, a block 32; they decode as (ggml ``block_q4_K`` and so on)

    Q4_K    y = d * sc[j] * q - dmin * m[j]    q in 0..15,   8 sub-blocks of 32, sc and m in 0..63     144 bytes
    Q5_K    as Q4_K                            q in 0..31                                              176 bytes
    Q2_K    as Q4_K                            q in 0..3,    16 sub-blocks of 16, sc and m in 0..15     84 bytes
    Q6_K    y = d * sc[j] * q                  q in -32..31, 16 sub-blocks of 16, sc in -128..127      210 bytes
    Q3_K    as Q6_K                            q in -4..3,   sc in -32..31                             110 bytes
    IQ4_XS  as Q6_K                            q one of 16 levels, 8 sub-blocks of 32, sc in -32..31   136 bytes
    Q5_0    y = d * q                          q in -16..15, a block of 32                              22 bytes
    Q4_0    as Q5_0                            q in -8..7                                               18 bytes
    IQ4_NL  as Q5_0                            q one of 16 levels                                       18 bytes

with ``d`` and ``dmin`` in float16; ``fit.py`` and ``fit_signed.py`` fit them. Q8_0, Q5_1 and Q4_1 are the
gguf package's own quantisers, which search nothing.

On 4096 x 256 weights from N(0, 1), seed 0, the relative round-trip error is 0.0700 in Q4_K, 0.0345 in Q5_K and 0.0170
in Q6_K.
"""

import gguf
import numpy as np
import numpy.typing as npt

from q4kd.trainer.errors import InputError
from q4kd.trainer.formats.blocks import fit, fit_signed
from q4kd.trainer.formats.blocks.fit import Bytes, Floats, refuse_magnitude
from q4kd.trainer.formats.blocks.layout import SUPERBLOCK
from q4kd.trainer.formats.blocks.scales import check_scales

# type name -> (float32 blocks [n, weights], their importance or nothing) -> uint8 [n, block bytes]
_FITS = {
    "Q4_K": fit.fit_q4_k,
    "Q5_K": fit.fit_q5_k,
    "Q6_K": fit_signed.fit_q6_k,
    "Q2_K": fit.fit_q2_k,
    "Q3_K": fit_signed.fit_q3_k,
    "IQ4_XS": fit_signed.fit_iq4_xs,
    "Q5_0": fit_signed.fit_q5_0,
    "Q4_0": fit_signed.fit_q4_0,
    "IQ4_NL": fit_signed.fit_iq4_nl,
}
_BY_GGUF = ("Q8_0", "Q5_1", "Q4_1")
# These are the weights and bytes per block of what this module writes.
BLOCK = {name: gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] for name in (*_FITS, *_BY_GGUF)}
# Weights fitted at once: their arrays stay within a core's cache, and memory is bounded whatever the tensor's size.
_CHUNK_WEIGHTS = 512 * SUPERBLOCK


def quantize(
    weights: Floats, quant_type: str, importance: Floats | None = None
) -> npt.NDArray[np.uint8 | np.float16 | np.float32]:
    """Store float32 weights as ``quant_type``.

    Args:
        weights: float32 ``[rows, cols]``; any shape for "F16" and "F32".
        quant_type: a key of ``BLOCK``: uint8 rows of whole blocks are returned; "F16" or "F32": the same shape is.
        importance: float32 ``[cols]``, finite and not negative: how much squared errors of a column's weights count.
            Types that search no scale do not use it.

    Raises:
        InputError: for another type; for NaN or infinite values; for an array that is not a float32 matrix of whole
            blocks; for magnitudes that "F16", or a block's float16 scale (about 4e6 for Q4_K), cannot hold.
    """
    if quant_type in _FITS:
        return _quantize_rows(weights, quant_type, importance)
    if quant_type not in (*_BY_GGUF, "F16", "F32"):
        expected = f"{', '.join(BLOCK)}, F16 or F32"
        raise InputError("quantisation type", expected=expected, got=quant_type, remedy="choose one of these")
    _refuse_non_finite(weights)
    if quant_type in _BY_GGUF:
        _refuse_shape(weights, quant_type)
        return _quantize_by_gguf(weights, quant_type)
    if quant_type == "F32":
        return np.ascontiguousarray(weights, dtype=np.float32)
    if weights.size and np.abs(weights).max() >= 65520:  # From here on, float16 rounds to infinity.
        got = f"{np.abs(weights).max():.3g}"
        raise InputError("weights", expected="magnitudes below 65520", got=got, remedy="store them as F32")
    return np.ascontiguousarray(weights, dtype=np.float16)


def round_trip_error(weights: Floats, quant_type: str) -> float:
    """Return ``||w - dq(q(w))|| / ||w||`` (Frobenius), decoded by ``gguf.quants.dequantize``; 0 for all-zero input."""
    stored = quantize(weights, quant_type)
    decoded = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[quant_type])
    norm = float(np.linalg.norm(weights.astype(np.float64)))
    return float(np.linalg.norm(weights.astype(np.float64) - decoded)) / norm if norm else float(np.abs(decoded).max())


def _refuse_non_finite(weights: Floats) -> None:
    if not np.isfinite(weights).all():
        got = f"{int(weights.size - np.isfinite(weights).sum())} NaN or infinite"
        raise InputError("weights", expected="finite values", got=got, remedy="export an earlier checkpoint")


def _refuse_shape(weights: Floats, quant_type: str) -> None:
    width = BLOCK[quant_type][0]
    if weights.ndim != 2 or weights.dtype != np.float32 or weights.shape[1] == 0 or weights.shape[1] % width:
        expected, got = f"a float32 matrix with a multiple of {width} columns", f"{weights.dtype} {list(weights.shape)}"
        remedy = "store this tensor as F16"
        raise InputError(f"weights for {quant_type}", expected=expected, got=got, remedy=remedy)


def _quantize_by_gguf(weights: Floats, quant_type: str) -> Bytes:
    with np.errstate(over="ignore"):
        stored: Bytes = gguf.quants.quantize(weights, gguf.GGMLQuantizationType[quant_type])
    if check_scales(quant_type, stored):
        levels = {"Q8_0": 127, "Q5_1": 31, "Q4_1": 15}[quant_type]
        refuse_magnitude(float(np.abs(weights).max()) / levels)
    return stored


def _quantize_rows(weights: Floats, quant_type: str, importance: Floats | None) -> Bytes:
    """Check the input, cut it into blocks ``[n, width]`` and fit them chunk by chunk."""
    _refuse_shape(weights, quant_type)
    rows, cols = weights.shape
    width, size = BLOCK[quant_type]
    flat = np.ascontiguousarray(weights).reshape(-1, width)
    by_column = None if importance is None else importance.astype(np.float32).reshape(-1, width)
    out = np.empty((len(flat), size), dtype=np.uint8)
    for start in range(0, len(flat), _CHUNK_WEIGHTS // width):
        piece = flat[start : start + _CHUNK_WEIGHTS // width]
        _refuse_non_finite(piece)
        place = np.arange(start, start + len(piece))
        known = () if by_column is None else (by_column[place % len(by_column)],)
        out[start : start + len(piece)] = _FITS[quant_type](piece, *known)
    return out.reshape(rows, cols // width * size)
