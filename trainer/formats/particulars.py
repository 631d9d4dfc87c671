"""Reads from a file's metadata what sets its family apart: windows, partial rotary embedding, multipliers, experts."""

import math
from collections.abc import Sequence
from typing import TypedDict

from q4kd.trainer.formats.families import FAMILIES, Family
from q4kd.trainer.formats.values import Values

TWO_SIZES = "use another teacher; partial rotary embedding and heads of two sizes are not implemented"
MAX_EXPERTS = 4096
# The 27B models of Gemma 2 and 3 scale by H / N and not by D; no key says so, and llama.cpp too goes by their layers.
WIDE_QUERIES = {("gemma2", 46), ("gemma3", 62)}


class Scales(TypedDict, total=False):
    """Multipliers and caps of a ``TeacherConfig``."""

    attention_scale: float
    attention_cap: float
    logit_cap: float
    temperature_scale: float
    embedding_scale: float
    residual_scale: float
    logit_scale: float


class ExpertSizes(TypedDict, total=False):
    """The sizes of a ``TeacherConfig`` that a mixture of experts has."""

    num_experts: int
    experts_per_token: int
    expert_ffn_size: int
    shared_ffn_size: int


def read_rotary_dim(found: Values, family: Family, head_dim: int) -> int:
    """Return how many elements of a head are rotated; 0 for all."""
    key = "rope.dimension_count"
    size = found.integer(key, 4096, head_dim)
    if size != head_dim and not family.has_partial_rotary:
        raise found.refusal(key, f"the head size {head_dim}", str(size), TWO_SIZES)
    if size > head_dim or size % 2:
        raise found.refusal(key, f"an even number up to the head size {head_dim}", str(size))
    return size if size < head_dim else 0


def read_windows(found: Values, family: Family, layers: int, context: int) -> tuple[int, ...]:
    """Return the window of each layer; nothing where no layer has one."""
    if family.window == "none":
        return ()
    is_required = family.window_length is None
    window = found.integer("attention.sliding_window", 1 << 24, family.window_length, low=int(is_required))
    if not window or (family.window == "all" and window >= context):
        return ()
    if family.window == "all":
        return (window,) * layers
    key = "attention.sliding_window_pattern"
    pattern = found.get(key, family.window_step)
    if isinstance(pattern, int) and not isinstance(pattern, bool) and 1 <= pattern <= layers * 1024:
        return tuple(0 if (layer + 1) % pattern == 0 else window for layer in range(layers))
    # Written one by one, a layer with a window is true.
    stated = list(pattern)[: layers + 1] if isinstance(pattern, Sequence) and not isinstance(pattern, str) else []
    if len(stated) != layers or not all(isinstance(has, bool) for has in stated):
        raise found.refusal(key, f"a whole number, or {layers} booleans", repr(pattern)[:80])
    return tuple(window if has else 0 for has in stated)


def read_window_rope_base(found: Values, family: Family, base: float) -> float:
    """Return the rotary base of the layers with a window; 0 for that of all layers."""
    if family.window != "pattern":
        return 0.0
    key = "rope.freq_base_swa"
    default = base if family.window_rope_base == "same" else family.window_rope_base or 0.0
    stated = float(found.number(key, 0.0, 1e12, default))
    if family.window_rope_base is None and family.scalings:  # its windows are scaled as the other layers are
        if stated not in (0.0, base):
            raise found.refusal(key, f"rope.freq_base, {base:g}", f"{stated:g}", TWO_SIZES)
        return 0.0
    return stated


def read_experts(found: Values, family: Family, ffn_size: int) -> ExpertSizes:
    """Return the number of experts, how many a token is given to, and the size of each; nothing for a dense family.

    A file that does not state the size shares the feed-forward's among those of a token, as llama.cpp reads it; where
    the feed-forward is beside the experts, the size must be stated.
    """
    if not family.has_experts or (family.dense_beside_experts and not found.get("expert_count")):
        return {}
    count = found.integer("expert_count", MAX_EXPERTS)
    used = found.integer("expert_used_count", count)
    shared = None if family.dense_beside_experts else max(1, ffn_size // used)
    size = found.integer("expert_feed_forward_length", 1 << 22, shared)
    sizes: ExpertSizes = {"num_experts": count, "experts_per_token": used, "expert_ffn_size": size}
    if family.has_shared_expert:
        sizes["shared_ffn_size"] = found.integer("expert_shared_feed_forward_length", 1 << 22)
    return sizes


def read_ffn_size(found: Values, family: Family) -> int:
    """Return the size of a dense feed-forward; files of a mixture with a shared expert need not state it."""
    other = found.get("expert_feed_forward_length") if family.has_shared_expert else None
    return found.integer("feed_forward_length", 1 << 22, other)


def shared_shapes(size: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Return name and shape of the tensors of the expert that every token is given to, and of its gate."""
    return {
        "ffn_gate_inp_shexp.weight": (hidden,),
        "ffn_gate_shexp.weight": (size, hidden),
        "ffn_up_shexp.weight": (size, hidden),
        "ffn_down_shexp.weight": (hidden, size),
    }


def read_scales(found: Values, architecture: str, layers: int, hidden: int, heads: int) -> Scales:
    """Return the multipliers and caps that the metadata state; those of other families are refused elsewhere."""

    def positive(key: str, default: float = 1.0) -> float:
        return float(found.number(key, 1e-9, 1e9, default))

    def cap(key: str, default: float) -> float:
        return float(found.number(key, 0.0, 1e9, default))

    scales: Scales = {}
    if FAMILIES[architecture].scaled_embedding:
        scales["embedding_scale"] = math.sqrt(hidden)
    if architecture == "granite":
        scales = {"embedding_scale": positive("embedding_scale"), "residual_scale": positive("residual_scale")}
        scales["logit_scale"] = 1 / positive("logit_scale")
        scales["attention_scale"] = cap("attention.scale", 0.0)
    if (architecture, layers) in WIDE_QUERIES:
        scales["attention_scale"] = 1 / math.sqrt(hidden // heads)
    if architecture == "gemma2":
        scales["attention_cap"] = cap("attn_logit_softcapping", 50.0)
        scales["logit_cap"] = cap("final_logit_softcapping", 30.0)
    if architecture == "gemma4":
        scales["attention_scale"] = 1.0
    if architecture in ("gemma3", "gemma4"):
        scales["logit_cap"] = cap("final_logit_softcapping", 0.0)
    if architecture == "mistral3":
        scales["temperature_scale"] = cap("attention.temperature_scale", 0.0)
    return scales
