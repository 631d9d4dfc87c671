"""The metadata that a GGUF has of its family's particulars, made from a config: what ``read_dimensions`` reads back.

Keys and types are those that llama.cpp's converter writes (https://github.com/ggml-org/llama.cpp, ``conversion/*.py``).
"""

import math
from collections.abc import Mapping

from q4kd.trainer.formats.architecture import TeacherConfig
from q4kd.trainer.formats.rope_scaling import RopeScaling

Value = int | float | str | list[bool]


def family_metadata(config: TeacherConfig) -> dict[str, Value]:
    """Return metadata by key, without the architecture's prefix; integers are uint32, other numbers float32."""
    found: dict[str, Value] = {}
    # The models that llama.cpp's converter permutes are those that it converts as llama.
    if config.rotary_dim or config.family.is_permuted or config.family.has_partial_rotary:
        found["rope.dimension_count"] = config.rotary_dim or config.head_dim
    found |= _scaling_metadata(config.rope_scaling, config.architecture)
    found |= _window_metadata(config)
    scales = {
        "embedding_scale": config.embedding_scale,
        "residual_scale": config.residual_scale,
        "attention.scale": config.attention_scale,
        "logit_scale": 1 / config.logit_scale,
        "attention.temperature_scale": config.temperature_scale,
        "attn_logit_softcapping": config.attention_cap,
        "final_logit_softcapping": config.logit_cap,
    }
    return found | {key: scales[key] for key in config.family.keys if scales[key]}


def _window_metadata(config: TeacherConfig) -> Mapping[str, Value]:
    key = "attention.sliding_window"
    if config.architecture == "phi3":
        return {key: config.window(0)}  # 0 tells Phi-4 from Phi-3, whose older files have no such key.
    if not config.windows:
        return {}
    found: dict[str, Value] = {key: max(config.windows)}
    if config.window_rope_base:
        found["rope.freq_base_swa"] = config.window_rope_base
    if config.architecture == "olmo2":
        found["attention.sliding_window_pattern"] = [window > 0 for window in config.windows]
    return found


def _scaling_metadata(scaling: RopeScaling | None, architecture: str) -> Mapping[str, Value]:
    if scaling is None:
        return {}
    kind = "longrope" if scaling.kind == "long" else scaling.kind
    # llama.cpp's converter writes no type for Phi-3: the tensors of divisors say it.
    found: dict[str, Value] = {} if architecture == "phi3" else {"rope.scaling.type": kind}
    if scaling.kind == "linear":
        return found | {"rope.scaling.factor": scaling.factor}
    found["rope.scaling.original_context_length"] = scaling.original_context
    if scaling.kind == "long":
        return found | {"rope.scaling.attn_factor": scaling.attention_factor}
    found["rope.scaling.factor"] = scaling.factor
    found["rope.scaling.yarn_beta_fast"] = scaling.beta_fast
    found["rope.scaling.yarn_beta_slow"] = scaling.beta_slow
    # A file of YaRN says by how much its factor of cos and sin differs from 0.1 ln(factor) + 1.
    usual = 0.1 * math.log(scaling.factor) + 1
    ratio = scaling.attention_factor / usual
    if architecture == "mistral3" and scaling.factor > 1:
        found["rope.scaling.yarn_log_multiplier"] = (1 / ratio - 1) / (usual - 1)
    elif not math.isclose(ratio, 1, rel_tol=1e-9):
        found["rope.scaling.attn_factor"] = ratio
    return found
