"""The families of decoders that the teacher implements, as data: what each does that the others do not.

All are decoder-only transformers with RMSNorm, rotary embedding, grouped-query attention and a gated feed-forward.
What a file's own metadata say (windows, scalings, multipliers) is in ``architecture.TeacherConfig``. The facts are
those of llama.cpp's ``src/models/*.cpp`` and of transformers' models, which tests compare with.

    qwen2     biases on Q, K and V
    qwen3     RMSNorm on each query and key head, a head size of its own
    llama     interleaved rotary embedding (llama.cpp's converter permutes Q and K rows); Mistral files say llama too
    mistral3  as llama; queries of far positions are scaled
    granite   as llama; four multipliers
    smollm3   as llama; every fourth layer has no rotary embedding
    phi3      Q, K and V are one matrix, gate and up another; Phi-4 files say phi3 too
    glm4      interleaved, on a part of each head; gate and up are one matrix; norms behind attention and feed-forward
    gemma2    GELU, embeddings times sqrt(H), norms behind both parts, windows on every other layer, soft caps
    gemma3    as gemma2 with norms on heads and windows on five layers of six, which have a rotary base of their own
    olmo2     norms behind both parts and none before; Q and K are normalised over all heads; Olmo 3 has windows
    qwen3moe  as qwen3; the feed-forward is a mixture of experts
    gpt-oss   experts with biases and a clamped SwiGLU, windows on every other layer, a sink of each query head
    gemma4    as gemma3, but layers with a window have heads of another size; values are normalised, or are the keys;
              scores are not scaled, layers are; a mixture stands beside the dense feed-forward, not in its place
    qwen35    three layers of four are gated delta nets, which keep a state; the outputs of attention are gated
    qwen35moe as qwen35; a mixture of experts and one expert that every token is given to, gated
"""

from dataclasses import dataclass, replace
from typing import Literal

RopeLayout = Literal["split_halves", "interleaved"]
Activation = Literal["silu", "gelu_tanh", "clamped_swiglu"]
ScalingKind = Literal["linear", "yarn", "long"]

_ROPE_SCALING = ("rope.scaling.type", "rope.scaling.factor", "rope.scaling.attn_factor", "rope.scale_linear")
_YARN = ("ext_factor", "attn_factor", "beta_fast", "beta_slow", "log_multiplier")
_WINDOW = ("attention.sliding_window",)
_EXPERTS = ("expert_count", "expert_used_count", "expert_feed_forward_length")
_LAYER_SIZES = ("attention.key_length_swa", "attention.value_length_swa", "rope.dimension_count_swa")
_RECURRENCE = tuple(
    f"ssm.{name}" for name in ("conv_kernel", "inner_size", "state_size", "time_step_rank", "group_count")
)
_RECURRENCE += ("full_attention_interval", "attention.recurrent_layers", "rope.dimension_sections")
_RECURRENCE += ("nextn_predict_layers",)
_PATTERN = ("attention.sliding_window_pattern", "rope.freq_base_swa")


@dataclass(frozen=True, kw_only=True)
class Family:
    """What the models of one architecture have in common.

    Attributes:
        rope_layout: which elements of a head are rotated together: ``(i, i + D/2)`` or ``(2i, 2i + 1)``.
        biases: whether Q, K and V may have biases.
        all_biases: whether the output of attention, the router and every expert have biases too; none may be missing.
        sinks: whether the softmax of every query head has a further score, of no key, that takes a share for nothing.
        head_norms: whether queries and keys are normalised before they are rotated: each head, or all heads at once.
        pre_norms: whether attention and feed-forward read normalised states.
        post_norms: whether their outputs are normalised before they are added.
        ffn_norm: name of the norm before the feed-forward.
        fused_qkv: whether Q, K and V are one matrix, rows in this order.
        fused_gate_up: whether gate and up are one matrix, rows in this order.
        scaled_embedding: whether embeddings are multiplied by the root of the hidden size.
        has_partial_rotary: whether a file may rotate only the first elements of each head.
        rope_factors: whether a file may hold divisors of the rotary frequencies (Llama 3.1).
        is_permuted: whether rows of Q and K lie in another order in a file than in a Hugging Face folder, which rotates
            ``(i, i + D/2)`` together.
        norm_offset: what is added to a Hugging Face folder's norm weights in a file.
        scalings: kinds of rotary scaling that a file may ask for.
        rounds_yarn: whether the ends of YaRN's ramp are rounded to whole pairs.
        window: which layers have a sliding window: none, all, or those that a pattern says.
        window_step: each so many layers, one has no window; for a pattern that the file does not state.
        window_length: keys of a window where the file does not say; 0 for none, None where it has to say.
        window_rope_base: rotary base of the layers with a window; None for that of the others.
        no_rope_step: each so many layers, one has no rotary embedding; 0 for none.
        has_experts: whether the feed-forward of every layer is a mixture of experts.
        gating: values of ``expert_gating_func`` that mean what the family computes: 0 is not set, 1 a softmax over all
            experts, 3 one over the chosen.
        dense_beside_experts: whether experts are added to a dense feed-forward, by a router that reads the states
            normalised by itself; a file then may have none.
        layer_sizes: whether layers with a window have a head size and key-value heads of their own, and whether the
            values of the others may be their keys, both before their norms.
        value_norm: whether each head of the values is normalised, without weights.
        layer_scale: whether a file may hold a number that the states behind each layer are multiplied by.
        has_shared_expert: whether every token is also given to one further expert, times the sigmoid of a product.
        has_recurrence: whether layers may be gated delta nets, and blocks behind the last one predict further tokens.
        gated_attention: whether the query projection gives a gate behind each head, whose sigmoid multiplies what the
            head mixes.
        keys: metadata that only this family reads.
    """

    rope_layout: RopeLayout
    biases: bool = False
    all_biases: bool = False
    sinks: bool = False
    head_norms: Literal["none", "each", "all"] = "none"
    pre_norms: bool = True
    post_norms: bool = False
    ffn_norm: Literal["ffn_norm", "post_attention_norm"] = "ffn_norm"
    fused_qkv: bool = False
    fused_gate_up: bool = False
    activation: Activation = "silu"
    scaled_embedding: bool = False
    has_partial_rotary: bool = False
    rope_factors: bool = False
    is_permuted: bool = False
    norm_offset: float = 0.0
    scalings: tuple[ScalingKind, ...] = ("linear", "yarn")
    rounds_yarn: bool = True
    window: Literal["none", "all", "pattern"] = "none"
    window_step: int = 0
    window_length: int | None = 0
    window_rope_base: float | Literal["same"] | None = None
    no_rope_step: int = 0
    has_experts: bool = False
    gating: tuple[int, ...] = (0, 1)
    dense_beside_experts: bool = False
    layer_sizes: bool = False
    value_norm: bool = False
    layer_scale: bool = False
    has_shared_expert: bool = False
    has_recurrence: bool = False
    gated_attention: bool = False
    keys: tuple[str, ...] = ()

    @property
    def metadata_keys(self) -> frozenset[str]:
        """Metadata beside the dimensions that are read for this family."""
        keys = set(self.keys)
        if self.scalings:
            keys.update(_ROPE_SCALING)
        if "yarn" in self.scalings:
            keys.update(f"rope.scaling.yarn_{name}" for name in _YARN)
        if self.window != "none":
            keys.update(_WINDOW)
        if self.window == "pattern":
            keys.update(_PATTERN)
        if self.has_experts:
            keys.update(_EXPERTS)
        if self.layer_sizes:
            keys.update(_LAYER_SIZES)
        if self.has_shared_expert:
            keys.add("expert_shared_feed_forward_length")
        if self.has_recurrence:
            keys.update(_RECURRENCE)
        return frozenset(keys)


_QWEN35 = Family(
    rope_layout="split_halves",
    head_norms="each",
    has_partial_rotary=True,
    norm_offset=1.0,
    has_recurrence=True,
    gated_attention=True,
    ffn_norm="post_attention_norm",
)
_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
FAMILIES: dict[str, Family] = {
    "qwen2": Family(rope_layout="split_halves", biases=True),
    "qwen3": Family(rope_layout="split_halves", biases=True, head_norms="each"),
    "llama": Family(
        rope_layout="interleaved",
        biases=True,
        rope_factors=True,
        is_permuted=True,
        scalings=("linear", "yarn", "long"),
        window="all",
    ),
    "mistral3": Family(
        rope_layout="interleaved",
        biases=True,
        rope_factors=True,
        is_permuted=True,
        keys=("attention.temperature_scale",),
    ),
    "granite": Family(
        rope_layout="interleaved",
        biases=True,
        rope_factors=True,
        is_permuted=True,
        keys=("embedding_scale", "residual_scale", "attention.scale", "logit_scale"),
    ),
    "smollm3": Family(rope_layout="interleaved", biases=True, is_permuted=True, no_rope_step=4),
    "phi3": Family(
        rope_layout="split_halves",
        fused_qkv=True,
        fused_gate_up=True,
        has_partial_rotary=True,
        scalings=("long",),
        window="all",
    ),
    "glm4": Family(
        rope_layout="interleaved", biases=True, fused_gate_up=True, has_partial_rotary=True, post_norms=True
    ),
    "gemma2": Family(
        rope_layout="split_halves",
        post_norms=True,
        activation="gelu_tanh",
        norm_offset=1.0,
        scaled_embedding=True,
        scalings=(),
        window="pattern",
        window_step=2,
        window_length=4096,
        keys=_CAPS,
    ),
    "gemma3": Family(
        rope_layout="split_halves",
        head_norms="each",
        post_norms=True,
        activation="gelu_tanh",
        norm_offset=1.0,
        scaled_embedding=True,
        scalings=("linear",),
        window="pattern",
        window_step=6,
        window_rope_base=10_000.0,
        keys=("final_logit_softcapping",),
    ),
    "olmo2": Family(
        rope_layout="split_halves",
        head_norms="all",
        pre_norms=False,
        post_norms=True,
        window="pattern",
        window_step=4,
        window_rope_base="same",
    ),
    "qwen3moe": Family(rope_layout="split_halves", biases=True, head_norms="each", has_experts=True),
    "gpt-oss": Family(
        rope_layout="split_halves",
        biases=True,
        all_biases=True,
        sinks=True,
        ffn_norm="post_attention_norm",
        activation="clamped_swiglu",
        scalings=("yarn",),
        rounds_yarn=False,
        window="pattern",
        window_step=2,
        window_length=None,
        has_experts=True,
        gating=(0, 3),
    ),
    "gemma4": Family(
        rope_layout="split_halves",
        head_norms="each",
        post_norms=True,
        activation="gelu_tanh",
        scaled_embedding=True,
        rope_factors=True,
        scalings=(),
        window="pattern",
        window_rope_base="same",
        has_experts=True,
        dense_beside_experts=True,
        layer_sizes=True,
        value_norm=True,
        layer_scale=True,
        keys=("final_logit_softcapping",),
    ),
    "qwen35": _QWEN35,
    "qwen35moe": replace(_QWEN35, has_experts=True, has_shared_expert=True),
}
# These are also read from .apr files.
ROPE_LAYOUTS: dict[str, RopeLayout] = {name: FAMILIES[name].rope_layout for name in ("qwen2", "qwen3", "llama")}
