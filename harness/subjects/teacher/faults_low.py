"""Faults in decoding the types of two to five bits, each a mistake that is easily made with its layout."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from q4kd.harness.runs.faults import Call, patch

if TYPE_CHECKING:
    from torch import Tensor

_LOW = "q4kd.trainer.formats.blocks.decode_low"
_DECODERS = "q4kd.trainer.formats.blocks.decode:DECODERS"
_Decode = Callable[["Tensor", "Tensor"], None]


@patch("quantisation", "q2k-mins-dropped", "Q2_K's mins are taken as zero", f"{_LOW}:decode_q2_k", _DECODERS)
def _q2_k_mins_dropped(original: _Decode, packed: "Tensor", out: "Tensor") -> None:
    without = packed.clone()
    without[:, 0:16] &= 0x0F
    original(without, out)


@patch(
    "quantisation", "q3k-mask-inverted", "Q3_K subtracts 4 where its mask has a bit", f"{_LOW}:decode_q3_k", _DECODERS
)
def _q3_k_mask_inverted(original: _Decode, packed: "Tensor", out: "Tensor") -> None:
    inverted = packed.clone()
    inverted[:, 0:32] ^= 0xFF
    original(inverted, out)


@patch("quantisation", "q3k-scales-low", "Q3_K's scales lose their two high bits", f"{_LOW}:unpack_q3_k_scales")
def _q3_k_scales_low(original: Callable[["Tensor"], "Tensor"], packed: "Tensor") -> "Tensor":
    low = packed.clone()
    low[:, 8:12] = 0
    return original(low)


@patch(
    "quantisation", "levels-even", "the levels of IQ4_NL and IQ4_XS are taken as even steps", f"{_LOW}:_look_up_levels"
)
def _levels_even(original: Call, quants: "Tensor", out: "Tensor") -> None:
    import torch

    nibbles = torch.stack([quants & 15, quants >> 4], dim=1)
    out.view(-1, 2, 16).copy_(nibbles).sub_(8).mul_(16)


@patch("quantisation", "minimum-subtracted", "Q4_1 and Q5_1 subtract their minimum", f"{_LOW}:_scale_and_raise")
def _minimum_subtracted(original: Call, quants: "Tensor", packed: "Tensor", out: "Tensor") -> None:
    import torch

    negated = packed.clone()
    negated[:, 2:4].view(torch.int16).bitwise_xor_(-32768)
    original(quants, negated, out)
