"""Faults in precision and in products: results that look right and are too coarse, or rows that are never computed."""

import functools
from collections.abc import Callable
from typing import Any

from q4kd.harness.sabotage.registry import declare, replace

_CPU_PRODUCT = "q4kd.trainer.gemm:multiply"
_CUDA_PRODUCT = "q4kd.trainer.cuda.numerics:multiply"
_FUSED = "q4kd.trainer.cuda.kernels:Kernels.matvec"


def _coarse(x: Any) -> Any:
    """Round to 8 bits with one scale for each 32 activations, as llama.cpp's products do (Q8_0)."""
    blocks = x.float().reshape(len(x), -1, 32)
    scale = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    return ((blocks / scale).round() * scale).reshape(x.shape).to(x.dtype)


def _coarse_activations() -> None:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, *rest: original(_coarse(x), *rest)

    replace(_CPU_PRODUCT, make)


def _coarse_device_activations() -> None:
    def make_product(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, *rest: original(_coarse(x), *rest)

    def make_fused(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, layout, packed, x, *rest: original(self, layout, packed, _coarse(x), *rest)

    replace(_CUDA_PRODUCT, make_product)
    replace(_FUSED, make_fused)


def _rows_left_out(target: str, place: int) -> None:
    """Leave the last rows of W, which end a tile that is not full, as the output was before."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def product(*given: Any) -> None:
            out = given[place]
            before = out[:, -5:].clone()
            original(*given)
            out[:, -5:] = before

        return product

    replace(target, make)


declare(
    "quantisation",
    "coarse-activations",
    "activations are rounded to 8 bits before every product",
    _coarse_activations,
    _CPU_PRODUCT,
)
declare(
    "quantisation",
    "device-coarse-activations",
    "activations are rounded to 8 bits before every product on the device",
    _coarse_device_activations,
    _CUDA_PRODUCT,
    _FUSED,
)
declare(
    "dispatch",
    "device-rows-left-out",
    "fused products leave out the rows of the last tile",
    functools.partial(_rows_left_out, _FUSED, 5),
    _FUSED,
)
