"""Bytes to quants, for the decoders: nibbles, pairs of bits and single bits spread over one byte a weight."""

import torch
from torch import Tensor

# torch's byte operations are vectorised over runs of 128: where a block's run is shorter, it is copied first to
# contiguous memory, and the operation then runs over all blocks at once.


def spread_nibbles(packed: Tensor, run: int) -> Tensor:
    """Split bytes into nibbles: uint8 ``[n, b]`` to ``[n, 2b]``, each run's low nibbles before its high ones."""
    source = packed.view(len(packed), -1, run)
    return torch.cat([source & 0x0F, source >> 4], dim=2).view(len(packed), -1)


def spread_pairs(packed: Tensor, run: int) -> Tensor:
    """Split bytes into pairs of bits: uint8 ``[n, b]`` to ``[n, 4b]``, each run's lowest pairs first."""
    source = packed.view(len(packed), -1, run)
    return torch.cat([source, source >> 2, source >> 4, source >> 6], dim=2).bitwise_and_(3).view(len(packed), -1)


def spread_bits(packed: Tensor, place: int) -> Tensor:
    """Split bytes into bits: uint8 ``[n, b]`` to ``[n, 8b]``, the lowest bits of all bytes first.

    A bit that is set becomes ``1 << place``.
    """
    lifted = [packed << (place - bit) if bit <= place else packed >> (bit - place) for bit in range(8)]
    return torch.cat(lifted, dim=1).bitwise_and_(1 << place)


def fifth_bits(packed: Tensor) -> Tensor:
    """Spread the 32 bits of uint8 ``[n, 4]``, each byte's lowest first: uint8 ``[n, 32]``, 16 where a bit is set."""
    spread = _FIFTH_BITS.to(packed.device).index_select(0, packed.int().view(-1))
    return spread.view(torch.uint8).view(-1, 32)


def _fifth_bits() -> Tensor:
    """Return a table int64 ``[256]``: eight bytes for each byte's eight bits, 16 where the bit is set."""
    byte = torch.arange(256).unsqueeze(1)
    return ((byte >> torch.arange(8) & 1) << 4).to(torch.uint8).view(torch.int64).squeeze(1)


_FIFTH_BITS = _fifth_bits()
