"""Faults in precision and in products: results that look right and are too coarse, or rows that are never computed."""

from typing import TYPE_CHECKING

from q4kd.harness.runs.faults import Call, fault, patch, replace

if TYPE_CHECKING:
    from torch import Tensor

_CPU_PRODUCT = "q4kd.trainer.kernels.gemm:multiply"
_CPU_ATTENTION = "q4kd.trainer.kernels.attention:causal_attention"
_CUDA_PRODUCT = "q4kd.trainer.kernels.numerics:multiply"
_FUSED = "q4kd.trainer.kernels.teacher_kernels:Kernels.matvec"


def _coarse(x: "Tensor") -> "Tensor":
    """Round to 8 bits with one scale for each 32 activations, as llama.cpp's products do (Q8_0)."""
    blocks = x.float().reshape(len(x), -1, 32)
    scale = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    return ((blocks / scale).round() * scale).reshape(x.shape).to(x.dtype)


@patch("quantisation", "coarse-activations", "activations are rounded to 8 bits before every product", _CPU_PRODUCT)
def _coarse_activations(original: Call, x: "Tensor", *rest: object) -> object:
    return original(_coarse(x), *rest)


@patch(
    "quantisation", "one-scale-a-pass", "activations are rounded to 8 bits by one scale for all tokens", _CPU_PRODUCT
)
def _one_scale_a_pass(original: Call, x: "Tensor", *rest: object) -> object:
    scale = x.float().abs().max() / 127  # a token's result then depends on what else is in its pass
    return original(((x.float() / scale).round() * scale).to(x.dtype), *rest)


@patch("loop", "later-positions-seen", "queries attend to the positions behind them too", _CPU_ATTENTION)
def _later_positions_seen(
    _original: Call, q: "Tensor", k: "Tensor", v: "Tensor", _starts: "Tensor | None" = None, **_options: object
) -> "Tensor":
    import torch.nn.functional as F  # noqa: N812 - torch's own convention

    mixed: Tensor = F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).contiguous()
    return mixed


@fault(
    "quantisation",
    "device-coarse-activations",
    "activations are rounded to 8 bits before every product on the device",
    _CUDA_PRODUCT,
    _FUSED,
)
def _coarse_device_activations() -> None:
    def make_product(original: Call) -> Call:
        return lambda x, *rest: original(_coarse(x), *rest)

    def make_fused(original: Call) -> Call:
        return lambda self, layout, packed, x, *rest: original(self, layout, packed, _coarse(x), *rest)

    replace(_CUDA_PRODUCT, make_product)
    replace(_FUSED, make_fused)


@patch("dispatch", "device-rows-left-out", "fused products leave out the rows of the last tile", _FUSED)
def _rows_left_out(
    original: Call, self: object, layout: str, packed: object, x: object, rows: int, out: "Tensor"
) -> None:
    # The last rows of W, which end a tile that is not full, stay as the output was before.
    before = out[:, -5:].clone()
    original(self, layout, packed, x, rows, out)
    out[:, -5:] = before
