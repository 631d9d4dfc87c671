"""Faults on a CUDA device. Their targets exist everywhere; without a device no experiment reaches them."""

import time
from typing import TYPE_CHECKING

from q4kd.harness.runs.faults import Call, patch

if TYPE_CHECKING:
    from torch import Tensor

_KERNELS = "q4kd.trainer.kernels.teacher_kernels:Kernels"
_ROPE = f"{_KERNELS}.rope"
_HIDDEN = "q4kd.trainer.teacher.cuda.forward:CudaForward.hidden"
BALLAST_BYTES = 6_000_000_000
_HELD: list["Tensor"] = []


@patch("quantisation", "device-half-decode", "weights are decoded through float16 on the device", f"{_KERNELS}.decode")
def _half_decode(
    original: Call,
    self: object,
    type_name: str,
    packed: object,
    start: int,
    stop: int,
    cols: int,
    out: "Tensor",
    **scale: object,
) -> None:
    original(self, type_name, packed, start, stop, cols, out, **scale)
    out.copy_(out.half())  # eleven bits, and infinity beyond 65504


@patch("dispatch", "device-rope-layout-swapped", "the rotary embedding on the device pairs the wrong elements", _ROPE)
def _rope_layout_swapped(
    original: Call,
    self: object,
    q: object,
    k: object,
    cos: object,
    sin: object,
    layout: str,
    *rest: object,
    **options: object,
) -> None:
    other = "split" if layout == "interleaved" else "interleaved"
    original(self, q, k, cos, sin, other, *rest, **options)


@patch("dispatch", "device-late-tokens-left-out", "tokens after the first 4,096 of a pass are left out", _HIDDEN)
def _late_tokens_left_out(original: Call, self: object, ids: "Tensor", *starts: object) -> object:
    hidden: Tensor = original(self, ids, *starts)  # type: ignore[assignment]
    hidden.view(-1, hidden.shape[-1])[4096:] = 0
    return hidden


@patch("dispatch", "device-documents-merged", "the device attends across the borders of packed documents", _HIDDEN)
def _documents_merged(original: Call, self: object, ids: object, _starts: object = None) -> object:
    return original(self, ids, None)


@patch("memory", "device-ballast", "six sized more are held on the device", "q4kd.trainer.teacher.teacher:load_teacher")
def _device_ballast(original: Call, *arguments: object, **options: object) -> object:
    import torch

    _HELD.append(torch.ones(BALLAST_BYTES, dtype=torch.uint8, device="cuda"))
    return original(*arguments, **options)


@patch("dispatch", "idle-device", "the device waits 0.3 s after each pass", _HIDDEN)
def _idle_device(original: Call, self: object, *batch: object) -> object:
    result = original(self, *batch)
    import torch

    torch.cuda.synchronize()
    time.sleep(0.3)  # as if norms and attention ran on the host
    return result
