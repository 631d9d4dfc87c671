"""Reads from a Hugging Face config.json what sets its family apart: windows, rotary embedding, multipliers and caps.

The names and their meaning are those of transformers' ``configuration_*.py`` and ``modeling_rope_utils.py``. What a
GGUF of the family cannot say, or llama.cpp would read otherwise, is refused.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from q4kd.trainer.errors import InputError
from q4kd.trainer.formats.families import FAMILIES, Family, ScalingKind
from q4kd.trainer.formats.particulars import WIDE_QUERIES, Scales
from q4kd.trainer.formats.rope_scaling import RopeScaling

ROPE_KINDS: dict[str, ScalingKind] = {"linear": "linear", "yarn": "yarn", "longrope": "long", "su": "long"}
_ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}


def refusal(key: str, expected: str, got: object) -> InputError:
    """Return an error about one setting."""
    remedy = "use the config.json that the model was saved with, or another model"
    return InputError(f"config {key}", expected=expected, got=repr(got)[:80], remedy=remedy)


def size(settings: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """Return a positive integer; without a default the setting is required.

    Raises:
        InputError: for anything else.
    """
    value = settings.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise refusal(key, "a positive integer", value)
    return value


def positive(settings: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """Return a positive number; without a default the setting is required.

    Raises:
        InputError: for anything else.
    """
    value = settings.get(key)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise refusal(key, "a positive number", value)
    return float(value)


def read_rope(settings: Mapping[str, Any], layers: str = "full_attention") -> Mapping[str, Any]:
    """Return the rotary settings of one kind of layers, its base among them where it is stated.

    Raises:
        InputError: when they are no mapping.
    """
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    if isinstance(rope, Mapping) and isinstance(rope.get(layers), Mapping):
        rope = rope[layers]
    if not isinstance(rope, Mapping):
        raise refusal("rope_parameters", "a mapping", rope)
    base = {"rope_theta": settings["rope_theta"]} if "rope_theta" in settings else {}
    return {**base, **rope}


def rope_kind(rope: Mapping[str, Any]) -> str:
    """Return transformers' name of a rotary scaling."""
    return str(rope.get("rope_type", rope.get("type", "default")))


def read_rotary_dim(settings: Mapping[str, Any], family: Family, head_dim: int) -> int:
    """Return how many elements of a head are rotated; 0 for all.

    Raises:
        InputError: for a part of them in a family whose files cannot say so, or an odd number.
    """
    part = read_rope(settings).get("partial_rotary_factor", settings.get("partial_rotary_factor"))
    if part in (None, 1):
        return 0
    if not family.has_partial_rotary:
        raise refusal("partial_rotary_factor", "1", part)
    rotated = int(head_dim * positive({"partial_rotary_factor": part}, "partial_rotary_factor"))
    if rotated > head_dim or rotated % 2:
        raise refusal("partial_rotary_factor", f"an even part of the head size {head_dim}", part)
    return rotated if rotated < head_dim else 0


def read_rope_scaling(settings: Mapping[str, Any], family: Family, context: int) -> RopeScaling | None:
    """Return the rotary scaling of the layers without a window, or None for one that is plain or Llama 3.1's.

    Raises:
        InputError: for a kind that files of the family cannot say, or a number that is missing or meaningless.
    """
    rope = read_rope(settings)
    kinds = ["default", *(name for name, kind in ROPE_KINDS.items() if kind in family.scalings)]
    kinds += ["llama3"] * family.rope_factors
    name = rope_kind(rope)
    if name not in kinds:
        raise refusal("rope type", " or ".join(kinds), name)
    if name == "linear":
        return RopeScaling(kind="linear", factor=positive(rope, "factor"))
    if name not in ROPE_KINDS:
        return None
    original = size({**settings, **rope}, "original_max_position_embeddings")
    factor = positive(rope, "factor", context / original)
    if name == "yarn":
        if factor < 1:
            raise refusal("rope factor", "1 or more", factor)
        if not rope.get("truncate", True):
            raise refusal("rope truncate", "true, as in llama.cpp", rope["truncate"])
        return RopeScaling(
            kind="yarn",
            factor=factor,
            attention_factor=positive(rope, "attention_factor", _yarn_attention_factor(rope, factor)),
            original_context=original,
            beta_fast=positive(rope, "beta_fast", 32.0),
            beta_slow=positive(rope, "beta_slow", 1.0),
        )
    gain = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return RopeScaling(
        kind="long", attention_factor=positive(rope, "attention_factor", gain), original_context=original
    )


def _yarn_attention_factor(rope: Mapping[str, Any], factor: float) -> float:
    """Return the factor of cos and sin, ``0.1 ln(factor) + 1``, or its ratio to that of another multiplier."""

    def gain(multiplier: float) -> float:
        return 0.1 * multiplier * math.log(factor) + 1

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return gain(positive(rope, "mscale")) / gain(positive(rope, "mscale_all_dim"))
    return gain(1.0)


def read_factors(rope: Mapping[str, Any], key: str) -> list[float]:
    """Return the divisors of the rotary frequencies for long or short texts.

    Raises:
        InputError: when they are no list of positive numbers.
    """
    factors = rope.get(key)
    if not isinstance(factors, Sequence) or isinstance(factors, str) or not factors:
        raise refusal(f"rope {key}", "a list of positive numbers", factors)
    return [positive({key: factor}, key) for factor in factors]


def read_windows(settings: Mapping[str, Any], family: Family, layers: int, context: int) -> tuple[int, ...]:
    """Return the window of each layer; nothing where no layer has one.

    Raises:
        InputError: for a window that the model's file cannot say, or that llama.cpp would leave out of it.
    """
    kinds, window = settings.get("layer_types") or (), settings.get("sliding_window")
    if family.window == "pattern":
        if window is None:
            return ()
        window, step = size(settings, "sliding_window"), family.window_step
        windows = tuple(0 if (layer + 1) % step == 0 else window for layer in range(layers))
        if kinds and [kind == "sliding_attention" for kind in kinds] != [bool(length) for length in windows]:
            raise refusal("layer_types", f"full attention in every layer of {step}, else a window", kinds)
        return windows
    if settings.get("use_sliding_window") or "sliding_attention" in kinds:
        raise refusal("use_sliding_window", "full attention", True)
    # Qwen's configs keep a window that is not used.
    if window is None or settings.get("model_type") not in ("mistral", "ministral3", "phi3"):
        return ()
    if size(settings, "sliding_window") >= context:
        return ()
    if settings["model_type"] != "phi3":  # llama.cpp's converter writes none, and its llama reads none.
        raise refusal("sliding_window", f"none, or at least the context of {context}", window)
    return (int(window),) * layers


def read_window_rope_base(settings: Mapping[str, Any], architecture: str, base: float) -> float:
    """Return the rotary base of the layers with a window; 0 for that of all layers.

    Raises:
        InputError: when their rotary embedding is scaled, or is another than the family's files can say.
    """
    usual = FAMILIES[architecture].window_rope_base
    if usual is None:
        return 0.0
    if usual != "same" and "sliding_attention" not in (settings.get("rope_parameters") or {}):
        return positive(settings, "rope_local_base_freq", usual)  # Gemma 3's older configs; transformers' default too
    rope = read_rope(settings, "sliding_attention")
    if rope_kind(rope) != "default":
        raise refusal("rope type of sliding_attention", "default", rope_kind(rope))
    found = positive(rope, "rope_theta")
    if usual == "same" and found != base:
        raise refusal("rope_theta of sliding_attention", f"{base:g}, as of full_attention", found)
    return found


def read_scales(
    settings: Mapping[str, Any], architecture: str, layers: int, hidden: int, heads: int, head_dim: int
) -> Scales:
    """Return multipliers and caps under the names of ``TeacherConfig``.

    Raises:
        InputError: for one that is missing or no positive number, or that llama.cpp would leave out.
    """
    if architecture == "granite":
        return {
            "embedding_scale": positive(settings, "embedding_multiplier"),
            "residual_scale": positive(settings, "residual_multiplier"),
            "attention_scale": positive(settings, "attention_multiplier"),
            "logit_scale": 1 / positive(settings, "logits_scaling"),
        }
    if architecture == "mistral3":
        rope = read_rope(settings)
        if rope_kind(rope) != "yarn":  # Its scale of queries counts in YaRN's original context.
            raise refusal("rope type", "yarn", rope_kind(rope))
        return {"temperature_scale": positive(rope, "llama_4_scaling_beta")}
    if not FAMILIES[architecture].scaled_embedding:
        return {}
    scales: Scales = {"embedding_scale": math.sqrt(hidden)}
    squared, wide = positive(settings, "query_pre_attn_scalar"), (architecture, layers) in WIDE_QUERIES
    expected = hidden // heads if wide else head_dim
    if squared != expected:
        raise refusal("query_pre_attn_scalar", f"{expected}, as llama.cpp has it of {layers} layers", squared)
    if wide:
        scales["attention_scale"] = 1 / math.sqrt(squared)
    caps = "attn_logit_softcapping", "final_logit_softcapping"
    if architecture == "gemma2":
        scales["attention_cap"], scales["logit_cap"] = (positive(settings, key) for key in caps)
        return scales
    for key in caps:
        if settings.get(key) is not None:  # llama.cpp's gemma3 caps nothing in a model with windows.
            raise refusal(key, "none", settings[key])
    return scales


def refuse_unsupported(settings: Mapping[str, Any], architecture: str, layers: int) -> None:
    """Refuse settings that no key of a GGUF expresses: the GGUF would compute something else.

    Raises:
        InputError: naming the setting.
    """
    family = FAMILIES[architecture]
    key = "hidden_activation" if family.activation == "gelu_tanh" else "hidden_act"
    activation = _ACTIVATIONS[family.activation]
    if settings.get(key, activation) != activation:
        raise refusal(key, activation, settings[key])
    if settings.get("use_bidirectional_attention"):
        raise refusal("use_bidirectional_attention", "false", settings["use_bidirectional_attention"])
    rotated, step = settings.get("no_rope_layers"), family.no_rope_step
    if step and rotated is not None and list(rotated) != [int((at + 1) % step != 0) for at in range(layers)]:
        raise refusal("no_rope_layers", f"every layer of {step} without rotary embedding", rotated)
