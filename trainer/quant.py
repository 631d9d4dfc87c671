"""Decode packed GGML blocks to float32 with torch, bit-equal to ``gguf.quants.dequantize``.

Layouts are those of llama.cpp's ``ggml-common.h``; a superblock is 256 weights.

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

Q6_K, 210 bytes (6.5625 bits a weight), sixteen sub-blocks of 16, no offset term::

    0                 128            192                208       210
    | ql: 128 bytes   | qh: 64 bytes | scales: 16 x i8  | d: f16  |
    weight = (d * scale) * (q - 32), q = 4 low bits from ql and 2 high bits from qh
"""

from collections.abc import Callable

import torch
from torch import Tensor

from q4kd.trainer.formats import block_format


def unpack_q4_k_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Unpack the 12 scale bytes of Q4_K: uint8 ``[n, 12]`` to 6-bit scales and mins, uint8 ``[n, 8]`` each."""
    low_scales, low_mins, high_nibbles = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat([low_scales & 0x3F, (high_nibbles & 0x0F) | ((low_scales >> 2) & 0x30)], dim=1)
    mins = torch.cat([low_mins & 0x3F, (high_nibbles >> 4) | ((low_mins >> 2) & 0x30)], dim=1)
    return scales, mins


def decode_q4_k(packed: Tensor, out: Tensor) -> None:
    """Decode Q4_K superblocks: uint8 ``[n, 144]`` to float32 ``[n, 256]``, written to ``out``."""
    count = packed.shape[0]
    d = packed[:, 0:2].view(torch.float16).float()
    dmin = packed[:, 2:4].view(torch.float16).float()
    scales, mins = unpack_q4_k_scales(packed[:, 4:16])
    quants = packed[:, 16:144].view(count, 4, 32)
    halves = out.view(count, 4, 2, 32)
    halves[:, :, 0].copy_(quants & 0x0F)
    halves[:, :, 1].copy_(quants >> 4)
    # Product and difference are rounded one after the other, as in the scalar reference: no fused multiply-add.
    weights = out.view(count, 8, 32)
    weights.mul_((d * scales).unsqueeze(2)).sub_((dmin * mins).unsqueeze(2))


def decode_q6_k(packed: Tensor, out: Tensor) -> None:
    """Decode Q6_K superblocks: uint8 ``[n, 210]`` to float32 ``[n, 256]``, written to ``out``."""
    count = packed.shape[0]
    low = packed[:, 0:128].view(count, 2, 2, 32)
    high = packed[:, 128:192].view(count, 2, 32)
    scales = packed[:, 192:208].view(torch.int8)
    d = packed[:, 208:210].view(torch.float16).float()
    quarters = out.view(count, 2, 4, 32)
    for quarter in range(4):
        nibble = low[:, :, quarter % 2] & 0x0F if quarter < 2 else low[:, :, quarter % 2] >> 4
        quarters[:, :, quarter].copy_(nibble | (((high >> (2 * quarter)) & 0x03) << 4))
    weights = out.view(count, 16, 16)
    weights.sub_(32.0).mul_((d * scales).unsqueeze(2))


def decode_f16(packed: Tensor, out: Tensor) -> None:
    """Widen float16: uint8 ``[n, 2]`` to float32 ``[n, 1]``, written to ``out``."""
    out.copy_(packed.view(torch.float16))


def decode_f32(packed: Tensor, out: Tensor) -> None:
    """Copy float32: uint8 ``[n, 4]`` to float32 ``[n, 1]``, written to ``out``."""
    out.copy_(packed.view(torch.float32))


# type name -> (packed uint8 [n, block_bytes], out float32 [n, block_size]) -> None; writes every element of out
DECODERS: dict[str, Callable[[Tensor, Tensor], None]] = {
    "Q4_K": decode_q4_k,
    "Q6_K": decode_q6_k,
    "F16": decode_f16,
    "F32": decode_f32,
}


def decode_rows(type_name: str, packed: Tensor, out: Tensor) -> Tensor:
    """Decode whole rows.

    Args:
        type_name: GGML type of ``packed``.
        packed: uint8 ``[rows, row_bytes]``, contiguous.
        out: float32 ``[rows, cols]``, contiguous; every element is written.

    Returns:
        ``out``.

    Raises:
        InputError: when the type has no decoder.
    """
    form = block_format(type_name)
    DECODERS[type_name](packed.view(-1, form.block_bytes), out.view(-1, form.block_size))
    return out
