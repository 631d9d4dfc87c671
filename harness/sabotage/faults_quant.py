"""Faults in decoding: each is a mistake that a K-quant decoder has been seen to make, or easily could."""

import functools
from collections.abc import Callable
from typing import Any

from q4kd.harness.sabotage.registry import declare, replace

_QUANT = "q4kd.trainer.quant"
_Decoder = Callable[[Any, Any], None]


def replace_decoder(type_name: str, function: str, make: Callable[[_Decoder], _Decoder]) -> None:
    """Replace a decoder where it is defined and in the table that dispatches to it."""
    planted: list[_Decoder] = []

    def remember(original: _Decoder) -> _Decoder:
        planted.append(make(original))
        return planted[0]

    replace(f"{_QUANT}:{function}", remember)
    replace(f"{_QUANT}:DECODERS", lambda table: {**table, type_name: planted[0]})


def _wrong_subblock_scale() -> None:
    def make(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def unpack(packed: Any) -> Any:
            scales, mins = original(packed)
            scales[:, 4:] &= 0x0F  # forgets the two high bits that sub-blocks 4-7 borrow from bytes 0-3
            return scales, mins

        return unpack

    replace(f"{_QUANT}:unpack_q4_k_scales", make)


def _dropped_mins() -> None:
    def make(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def unpack(packed: Any) -> Any:
            scales, mins = original(packed)
            return scales, mins * 0

        return unpack

    replace(f"{_QUANT}:unpack_q4_k_scales", make)


def _swapped_nibbles() -> None:
    def make(original: _Decoder) -> _Decoder:
        def decode(packed: Any, out: Any) -> None:
            swapped = packed.clone()
            swapped[:, 16:] = (packed[:, 16:] >> 4) | (packed[:, 16:] << 4)
            original(swapped, out)

        return decode

    replace_decoder("Q4_K", "decode_q4_k", make)


def _q6_k_offset() -> None:
    def make(original: _Decoder) -> _Decoder:
        def decode(packed: Any, out: Any) -> None:
            import torch

            original(packed, out)
            d = packed[:, 208:210].view(torch.float16).float()
            out.add_(d)  # centres the quants at 31 instead of 32, as an asymmetric format would

        return decode

    replace_decoder("Q6_K", "decode_q6_k", make)


def _half_precision(type_name: str, function: str) -> None:
    def make(original: _Decoder) -> _Decoder:
        def decode(packed: Any, out: Any) -> None:
            original(packed, out)
            out.copy_(out.half())  # overflows: Q4_K weights reach 6e7, float16 ends at 65504

        return decode

    replace_decoder(type_name, function, make)


def _one_row_bytes() -> None:
    def make(original: Callable[[Any, int], int]) -> Callable[[Any, int], int]:
        def row_bytes(self: Any, cols: int) -> int:
            return original(self, min(cols, 512))

        return row_bytes

    replace("q4kd.trainer.formats:BlockFormat.row_bytes", make)


declare(
    "quantisation",
    "wrong-subblock-scale",
    "sub-blocks 4-7 of Q4_K lose the two high bits of their scale",
    _wrong_subblock_scale,
    f"{_QUANT}:unpack_q4_k_scales",
)
declare("quantisation", "dropped-mins", "Q4_K's mins are taken as zero", _dropped_mins, f"{_QUANT}:unpack_q4_k_scales")
declare(
    "quantisation",
    "swapped-nibbles",
    "the two nibbles of every Q4_K byte are exchanged",
    _swapped_nibbles,
    f"{_QUANT}:decode_q4_k",
    f"{_QUANT}:DECODERS",
)
declare(
    "quantisation",
    "q6k-offset",
    "Q6_K weights get an offset of one step",
    _q6_k_offset,
    f"{_QUANT}:decode_q6_k",
    f"{_QUANT}:DECODERS",
)
declare(
    "quantisation",
    "half-precision-q4k",
    "Q4_K is decoded through float16",
    functools.partial(_half_precision, "Q4_K", "decode_q4_k"),
    f"{_QUANT}:decode_q4_k",
    f"{_QUANT}:DECODERS",
)
declare(
    "quantisation",
    "half-precision-q6k",
    "Q6_K is decoded through float16",
    functools.partial(_half_precision, "Q6_K", "decode_q6_k"),
    f"{_QUANT}:decode_q6_k",
    f"{_QUANT}:DECODERS",
)
declare(
    "quantisation",
    "capped-row-bytes",
    "rows longer than 512 weights are taken for 512",
    _one_row_bytes,
    "q4kd.trainer.formats:BlockFormat.row_bytes",
)
