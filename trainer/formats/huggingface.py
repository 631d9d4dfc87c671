"""Reads a Hugging Face folder: the dimensions of a causal LM from its config.json, in the teacher's terms, and weights.

A setting that a GGUF cannot express is refused. The model types qwen2, qwen3 and llama keep their names; mistral
becomes llama, as in llama.cpp's converter.
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
from q4kd.trainer.formats.families import ROPE_LAYOUTS

if TYPE_CHECKING:
    import torch

_ARCHITECTURES = {"qwen2": "qwen2", "qwen3": "qwen3", "llama": "llama", "mistral": "llama"}
_QWEN3_HEAD_DIM = 128  # This is Qwen3Config's default, which config.json may leave out.


def read_huggingface_config(settings: Mapping[str, Any]) -> TeacherConfig:
    """Return the dimensions of a model from its config.json.

    Raises:
        InputError: for another model_type or activation, a size that is missing or not positive, a sliding window
            shorter than the context, partial rotary embedding, or a rope scaling that its GGUF cannot express.
    """
    model_type = settings.get("model_type")
    if model_type not in _ARCHITECTURES:
        raise _refusal("model_type", " or ".join(_ARCHITECTURES), model_type)
    architecture = _ARCHITECTURES[model_type]
    _refuse_unsupported(settings, architecture)
    hidden, heads = _size(settings, "hidden_size"), _size(settings, "num_attention_heads")
    head_dim = _QWEN3_HEAD_DIM if architecture == "qwen3" else hidden // heads
    return TeacherConfig(
        architecture=architecture,
        num_layers=_size(settings, "num_hidden_layers"),
        hidden_size=hidden,
        ffn_size=_size(settings, "intermediate_size"),
        num_heads=heads,
        num_kv_heads=_size(settings, "num_key_value_heads", heads),
        head_dim=_size(settings, "head_dim", head_dim),
        rms_eps=_positive(settings, "rms_norm_eps"),
        rope_base=_positive({**settings, **_rope(settings)}, "rope_theta"),
        rope_layout=ROPE_LAYOUTS[architecture],
        qk_norm=architecture == "qwen3",
        context_length=_size(settings, "max_position_embeddings"),
        vocab_size=_size(settings, "vocab_size"),
        tied_head=bool(settings.get("tie_word_embeddings", False)),
    )


def rope_factors(settings: Mapping[str, Any]) -> npt.NDArray[np.float32] | None:
    """Return what the rotary frequencies are divided by, float32 ``[D / 2]``, or None for a plain rotary embedding.

    Llama 3.1's rule: wavelengths beyond ``original / low_freq_factor`` are stretched by ``factor``, those below
    ``original / high_freq_factor`` are kept, and between the two the frequency is interpolated
    (``LlamaModel.generate_extra_tensors`` in llama.cpp's convert_hf_to_gguf.py).

    Raises:
        InputError: when one of the four numbers is missing or meaningless.
    """
    rope = _rope(settings)
    if _rope_type(rope) != "llama3":
        return None
    config = read_huggingface_config(settings)
    factor, low, high = (_positive(rope, key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    original = _positive(rope, "original_max_position_embeddings")
    if high <= low:
        raise _refusal("rope high_freq_factor", f"more than low_freq_factor {low:g}", high)
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


def _refusal(key: str, expected: str, got: object) -> InputError:
    remedy = "use the config.json that the model was saved with, or another model"
    return InputError(f"config {key}", expected=expected, got=repr(got)[:80], remedy=remedy)


def _size(settings: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = settings.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _refusal(key, "a positive integer", value)
    return value


def _positive(settings: Mapping[str, Any], key: str) -> float:
    value = settings.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise _refusal(key, "a positive number", value)
    return float(value)


def _rope(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise _refusal("rope_parameters", "a mapping", rope)
    return rope


def _rope_type(rope: Mapping[str, Any]) -> str:
    return str(rope.get("rope_type", rope.get("type", "default")))


def _refuse_unsupported(settings: Mapping[str, Any], architecture: str) -> None:
    """Refuse settings that no key of a GGUF expresses: the GGUF would compute something else."""
    rope = _rope(settings)
    if settings.get("hidden_act", "silu") != "silu":
        raise _refusal("hidden_act", "silu", settings["hidden_act"])
    kinds = ("default", "llama3") if architecture == "llama" else ("default",)
    if _rope_type(rope) not in kinds:
        raise _refusal("rope type", " or ".join(kinds), _rope_type(rope))
    partial = rope.get("partial_rotary_factor", settings.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise _refusal("partial_rotary_factor", "1", partial)
    context, window = _size(settings, "max_position_embeddings"), settings.get("sliding_window")
    if settings.get("use_sliding_window") or "sliding_attention" in (settings.get("layer_types") or ()):
        raise _refusal("use_sliding_window", "full attention", True)
    if settings.get("model_type") == "mistral" and window is not None and _size(settings, "sliding_window") < context:
        raise _refusal("sliding_window", f"none, or at least the context of {context}", window)
