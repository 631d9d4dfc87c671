"""Decode blocks of four-bit floats (MXFP4, NVFP4) and of ternary weights (TQ1_0, TQ2_0).

Layouts are those of llama.cpp's ``ggml-common.h``. A four-bit float E2M1 has one of the magnitudes 0, 1/2, 1, 3/2, 2,
3, 4 and 6, and its fourth bit is the sign; ``E`` is twice that, and scales are halved. Minus zero reads as zero.

MXFP4, 17 bytes for 32 weights (4.25 bits a weight)::

    0       1               17
    | e: u8 | qs: 16 bytes |     weight[l], weight[16 + l] = 2^(e - 128) * E[qs[l] & 15], E[qs[l] >> 4]

NVFP4, 36 bytes for 64 weights (4.5 bits), four sub-blocks of 16 with a scale each::

    0              4               36
    | d: 4 x UE4M3 | qs: 32 bytes |     low nibbles of bytes 8s..8s+7 are the first eight weights of sub-block s,
                                        high ones the rest;  weight = d[s] / 2 * E[nibble]
    UE4M3: d = m / 8 * 2^-6 where the exponent (bits 3..6) is 0, else (1 + m / 8) * 2^(exponent - 7); 0x7F reads as 0

TQ2_0, 66 bytes for 256 weights (2.0625 bits)::

    0               64       66
    | qs: 64 bytes  | d: f16 |     weight[128h + 32n + m] = d * ((qs[32h + m] >> 2n & 3) - 1)

TQ1_0, 54 bytes for 256 weights (1.6875 bits), five base-3 digits a byte, or four in the last ones::

    0               48            52       54
    | qs: 48 bytes  | qh: 4 bytes | d: f16 |     digit(x, n) = (x * 3^n mod 256) * 3 / 256;  weight = d * (digit - 1)
    weight[32n + m]: qs[m], m < 32;  weight[160 + 16n + m]: qs[32 + m], m < 16;  weight[240 + 4n + m]: qh[m], m < 4
"""

from collections.abc import Callable

import torch
from torch import Tensor

from q4kd.trainer.formats.blocks.bits import spread_nibbles

_E2M1_TWICE = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], dtype=torch.int8)


def _pairs() -> Tensor:
    """Return int64 ``[4096]``: for two nibbles, one a byte, twice their floats as two float32."""
    both, floats = torch.arange(16 << 8), _E2M1_TWICE.float()
    return torch.stack([floats[both & 15], floats[both >> 8]], dim=1).view(torch.int64)[:, 0]


def _ue4m3_halves() -> Tensor:
    """Return half of every UE4M3 number, float32 ``[256]``. The sign bit does not exist, and is not read."""
    byte = torch.arange(256)
    exponent, mantissa = (byte >> 3 & 15).float(), (byte & 7).float()
    value = torch.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * torch.exp2(exponent - 7))
    return torch.where(byte == 0x7F, 0.0, value * 0.5)


_PAIRS = _pairs()
_UE4M3_HALVES = _ue4m3_halves()


def _e8m0_halves() -> Tensor:
    """Return 2^(e - 128), float32 ``[256]``: the first two are subnormal."""
    e = torch.arange(256, dtype=torch.int32)
    return torch.where(e < 2, 0x00200000 << e.clamp(max=1), (e - 1) << 23).view(torch.float32)


_E8M0_HALVES = _e8m0_halves()


def _e2m1(packed: Tensor, run: int, out: Tensor) -> None:
    """Write twice the floats of nibbles ``[n, b]`` to float32 ``[n, 2b]``: each run's low nibbles before its high ones.

    One look-up serves two weights and writes them where they stay.
    """
    nibbles = spread_nibbles(packed, run).view(torch.int16).view(-1).int()
    torch.index_select(_PAIRS.to(packed.device), 0, nibbles, out=out.view(torch.int64).view(-1))


def decode_mxfp4(packed: Tensor, out: Tensor) -> None:
    """Decode MXFP4 blocks: uint8 ``[n, 17]`` to float32 ``[n, 32]``, written to ``out``."""
    _e2m1(packed[:, 1:17], 16, out)
    out.mul_(_E8M0_HALVES.to(packed.device).index_select(0, packed[:, 0].int()).unsqueeze(1))


def decode_nvfp4(packed: Tensor, out: Tensor) -> None:
    """Decode NVFP4 blocks: uint8 ``[n, 36]`` to float32 ``[n, 64]``, written to ``out``."""
    _e2m1(packed[:, 4:36].contiguous(), 8, out)
    scales = _UE4M3_HALVES.to(packed.device).index_select(0, packed[:, 0:4].reshape(-1).int())
    out.view(-1, 16).mul_(scales.unsqueeze(1))


def decode_tq2_0(packed: Tensor, out: Tensor) -> None:
    """Decode TQ2_0 blocks: uint8 ``[n, 66]`` to float32 ``[n, 256]``, written to ``out``."""
    halves = packed[:, 0:64].reshape(-1, 2, 32)
    quants = torch.cat([halves, halves >> 2, halves >> 4, halves >> 6], dim=2).bitwise_and_(3)
    out.copy_(quants.view(torch.int8).sub_(1).view(len(packed), -1))
    out.mul_(packed[:, 64:66].view(torch.float16).float())


def decode_tq1_0(packed: Tensor, out: Tensor) -> None:
    """Decode TQ1_0 blocks: uint8 ``[n, 54]`` to float32 ``[n, 256]``, written to ``out``."""
    bytes_of = packed[:, 0:52].contiguous()
    powers = [bytes_of * power for power in (1, 3, 9, 27, 81)]  # modulo 256
    parts = [powers[n][:, 0:32] for n in range(5)] + [powers[n][:, 32:48] for n in range(5)]
    parts += [powers[n][:, 48:52] for n in range(4)]
    digits = torch.cat(parts, dim=1)
    # digit = x * 3 / 256 without leaving bytes: 1 from 86 on and 2 from 171 on.
    out.copy_((digits >= 86).to(torch.int8).add_(digits >= 171).sub_(1))
    out.mul_(packed[:, 52:54].view(torch.float16).float())


# As ``decode.DECODERS``.
SMALL_DECODERS: dict[str, Callable[[Tensor, Tensor], None]] = {
    "MXFP4": decode_mxfp4,
    "NVFP4": decode_nvfp4,
    "TQ1_0": decode_tq1_0,
    "TQ2_0": decode_tq2_0,
}
