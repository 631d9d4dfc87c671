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

from q4kd.trainer.formats.blocks.bits import (
    PAIRS,
    THIRDS,
    fifth_bits,
    halves,
    in_words,
    join_runs,
    spread_nibbles,
    spread_pairs,
)
from q4kd.trainer.formats.blocks.layout import IQ4_LEVELS


def decode_q4_1(packed: Tensor, out: Tensor) -> None:
    """Decode Q4_1 blocks: uint8 ``[n, 20]`` to float32 ``[n, 32]``, written to ``out``."""
    _scale_and_raise(spread_nibbles(packed[:, 4:20], 16), packed, out)


def decode_q5_1(packed: Tensor, out: Tensor) -> None:
    """Decode Q5_1 blocks: uint8 ``[n, 24]`` to float32 ``[n, 32]``, written to ``out``."""
    quants = spread_nibbles(packed[:, 8:24], 16)
    _scale_and_raise(quants.bitwise_or_(fifth_bits(packed[:, 4:8])), packed, out)


def _scale_and_raise(quants: Tensor, packed: Tensor, out: Tensor) -> None:
    """Write uint8 ``[n, 32]`` times the first of the two float16 that open each block, plus the second, to ``out``."""
    out.copy_(quants)
    # Product and sum are rounded one after the other, as in the scalar reference: no fused multiply-add.
    out.mul_(halves(packed, 0)).add_(halves(packed, 2))


def decode_q2_k(packed: Tensor, out: Tensor) -> None:
    """Decode Q2_K superblocks: uint8 ``[n, 84]`` to float32 ``[n, 256]``, written to ``out``."""
    factors = packed[:, 80:84].view(torch.float16).float()
    scales = packed[:, 0:16].contiguous()
    steps, offsets = factors[:, 0:1] * (scales & 15), factors[:, 1:2] * (scales >> 4)
    out.copy_(spread_pairs(packed[:, 16:80], 32))
    out.view(-1, 16, 16).mul_(steps.unsqueeze(2)).sub_(offsets.unsqueeze(2))


def unpack_q3_k_scales(packed: Tensor) -> Tensor:
    """Unpack the 12 scale bytes of Q3_K: uint8 ``[n, 12]`` to int8 ``[n, 16]``, -32 to 31.

    Two bytes of all blocks are taken at a time, so that every operation runs over whole vectors.
    """
    words = packed.view(torch.int16).t().contiguous()
    low, high = words[0:4], words[4:6]
    scales = torch.cat([low, low >> 4]).bitwise_and_(0x0F0F)
    scales.bitwise_or_(torch.cat([high << 4, high << 2, high, high >> 2]).bitwise_and_(0x3030))
    return scales.t().contiguous().view(torch.int8).sub_(32)


def decode_q3_k(packed: Tensor, out: Tensor) -> None:
    """Decode Q3_K superblocks: uint8 ``[n, 110]`` to float32 ``[n, 256]``, written to ``out``."""
    steps = halves(packed, 108) * unpack_q3_k_scales(packed[:, 96:108])
    mask = in_words(packed[:, 0:32])
    # Bit 2 + r of a byte is the third bit of quarter r, in each half.
    thirds = torch.cat([mask << 2, mask >> 2], dim=1)
    pairs = in_words(packed[:, 32:96])
    quarters = [(pairs >> 2 * r).bitwise_and_(PAIRS).bitwise_or_((thirds >> r).bitwise_and_(THIRDS)) for r in range(4)]
    out.copy_(join_runs(quarters, 32).view(torch.int8).sub_(4))
    out.view(-1, 16, 16).mul_(steps.unsqueeze(2))


def _level_pairs() -> Tensor:
    """Return a table int64 ``[4096]``: for two nibbles, one a byte, their levels as two float32."""
    both, levels = torch.arange(16 << 8), torch.tensor(IQ4_LEVELS, dtype=torch.float32)
    return torch.stack([levels[both & 15], levels[both >> 8]], dim=1).view(torch.int64)[:, 0]


_LEVEL_PAIRS = _level_pairs()


def _look_up_levels(quants: Tensor, out: Tensor) -> None:
    """Write the levels of the nibbles of uint8 ``[m, 16]`` to float32 ``[m, 32]``, the low nibbles' first.

    One look-up serves two weights and writes them where they stay.
    """
    pairs = spread_nibbles(quants, 16).view(torch.int16).view(-1).int()
    torch.index_select(_LEVEL_PAIRS.to(quants.device), 0, pairs, out=out.view(torch.int64).view(-1))


def decode_iq4_nl(packed: Tensor, out: Tensor) -> None:
    """Decode IQ4_NL blocks: uint8 ``[n, 18]`` to float32 ``[n, 32]``, written to ``out``."""
    _look_up_levels(packed[:, 2:18], out)
    out.mul_(halves(packed, 0))


def decode_iq4_xs(packed: Tensor, out: Tensor) -> None:
    """Decode IQ4_XS superblocks: uint8 ``[n, 136]`` to float32 ``[n, 256]``, written to ``out``."""
    low = spread_nibbles(packed[:, 4:8].contiguous(), 1)
    high = spread_pairs(packed[:, 2:4].contiguous(), 1)
    scales = low.bitwise_or_(high.bitwise_left_shift_(4)).view(torch.int8).sub_(32)
    steps = halves(packed, 0) * scales
    _look_up_levels(packed[:, 8:136].reshape(-1, 16), out.view(-1, 32))
    out.view(-1, 8, 32).mul_(steps.unsqueeze(2))
