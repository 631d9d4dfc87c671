"""Decode the remaining types of two to five bits to float32, bit-equal to ``gguf.quants.dequantize``.

Layouts are those of llama.cpp's ``ggml-common.h``, as in ``decode.py``.

Blocks of 32 weights with a scale, and a minimum or a table; nibbles lie as in Q4_0::

    Q4_1, 20 bytes    | d: f16 | m: f16 | qs: 16 bytes |                 weight = d * nibble + m
    Q5_1, 24 bytes    | d: f16 | m: f16 | qh: 32 bits | qs: 16 bytes |   weight = d * (nibble | (qh >> l & 1) << 4) + m
    IQ4_NL, 18 bytes  | d: f16 | qs: 16 bytes |                          weight = d * K[nibble]

K is ggml's ``kvalues_iq4nl``: sixteen levels, closer together around zero.

Q2_K, 84 bytes (2.625 bits a weight), sixteen sub-blocks of 16::

    0                  16                          80       82          84
    | scales: 16 bytes | qs: 64 bytes, 2 halves    | d: f16 | dmin: f16 |
    weight[128h + 32r + l] = (d * (scales[j] & 15)) * (qs[32h + l] >> 2r & 3) - dmin * (scales[j] >> 4)
    j = 8h + 2r + l / 16; h in 0..1, r in 0..3, l in 0..31

Q3_K, 110 bytes (3.4375 bits a weight), sixteen sub-blocks of 16, no offset term::

    0                 32                        96                  108      110
    | hmask: 32 bytes | qs: 64 bytes, as Q2_K's | scales: 12 bytes  | d: f16 |
    weight[128h + 32r + l] = (d * (sc[j] - 32)) * ((qs[32h + l] >> 2r & 3) + 4 * (hmask[l] >> (4h + r) & 1) - 4)

    scales, as bits (A-P: sc 0-15, six bits each)
     0 IIIIAAAA ... 7 PPPPHHHH     8 MMIIEEAA   9 NNJJFFBB   10 OOKKGGCC   11 PPLLHHDD

IQ4_XS, 136 bytes (4.25 bits a weight), eight sub-blocks of 32::

    0        2               4                  8                                    136
    | d: f16 | scales_h: u16 | scales_l: 4 x u8 | qs: 128 bytes, 16 for a sub-block   |
    sc[j] = (scales_l[j / 2] >> 4 (j % 2) & 15) | (scales_h >> 2j & 3) << 4
    weight[32j + l] = (d * (sc[j] - 32)) * K[qs[16j + l] & 15], weight[32j + 16 + l] the same of qs[16j + l] >> 4
"""

import torch
from torch import Tensor

from q4kd.trainer.formats.blocks.bits import fifth_bits, spread_bits, spread_nibbles, spread_pairs
from q4kd.trainer.formats.blocks.layout import IQ4_LEVELS


def decode_q4_1(packed: Tensor, out: Tensor) -> None:
    """Decode Q4_1 blocks: uint8 ``[n, 20]`` to float32 ``[n, 32]``, written to ``out``."""
    _scale_and_raise(spread_nibbles(packed[:, 4:20].contiguous(), 16), packed, out)


def decode_q5_1(packed: Tensor, out: Tensor) -> None:
    """Decode Q5_1 blocks: uint8 ``[n, 24]`` to float32 ``[n, 32]``, written to ``out``."""
    quants = spread_nibbles(packed[:, 8:24].contiguous(), 16)
    _scale_and_raise(quants.bitwise_or_(fifth_bits(packed[:, 4:8])), packed, out)


def _scale_and_raise(quants: Tensor, packed: Tensor, out: Tensor) -> None:
    """Write uint8 ``[n, 32]`` times the first of the two float16 that open each block, plus the second, to ``out``."""
    factors = packed[:, 0:4].view(torch.float16).float()
    out.copy_(quants)
    # Product and sum are rounded one after the other, as in the scalar reference: no fused multiply-add.
    out.mul_(factors[:, 0:1]).add_(factors[:, 1:2])


def decode_q2_k(packed: Tensor, out: Tensor) -> None:
    """Decode Q2_K superblocks: uint8 ``[n, 84]`` to float32 ``[n, 256]``, written to ``out``."""
    factors = packed[:, 80:84].view(torch.float16).float()
    scales = packed[:, 0:16].contiguous()
    steps, offsets = factors[:, 0:1] * (scales & 15), factors[:, 1:2] * (scales >> 4)
    out.copy_(spread_pairs(packed[:, 16:80].contiguous(), 32))
    out.view(-1, 16, 16).mul_(steps.unsqueeze(2)).sub_(offsets.unsqueeze(2))


def unpack_q3_k_scales(packed: Tensor) -> Tensor:
    """Unpack the 12 scale bytes of Q3_K: uint8 ``[n, 12]`` to int8 ``[n, 16]``, -32 to 31."""
    low, high = packed[:, 0:8].contiguous(), packed[:, 8:12].contiguous()
    scales = spread_nibbles(low, 8).bitwise_or_(spread_pairs(high, 4).bitwise_left_shift_(4))
    return scales.view(torch.int8).sub_(32)


def decode_q3_k(packed: Tensor, out: Tensor) -> None:
    """Decode Q3_K superblocks: uint8 ``[n, 110]`` to float32 ``[n, 256]``, written to ``out``."""
    steps = packed[:, 108:110].view(torch.float16).float() * unpack_q3_k_scales(packed[:, 96:108])
    high = spread_bits(packed[:, 0:32].contiguous(), 2)
    quants = spread_pairs(packed[:, 32:96].contiguous(), 32).bitwise_or_(high).view(torch.int8).sub_(4)
    out.copy_(quants)
    out.view(-1, 16, 16).mul_(steps.unsqueeze(2))


def _level_pairs() -> Tensor:
    """Return a table int32 ``[256]``: a byte's two levels as bfloat16, the low nibble's in the lower half."""
    bits = torch.tensor(IQ4_LEVELS, dtype=torch.float32).view(torch.int32)
    byte = torch.arange(256)
    return (bits[byte & 15] >> 16 & 0xFFFF) | bits[byte >> 4]


_LEVEL_PAIRS = _level_pairs()


def _look_up_levels(quants: Tensor, out: Tensor) -> None:
    """Write the levels of the nibbles of uint8 ``[m, 16]`` to float32 ``[m, 32]``, the low nibbles' first.

    bfloat16 holds every level exactly, and is the upper half of the float32: one look-up serves two weights.
    """
    pairs = _LEVEL_PAIRS.to(quants.device).index_select(0, quants.int().view(-1)).view(-1, 16)
    halves = out.view(torch.int32).view(-1, 2, 16)
    torch.bitwise_left_shift(pairs, 16, out=halves[:, 0])
    torch.bitwise_and(pairs, -65536, out=halves[:, 1])


def decode_iq4_nl(packed: Tensor, out: Tensor) -> None:
    """Decode IQ4_NL blocks: uint8 ``[n, 18]`` to float32 ``[n, 32]``, written to ``out``."""
    _look_up_levels(packed[:, 2:18], out)
    out.mul_(packed[:, 0:2].view(torch.float16).float())


def decode_iq4_xs(packed: Tensor, out: Tensor) -> None:
    """Decode IQ4_XS superblocks: uint8 ``[n, 136]`` to float32 ``[n, 256]``, written to ``out``."""
    low = spread_nibbles(packed[:, 4:8].contiguous(), 1)
    high = spread_pairs(packed[:, 2:4].contiguous(), 1)
    scales = low.bitwise_or_(high.bitwise_left_shift_(4)).view(torch.int8).sub_(32)
    steps = packed[:, 0:2].view(torch.float16).float() * scales
    _look_up_levels(packed[:, 8:136].reshape(-1, 16), out.view(-1, 32))
    out.view(-1, 8, 32).mul_(steps.unsqueeze(2))
