"""Faults in decoding: each is a mistake that a K-quant decoder has been seen to make, or easily could."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from q4kd.harness.runs.faults import Call, patch

if TYPE_CHECKING:
    from torch import Tensor

_QUANT = "q4kd.trainer.formats.blocks.decode"
_UNPACK = f"{_QUANT}:unpack_q4_k_scales"
_DECODERS = f"{_QUANT}:DECODERS"
_ROW_BYTES = "q4kd.trainer.formats.blocks.layout:BlockFormat.row_bytes"
_DECODE_Q4_K = f"{_QUANT}:decode_q4_k"
_TILED = "q4kd.trainer.teacher.cpu.weights:PackedMatrix._tiled"
_DECODE_TILE = "q4kd.trainer.teacher.cpu.weights:PackedMatrix._decode"
_Unpack = Callable[["Tensor"], tuple["Tensor", "Tensor"]]
_Decode = Callable[["Tensor", "Tensor"], None]


@patch("quantisation", "wrong-subblock-scale", "sub-blocks 4-7 of Q4_K lose the two high bits of their scale", _UNPACK)
def _wrong_subblock_scale(original: _Unpack, packed: "Tensor") -> tuple["Tensor", "Tensor"]:
    scales, mins = original(packed)
    scales[:, 4:] &= 0x0F  # forgets the two high bits that sub-blocks 4-7 borrow from bytes 0-3
    return scales, mins


@patch("quantisation", "dropped-mins", "Q4_K's mins are taken as zero", _UNPACK)
def _dropped_mins(original: _Unpack, packed: "Tensor") -> tuple["Tensor", "Tensor"]:
    scales, mins = original(packed)
    return scales, mins * 0


@patch("quantisation", "swapped-nibbles", "the two nibbles of every Q4_K byte are exchanged", _DECODE_Q4_K, _DECODERS)
def _swapped_nibbles(original: _Decode, packed: "Tensor", out: "Tensor") -> None:
    swapped = packed.clone()
    swapped[:, 16:] = (packed[:, 16:] >> 4) | (packed[:, 16:] << 4)
    original(swapped, out)


@patch("quantisation", "q6k-offset", "Q6_K weights get an offset of one step", f"{_QUANT}:decode_q6_k", _DECODERS)
def _q6_k_offset(original: _Decode, packed: "Tensor", out: "Tensor") -> None:
    import torch

    original(packed, out)
    d = packed[:, 208:210].view(torch.float16).float()
    out.add_(d)  # centres the quants at 31 instead of 32, as an asymmetric format would


@patch("quantisation", "half-precision-q4k", "Q4_K is decoded through float16", f"{_QUANT}:decode_q4_k", _DECODERS)
@patch("quantisation", "half-precision-q6k", "Q6_K is decoded through float16", f"{_QUANT}:decode_q6_k", _DECODERS)
def _half_precision(original: _Decode, packed: "Tensor", out: "Tensor") -> None:
    original(packed, out)
    out.copy_(out.half())  # overflows: Q4_K weights reach 6e7, float16 ends at 65504


@patch("quantisation", "capped-row-bytes", "rows longer than 512 weights are taken for 512", _ROW_BYTES)
def _capped_row_bytes(original: Callable[[object, int], int], self: object, cols: int) -> int:
    return original(self, min(cols, 512))


@patch("dispatch", "last-tile-left-out", "products by tiles leave out the rows of a last tile that is not full", _TILED)
def _last_tile_left_out(original: Call, self: object, x: "Tensor", out: "Tensor") -> object:
    rows = out.shape[1] // 1024 * 1024 or out.shape[1] // 20 * 20
    product: Tensor = original(self, x, out)  # type: ignore[assignment]
    product[:, rows:] = 0
    return product


@patch(
    "quantisation", "last-blocks-not-decoded", "what is left after 4,096 blocks is not decoded", f"{_QUANT}:decode_rows"
)
def _last_blocks_not_decoded(original: Call, name: str, packed: "Tensor", out: "Tensor", *scale: object) -> object:
    decoded: Tensor = original(name, packed, out, *scale)  # type: ignore[assignment]
    decoded.view(-1)[4096 * 256 :] = 0
    return decoded


@patch("quantisation", "last-run-not-rounded", "of a bfloat16 tile only the first 2,048 rows are made", _DECODE_TILE)
def _last_run_not_rounded(original: Call, self: object, start: int, stop: int, dtype: object) -> object:
    tile: Tensor = original(self, start, stop, dtype)  # type: ignore[assignment]
    if str(dtype) == "torch.bfloat16":
        tile[2048:] = 0
    return tile
