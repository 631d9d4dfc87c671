"""Faults in decoding types whose weights are codes of a table: each is a part of a code that is easily left out."""

from typing import TYPE_CHECKING, Any

from q4kd.harness.runs.faults import Call, patch

if TYPE_CHECKING:
    from torch import Tensor

_IQ = "q4kd.trainer.formats.blocks.decode_iq"
_SMALL = "q4kd.trainer.formats.blocks.decode_small_floats"
_DECODERS = "q4kd.trainer.formats.blocks.decode:DECODERS"
_SCALES = "q4kd.trainer.formats.gguf.scales:take_scales"


@patch(
    "quantisation", "eighth-sign-dropped", "of eight signs stored in seven bits the last is plus", f"{_IQ}:_even_signs"
)
def _eighth_sign_dropped(original: Call) -> "Tensor":
    signs: Tensor = original()  # type: ignore[assignment]
    eighth = signs.clone()
    import torch

    eighth.view(torch.int8).view(-1, 8)[:, 7] = 1
    return eighth


@patch(
    "quantisation",
    "grid-high-bits-dropped",
    "the ninth bit of IQ3_S's points is taken as zero, which leaves half of the grid",
    f"{_IQ}:decode_iq3_s",
    _DECODERS,
)
def _grid_high_bits_dropped(original: Call, packed: "Tensor", out: "Tensor") -> None:
    low = packed.clone()
    low[:, 66:74] = 0
    original(low, out)


@patch("quantisation", "iq1-shift-left-out", "IQ1's points are not shifted by an eighth", f"{_IQ}:_shifted_grid")
def _iq1_shift_left_out(original: Call) -> "Tensor":
    shifted: Tensor = original()  # type: ignore[assignment]
    import torch

    eighths = shifted.clone().view(torch.int8)
    eighths[:] = (eighths + 4) // 8 * 8
    return eighths.view(torch.int64)


@patch(
    "quantisation",
    "nvfp4-one-scale",
    "every sub-block of an NVFP4 block takes the first one's scale",
    f"{_SMALL}:decode_nvfp4",
    _DECODERS,
)
def _nvfp4_one_scale(original: Call, packed: "Tensor", out: "Tensor") -> None:
    first = packed.clone()
    first[:, 1:4] = packed[:, :1]
    original(first, out)


@patch("quantisation", "tensor-scale-ignored", "the scale beside an NVFP4 matrix is read and not applied", _SCALES)
def _tensor_scale_ignored(original: Call, *arguments: object) -> object:
    import dataclasses

    found: dict[str, Any] = original(*arguments)  # type: ignore[assignment]
    return {name: dataclasses.replace(tensor, scale=1.0) for name, tensor in found.items()}
