"""Faults in how an export quantises: a search left out, importances ignored, a mixture without its exceptions."""

from typing import TYPE_CHECKING, Any

from q4kd.harness.runs.faults import Call, patch

if TYPE_CHECKING:
    import numpy.typing as npt

_QUANTIZE = "q4kd.trainer.formats.blocks.quantize:quantize"
_SEARCH = "q4kd.trainer.formats.blocks.fit_signed:_search_scale"
_VALUE_TYPE = "q4kd.trainer.formats.gguf.recipes:_value_type"


@patch("quantisation", "scales-not-searched", "types without a minimum take the scale that the peak asks for", _SEARCH)
def _scales_not_searched(_original: Call, x: "npt.NDArray[Any]", _w: object, grid: Any) -> object:
    import numpy as np

    from q4kd.trainer.formats.blocks.fit import divide

    peak = x.take(abs(x).argmax(-1) + x.shape[-1] * np.arange(x[..., 0].size).reshape(x.shape[:-1]))
    return divide(peak, np.full_like(peak, grid.low))


@patch("quantisation", "importance-ignored", "weights are rounded as if every column were as important", _QUANTIZE)
def _importance_ignored(original: Call, weights: object, quant_type: str, *_importance: object) -> object:
    return original(weights, quant_type)


@patch("quantisation", "first-layers-like-others", "attn_v has no more bits in the first layers of q3_k_m", _VALUE_TYPE)
def _first_layers_like_others(original: Call, layer: int, base: str, mixture: Any) -> object:
    return original(layer + 2 if mixture.recipe == "q3_k_m" else layer, base, mixture)
