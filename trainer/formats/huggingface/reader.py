"""Reads a Hugging Face folder: the dimensions of a causal LM from its config.json, in the teacher's terms, and weights.

A setting that a GGUF cannot express is refused. ``ARCHITECTURES`` are the model types, and what llama.cpp's converter
calls them.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from q4kd.trainer.errors import InputError
from q4kd.trainer.files import read_json
from q4kd.trainer.formats.architecture import TeacherConfig
from q4kd.trainer.formats.families import FAMILIES
from q4kd.trainer.formats.huggingface.settings import (
    positive,
    read_factors,
    read_rope,
    read_rope_scaling,
    read_rotary_dim,
    read_scales,
    read_window_rope_base,
    read_windows,
    refusal,
    refuse_unsupported,
    rope_kind,
    size,
)
from q4kd.trainer.formats.rope_scaling import LONG_FACTORS, SHORT_FACTORS
from q4kd.trainer.formats.tensor_shapes import ROPE_FACTORS

if TYPE_CHECKING:
    import torch

ARCHITECTURES = {
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "llama": "llama",
    "mistral": "llama",
    "ministral3": "mistral3",
    "granite": "granite",
    "smollm3": "smollm3",
    "phi3": "phi3",
    "glm4": "glm4",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "olmo2": "olmo2",
    "olmo3": "olmo2",
}
_QWEN3_HEAD_DIM = 128  # This is Qwen3Config's default, which config.json may leave out.


def read_huggingface_config(settings: Mapping[str, Any]) -> TeacherConfig:
    """Return the dimensions of a model from its config.json.

    Raises:
        InputError: for another model_type or activation, a size that is missing or not positive, or a window, a rotary
            embedding or a multiplier that its GGUF cannot express.
    """
    model_type = settings.get("model_type")
    if model_type not in ARCHITECTURES:
        raise refusal("model_type", " or ".join(ARCHITECTURES), model_type)
    architecture = ARCHITECTURES[model_type]
    family, layers = FAMILIES[architecture], size(settings, "num_hidden_layers")
    refuse_unsupported(settings, architecture, layers)
    hidden, heads = size(settings, "hidden_size"), size(settings, "num_attention_heads")
    default = _QWEN3_HEAD_DIM if architecture == "qwen3" else hidden // heads
    head_dim, context = size(settings, "head_dim", default), size(settings, "max_position_embeddings")
    windows, base = read_windows(settings, family, layers, context), positive(read_rope(settings), "rope_theta")
    return TeacherConfig(
        architecture=architecture,
        num_layers=layers,
        hidden_size=hidden,
        ffn_size=size(settings, "intermediate_size"),
        num_heads=heads,
        num_kv_heads=size(settings, "num_key_value_heads", heads),
        head_dim=head_dim,
        rms_eps=positive(settings, "rms_norm_eps"),
        rope_base=base,
        rope_layout=family.rope_layout,
        qk_norm=family.head_norms != "none",
        context_length=context,
        vocab_size=size(settings, "vocab_size"),
        tied_head=bool(settings.get("tie_word_embeddings", False)),
        windows=windows,
        rotary_dim=read_rotary_dim(settings, family, head_dim),
        rope_scaling=read_rope_scaling(settings, family, context),
        window_rope_base=read_window_rope_base(settings, architecture, base) if windows else 0.0,
        no_rope_step=family.no_rope_step,
        **read_scales(settings, architecture, layers, hidden, heads, head_dim),
    )


def rope_tensors(settings: Mapping[str, Any]) -> dict[str, npt.NDArray[np.float32]]:
    """Return the divisors of the rotary frequencies that a file holds, float32 ``[D / 2]``, by GGUF name.

    Raises:
        InputError: as ``rope_factors``, and for lists that are no positive numbers.
    """
    rope, factors = read_rope(settings), rope_factors(settings)
    if factors is not None:
        return {ROPE_FACTORS: factors}
    if rope_kind(rope) not in ("longrope", "su"):
        return {}
    keys = {LONG_FACTORS: "long_factor", SHORT_FACTORS: "short_factor"}
    return {name: np.array(read_factors(rope, key), np.float32) for name, key in keys.items()}


def rope_factors(settings: Mapping[str, Any]) -> npt.NDArray[np.float32] | None:
    """Return what the rotary frequencies are divided by, float32 ``[D / 2]``, or None for a plain rotary embedding.

    Llama 3.1's rule: wavelengths beyond ``original / low_freq_factor`` are stretched by ``factor``, those below
    ``original / high_freq_factor`` are kept, and between the two the frequency is interpolated
    (``LlamaModel.generate_extra_tensors`` in llama.cpp's convert_hf_to_gguf.py).

    Raises:
        InputError: when one of the four numbers is missing or meaningless.
    """
    rope = read_rope(settings)
    if rope_kind(rope) != "llama3":
        return None
    config = read_huggingface_config(settings)
    factor, low, high = (positive(rope, key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    original = positive(rope, "original_max_position_embeddings")
    if high <= low:
        raise refusal("rope high_freq_factor", f"more than low_freq_factor {low:g}", high)
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    wavelength = 2 * math.pi * config.rope_base**exponents
    keep = np.clip((original / wavelength - low) / (high - low), 0, 1)
    return (1 / ((1 - keep) / factor + keep)).astype(np.float32)


def read_weights(model: Path) -> dict[str, "torch.Tensor"]:
    """Map the weights of a Hugging Face folder, under their names; nothing is read before it is used.

    An adapter beside them is left alone: ``model.safetensors``, or the files that its index names, are the model.

    Raises:
        InputError: when there are none, an index is malformed or points out of the folder, or a file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    index = model / "model.safetensors.index.json"
    names, remedy = ["model.safetensors"], "save the model again with save_pretrained"
    if index.is_file():
        listed = read_json(index)
        mapped = listed.get("weight_map") if isinstance(listed, dict) else None
        names = sorted({str(name) for name in mapped.values()}) if isinstance(mapped, dict) else []
        if not names or not all(name.endswith(".safetensors") and Path(name).name == name for name in names):
            raise InputError(str(index), expected="a weight_map to files beside it", got="another", remedy=remedy)
    state: dict[str, torch.Tensor] = {}
    for name in names:
        try:
            with safe_open(model / name, framework="pt") as opened:
                state |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - not a mapping
        except (OSError, SafetensorError) as error:
            got = str(error).splitlines()[0][:120]
            raise InputError(str(model / name), expected="weights as safetensors", got=got, remedy=remedy) from error
    return state
