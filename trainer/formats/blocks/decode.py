"""Decode packed GGML blocks to float32 with torch, bit-equal to ``gguf.quants.dequantize``.

Layouts are those of llama.cpp's ``ggml-common.h``; a superblock is 256 weights. ``f16`` is a little-endian half.

Q4_K, 144 bytes (4.5 bits a weight), eight sub-blocks of 32::

    0        2        4                      16                                              144
    | d: f16 | dmin:f16 | scales: 12 bytes    | qs: 128 bytes, 4 groups of 32                |
    weight[64g + l]      = (d * sc[2g])   * (qs[32g + l] & 15) - dmin * m[2g]
    weight[64g + 32 + l] = (d * sc[2g+1]) * (qs[32g + l] >> 4) - dmin * m[2g+1]

    scales, as bits (A-D: sc 0-3, E-H: sc 4-7, a-d / e-h: the mins; six bits each)
     0 EEAAAAAA   4 eeaaaaaa    8 eeeeEEEE
     1 FFBBBBBB   5 ffbbbbbb    9 ffffFFFF
     2 GGCCCCCC   6 ggcccccc   10 ggggGGGG
     3 HHDDDDDD   7 hhdddddd   11 hhhhHHHH

Q5_K, 176 bytes (5.5 bits a weight): Q4_K with a fifth bit, bit j of qh[l] for weight[32j + l]::

    0        2          4                  16              48                            176
    | d: f16 | dmin:f16 | scales: 12 bytes | qh: 32 bytes  | qs: 128 bytes, as in Q4_K   |
    q = nibble of qs | (qh[l] >> j & 1) << 4

Q6_K, 210 bytes (6.5625 bits a weight), sixteen sub-blocks of 16, no offset term::

    0                 128            192                208       210
    | ql: 128 bytes   | qh: 64 bytes | scales: 16 x i8  | d: f16  |
    weight = (d * scale) * (q - 32), q = 4 low bits from ql and 2 high bits from qh

    each half of 128 weights, its 64 bytes of ql and 32 of qh, in quarters of 32:
    quarter 0: ql[l] & 15 | (qh[l] & 3) << 4            quarter 2: ql[l] >> 4      | (qh[l] >> 4 & 3) << 4
    quarter 1: ql[32 + l] & 15 | (qh[l] >> 2 & 3) << 4  quarter 3: ql[32 + l] >> 4 | (qh[l] >> 6) << 4

Blocks of 32 weights, one scale, no sub-blocks::

    Q8_0, 34 bytes   | d: f16 | q: 32 x i8 |                       weight = q * d
    Q5_0, 22 bytes   | d: f16 | qh: 32 bits | qs: 16 bytes |       weight = d * ((nibble | (qh >> l & 1) << 4) - 16)
    Q4_0, 18 bytes   | d: f16 | qs: 16 bytes |                     weight = d * (nibble - 8)
    nibbles: weight[l] from qs[l] & 15, weight[16 + l] from qs[l] >> 4

BF16 is the upper half of a float32. Other modules draw the rest: ``decode_low.py`` Q2_K, Q3_K, Q4_1, Q5_1 and IQ4,
``decode_iq.py`` IQ1 to IQ3, ``decode_small_floats.py`` MXFP4, NVFP4 and TQ.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from q4kd.trainer.formats.blocks import decode_low
from q4kd.trainer.formats.blocks.bits import fifth_bits, halves, spread_bits, spread_nibbles
from q4kd.trainer.formats.blocks.decode_iq import IQ_DECODERS
from q4kd.trainer.formats.blocks.decode_small_floats import SMALL_DECODERS
from q4kd.trainer.formats.blocks.layout import SUPERBLOCK, block_format

# So many weights are decoded at once, 4 MiB of float32: this bounds the temporaries (about 1 MiB each), and is enough
# work to spread the cost of starting some twenty tensor operations.
_WEIGHTS_AT_ONCE = 4096 * SUPERBLOCK


def unpack_q4_k_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Unpack the 12 scale bytes of Q4_K and Q5_K: uint8 ``[n, 12]`` to 6-bit scales and mins, uint8 ``[n, 8]`` each.

    Four bytes are taken at a time: the columns of the bit diagram above are 32-bit words, and sub-blocks 4-7 of an
    output row are the upper half of a 64-bit word.
    """
    words = packed.view(torch.int32).t().contiguous().to(torch.int64)
    low, high = words[:2], words[2:]
    upper = torch.cat([high, high >> 4]).bitwise_and_(0x0F0F0F0F)
    upper.bitwise_or_((low >> 2).bitwise_and_(0x30303030))
    both = upper.bitwise_left_shift_(32).bitwise_or_(low & 0x3F3F3F3F).view(torch.uint8).view(2, -1, 8)
    return both[0], both[1]


def _steps_and_offsets(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``d * sc`` and ``dmin * m`` of Q4_K or Q5_K superblocks, float32 ``[n, 8, 1]`` each."""
    factors = packed[:, 0:4].view(torch.int32).contiguous().view(torch.float16).float()
    scales, mins = unpack_q4_k_scales(packed[:, 4:16])
    return (factors[:, 0:1] * scales).unsqueeze(2), (factors[:, 1:2] * mins).unsqueeze(2)


def decode_q4_k(packed: Tensor, out: Tensor) -> None:
    """Decode Q4_K superblocks: uint8 ``[n, 144]`` to float32 ``[n, 256]``, written to ``out``."""
    steps, offsets = _steps_and_offsets(packed)
    quants = packed[:, 16:144].view(-1, 4, 32)
    halves = out.view(-1, 4, 2, 32)
    halves[:, :, 0].copy_(quants & 0x0F)
    halves[:, :, 1].copy_(quants >> 4)
    # Product and difference are rounded one after the other, as in the scalar reference: no fused multiply-add.
    out.view(-1, 8, 32).mul_(steps).sub_(offsets)


def decode_q5_k(packed: Tensor, out: Tensor) -> None:
    """Decode Q5_K superblocks: uint8 ``[n, 176]`` to float32 ``[n, 256]``, written to ``out``."""
    steps, offsets = _steps_and_offsets(packed)
    quants = spread_nibbles(packed[:, 48:176], 32).bitwise_or_(spread_bits(packed[:, 16:48].contiguous(), 4))
    out.copy_(quants)
    out.view(-1, 8, 32).mul_(steps).sub_(offsets)


def decode_q6_k(packed: Tensor, out: Tensor) -> None:
    """Decode Q6_K superblocks: uint8 ``[n, 210]`` to float32 ``[n, 256]``, written to ``out``."""
    steps = halves(packed, 208) * packed[:, 192:208].view(torch.int8)
    high = packed[:, 128:192].contiguous().view(-1, 2, 32)
    pairs = torch.cat([high << 4, high << 2, high, high >> 2], dim=2).view(-1, SUPERBLOCK).bitwise_and_(0x30)
    quants = spread_nibbles(packed[:, 0:128], 64).bitwise_or_(pairs).view(torch.int8).sub_(32)
    out.copy_(quants)
    out.view(-1, 16, 16).mul_(steps.unsqueeze(2))


def decode_q8_0(packed: Tensor, out: Tensor) -> None:
    """Decode Q8_0 blocks: uint8 ``[n, 34]`` to float32 ``[n, 32]``, written to ``out``."""
    _scale_quants(packed[:, 2:34].view(torch.int8), packed, out)


def decode_q5_0(packed: Tensor, out: Tensor) -> None:
    """Decode Q5_0 blocks: uint8 ``[n, 22]`` to float32 ``[n, 32]``, written to ``out``."""
    quants = spread_nibbles(packed[:, 6:22], 16).bitwise_or_(fifth_bits(packed[:, 2:6]))
    _scale_quants(quants.view(torch.int8).sub_(16), packed, out)


def decode_q4_0(packed: Tensor, out: Tensor) -> None:
    """Decode Q4_0 blocks: uint8 ``[n, 18]`` to float32 ``[n, 32]``, written to ``out``."""
    _scale_quants(spread_nibbles(packed[:, 2:18], 16).view(torch.int8).sub_(8), packed, out)


def _scale_quants(quants: Tensor, packed: Tensor, out: Tensor) -> None:
    """Write int8 ``[n, 32]`` times the float16 scale that each block begins with to ``out``."""
    out.copy_(quants)
    out.mul_(halves(packed, 0))


def decode_bf16(packed: Tensor, out: Tensor) -> None:
    """Widen bfloat16: uint8 ``[n, 2]`` to float32 ``[n, 1]``, written to ``out``."""
    out.copy_(packed.view(torch.bfloat16))


def decode_f16(packed: Tensor, out: Tensor) -> None:
    """Widen float16: uint8 ``[n, 2]`` to float32 ``[n, 1]``, written to ``out``."""
    out.copy_(packed.view(torch.float16))


def decode_f32(packed: Tensor, out: Tensor) -> None:
    """Copy float32: uint8 ``[n, 4]`` to float32 ``[n, 1]``, written to ``out``."""
    out.copy_(packed.view(torch.float32))


# type name -> (packed uint8 [n, block_bytes], out float32 [n, block_size]) -> None; writes every element of out
DECODERS: dict[str, Callable[[Tensor, Tensor], None]] = {
    "Q4_K": decode_q4_k,
    "Q5_K": decode_q5_k,
    "Q6_K": decode_q6_k,
    "Q8_0": decode_q8_0,
    "Q5_0": decode_q5_0,
    "Q4_0": decode_q4_0,
    "Q4_1": decode_low.decode_q4_1,
    "Q5_1": decode_low.decode_q5_1,
    "Q2_K": decode_low.decode_q2_k,
    "Q3_K": decode_low.decode_q3_k,
    "IQ4_NL": decode_low.decode_iq4_nl,
    "IQ4_XS": decode_low.decode_iq4_xs,
    "BF16": decode_bf16,
    "F16": decode_f16,
    "F32": decode_f32,
}
DECODERS |= IQ_DECODERS
DECODERS |= SMALL_DECODERS


def decode_rows(type_name: str, packed: Tensor, out: Tensor, scale: float = 1.0) -> Tensor:
    """Decode whole rows: uint8 ``[rows, row_bytes]`` to float32 ``[rows, cols]``, both contiguous; return ``out``.

    ``scale`` is a factor of the whole tensor, as NVFP4 has one.

    Raises:
        InputError: when the type has no decoder.
    """
    form = block_format(type_name)
    decode = DECODERS[type_name]
    blocks, weights = packed.view(-1, form.block_bytes), out.view(-1, form.block_size)
    step = _WEIGHTS_AT_ONCE // form.block_size
    for start in range(0, len(blocks), step):
        piece = weights[start : start + step]
        decode(blocks[start : start + step], piece)
        if scale != 1.0:
            piece.mul_(scale)
    return out
