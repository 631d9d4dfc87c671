"""Faults on a CUDA device. Their targets exist everywhere; without a device no experiment reaches them."""

import time
from collections.abc import Callable
from typing import Any

from q4kd.harness.sabotage.registry import declare, replace

_KERNELS = "q4kd.trainer.cuda.kernels:Kernels"
BALLAST_BYTES = 6_000_000_000
_HELD: list[Any] = []


def _half_decode() -> None:
    def make(original: Callable[..., None]) -> Callable[..., None]:
        def decode(self: Any, type_name: str, packed: Any, start: int, stop: int, cols: int, out: Any) -> None:
            original(self, type_name, packed, start, stop, cols, out)
            out.copy_(out.half())  # eleven bits, and infinity beyond 65504

        return decode

    replace(f"{_KERNELS}.decode", make)


def _rope_layout_swapped() -> None:
    def make(original: Callable[..., None]) -> Callable[..., None]:
        def rope(self: Any, q: Any, k: Any, cos: Any, sin: Any, layout: str, *rest: Any, **options: Any) -> None:
            other = "split" if layout == "interleaved" else "interleaved"
            original(self, q, k, cos, sin, other, *rest, **options)

        return rope

    replace(f"{_KERNELS}.rope", make)


def _device_ballast() -> None:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def load(*args: Any, **options: Any) -> Any:
            import torch

            _HELD.append(torch.ones(BALLAST_BYTES, dtype=torch.uint8, device="cuda"))
            return original(*args, **options)

        return load

    replace("q4kd.trainer.teacher:load_teacher", make)


def _idle_device() -> None:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def hidden(self: Any, ids: Any) -> Any:
            result = original(self, ids)
            import torch

            torch.cuda.synchronize()
            time.sleep(0.3)  # as if norms and attention ran on the host
            return result

        return hidden

    replace("q4kd.trainer.cuda.forward:CudaForward.hidden", make)


declare(
    "quantisation",
    "device-half-decode",
    "weights are decoded through float16 on the device",
    _half_decode,
    f"{_KERNELS}.decode",
)
declare(
    "dispatch",
    "device-rope-layout-swapped",
    "the rotary embedding on the device pairs the wrong elements",
    _rope_layout_swapped,
    f"{_KERNELS}.rope",
)
declare(
    "memory",
    "device-ballast",
    "six sized more are held on the device",
    _device_ballast,
    "q4kd.trainer.teacher:load_teacher",
)
declare(
    "dispatch",
    "idle-device",
    "the device waits 0.3 s after each pass",
    _idle_device,
    "q4kd.trainer.cuda.forward:CudaForward.hidden",
)
