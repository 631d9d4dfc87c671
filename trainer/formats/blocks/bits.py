"""Bytes to quants, for the decoders: nibbles, pairs of bits and single bits spread over one byte a weight."""

from collections.abc import Sequence

import torch
from torch import Tensor

# torch's byte operations are vectorised over runs of 128: where a block's run is shorter, it is copied first to
# contiguous memory, and the operation then runs over all blocks at once.


# The low nibble, the lowest pair and the third bit of each byte of a word.
NIBBLES, PAIRS, THIRDS = 0x0F0F0F0F0F0F0F0F, 0x0303030303030303, 0x0404040404040404
# Short runs are moved as elements of this size. torch.cat copies each run by a call of its own: nibbles of Q4_0, in
# runs of 16 bytes, took 0.39 ns a weight instead of 0.31, those of Q6_K, in runs of 64, 0.12 instead of 0.16.
_ELEMENT, _ELEMENT_BYTES = torch.complex128, 16


def join_runs(parts: Sequence[Tensor], run: int) -> Tensor:
    """Join contiguous tensors of equal shape ``[n, b]`` in bytes, of any dtype: uint8 ``[n, parts * b]``.

    Runs of ``run`` bytes, a multiple of 16, are taken from each in turn.
    """
    rows = len(parts[0])
    elements = [part.view(_ELEMENT).view(rows, -1, run // _ELEMENT_BYTES) for part in parts]
    out = elements[0].new_empty(rows, elements[0].shape[1], len(parts), elements[0].shape[2])
    for place, part in enumerate(elements):
        out[:, :, place].copy_(part)
    return out.view(torch.uint8).view(rows, -1)


def in_words(packed: Tensor) -> Tensor:
    """Copy bytes ``[n, b]``, b a multiple of 8, to int64 ``[n, b / 8]``: shifts of words are faster than of bytes."""
    # A copy, since a view needs strides and a place that are whole words.
    return packed.clone(memory_format=torch.contiguous_format).view(torch.int64)


def halves(packed: Tensor, first: int) -> Tensor:
    """Return the float16 at byte ``first`` of each block, uint8 ``[n, b]``, as float32 ``[n, 1]``.

    They are moved together first: the conversion is vectorised for contiguous numbers only.
    """
    return packed[:, first : first + 2].view(torch.int16).contiguous().view(torch.float16).float()


def spread_nibbles(packed: Tensor, run: int) -> Tensor:
    """Split bytes into nibbles: uint8 ``[n, b]`` to ``[n, 2b]``, each run's low nibbles before its high ones."""
    if run != _ELEMENT_BYTES:
        source = packed.view(len(packed), -1, run)
        return torch.cat([source & 0x0F, source >> 4], dim=2).view(len(packed), -1)
    words = in_words(packed)
    return join_runs([words & NIBBLES, (words >> 4).bitwise_and_(NIBBLES)], run)


def spread_pairs(packed: Tensor, run: int) -> Tensor:
    """Split bytes into pairs of bits: uint8 ``[n, b]`` to ``[n, 4b]``, each run's lowest pairs first."""
    if run % _ELEMENT_BYTES:
        source = packed.view(len(packed), -1, run)
        parts = torch.cat([source, source >> 2, source >> 4, source >> 6], dim=2)
        return parts.bitwise_and_(3).view(len(packed), -1)
    words = in_words(packed)
    return join_runs([(words >> shift).bitwise_and_(PAIRS) for shift in (0, 2, 4, 6)], run)


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
