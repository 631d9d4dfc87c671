"""Type recipes of exported GGUF files: which GGML type each tensor gets, by the rules of llama.cpp's llama-quant.cpp.

A recipe is "f32", "f16", "bf16"; "q8_0" or "q6_k" for every matrix; or a mixture around a type of fewer bits. In a
mixture the output head (the embedding, where the head is tied to it) is Q6_K, and attn_v, ffn_down and attn_output get
more bits where it pays:

    q4_k_m   Q4_K; attn_v and ffn_down Q6_K in the layers that ``uses_more_bits`` names
    q5_k_m   Q5_K; the same layers Q6_K
    q4_k_s   Q4_K; attn_v Q5_K in the first four layers, ffn_down in the first eighth
    q3_k_m   Q3_K; attn_v Q5_K in the first two layers, else Q4_K; ffn_down Q5_K in the first sixteenth, else Q4_K;
             attn_output Q4_K
    q2_k     Q2_K; attn_v Q4_K with four query heads or more to a key head, else Q3_K; ffn_down and attn_output Q3_K
    iq4_xs, iq4_nl   attn_v Q5_K with four query heads or more to a key head; ffn_down Q5_K in the first eighth, unless
             importances are known
    q3_k_s, q5_0, q4_0   no exceptions, but for ffn_down in the first eighth (Q5_1, Q4_1) where importances are known

Where Q, K and V are one matrix, it is stored as attn_v. Norms and biases are always F32. A matrix whose columns are no
multiple of 256 cannot hold superblocks: it gets the type of 32 weights that llama.cpp falls back to, Q8_0 for Q6_K,
Q5_1 for Q5_K, Q5_0 for Q4_K, IQ4_NL for IQ4_XS, Q4_0 for Q3_K and Q2_K. "q4_k_m" takes Q8_0 there, always. Where
columns are no multiple of 32 either, F16 is left.
"""

from dataclasses import dataclass

import gguf

from q4kd.trainer.formats.blocks.layout import block_format

RECIPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q6_k": gguf.LlamaFileType.MOSTLY_Q6_K,
    "q5_k_m": gguf.LlamaFileType.MOSTLY_Q5_K_M,
    "q5_0": gguf.LlamaFileType.MOSTLY_Q5_0,
    "q4_k_m": gguf.LlamaFileType.MOSTLY_Q4_K_M,
    "q4_k_s": gguf.LlamaFileType.MOSTLY_Q4_K_S,
    "iq4_nl": gguf.LlamaFileType.MOSTLY_IQ4_NL,
    "iq4_xs": gguf.LlamaFileType.MOSTLY_IQ4_XS,
    "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
    "q3_k_m": gguf.LlamaFileType.MOSTLY_Q3_K_M,
    "q3_k_s": gguf.LlamaFileType.MOSTLY_Q3_K_S,
    "q2_k": gguf.LlamaFileType.MOSTLY_Q2_K,
}
_DENSE = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
# The type of a mixture's matrices, but for the exceptions.
_BASE = {"q5_k_m": "Q5_K", "q4_k_m": "Q4_K", "q4_k_s": "Q4_K", "q3_k_m": "Q3_K", "q3_k_s": "Q3_K"}
_FALLBACK = {"Q6_K": "Q8_0", "Q5_K": "Q5_1", "Q4_K": "Q5_0", "IQ4_XS": "IQ4_NL", "Q3_K": "Q4_0", "Q2_K": "Q4_0"}
_70B_LAYERS = 80


@dataclass(frozen=True)
class Mixture:
    """What decides a tensor's type besides its name and shape.

    Attributes:
        recipe: a key of ``RECIPES``.
        layers: number of layers.
        tied: whether the head is the embedding.
        groups: query heads to a key-value head.
        weighed: whether importances are known.
    """

    recipe: str
    layers: int
    tied: bool
    groups: int = 1
    weighed: bool = False


def uses_more_bits(layer: int, layers: int) -> bool:
    """Return whether "q4_k_m" stores a layer's attn_v and ffn_down as Q6_K: at both ends, and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def tensor_type(name: str, shape: tuple[int, ...], mixture: Mixture) -> str:
    """Return the GGML type of a tensor. ``shape`` is [rows, cols] or [n]."""
    recipe = mixture.recipe
    if len(shape) == 1 or recipe in _DENSE:
        return "F32" if len(shape) == 1 else _DENSE[recipe]
    base = _BASE.get(recipe, recipe.upper())
    if name == "output.weight" or (name == "token_embd.weight" and mixture.tied):
        wanted = "Q8_0" if shape[1] % block_format(base).block_size else base if base == "Q8_0" else "Q6_K"
    else:
        wanted = _layer_type(name, base, mixture)
    if shape[1] % block_format(wanted).block_size:
        wanted = "Q8_0" if recipe == "q4_k_m" else _FALLBACK.get(wanted, "F16")
    return "F16" if shape[1] % block_format(wanted).block_size else wanted


def _layer_type(name: str, base: str, mixture: Mixture) -> str:
    """Return the type of a matrix that is not the head."""
    part = name.split(".")
    if part[0] != "blk":
        return base
    layer = int(part[1])
    if part[2] in ("attn_v", "attn_qkv"):
        return _value_type(layer, base, mixture)
    if part[2] == "ffn_down":
        return _down_type(layer, base, mixture)
    if part[2] == "attn_output":
        return {"q2_k": "Q3_K", "q3_k_m": "Q4_K"}.get(mixture.recipe, base)
    return base


def _value_type(layer: int, base: str, mixture: Mixture) -> str:
    recipe, kind = mixture.recipe, base
    shared = mixture.groups >= 4
    if recipe == "q2_k":
        kind = "Q4_K" if shared else "Q3_K"
    elif recipe == "q3_k_m":
        kind = "Q5_K" if layer < 2 else "Q4_K"
    elif recipe in ("iq4_nl", "iq4_xs") and shared:
        kind = "Q5_K"
    elif recipe in ("q4_k_m", "q5_k_m") and uses_more_bits(layer, mixture.layers):
        kind = "Q6_K"
    elif recipe == "q4_k_s" and layer < 4:
        kind = "Q5_K"
    # llama.cpp takes a model of 80 layers with shared key-value heads for a 70B: its attn_v is an eighth of attn_q.
    is_70b = mixture.layers == _70B_LAYERS and mixture.groups > 1
    return "Q5_K" if is_70b and kind in ("Q3_K", "Q4_K") else kind


def _down_type(layer: int, base: str, mixture: Mixture) -> str:
    recipe, layers = mixture.recipe, mixture.layers
    if recipe == "q2_k":
        return "Q3_K"
    if recipe == "q3_k_m":
        return "Q5_K" if layer < layers // 16 else "Q4_K"
    if recipe in ("q4_k_m", "q5_k_m"):
        return "Q6_K" if uses_more_bits(layer, layers) else base
    if layer >= layers // 8:
        return base
    if recipe in ("iq4_nl", "iq4_xs"):
        return base if mixture.weighed else "Q5_K"
    if recipe in ("q4_0", "q5_0"):
        return f"{base[:3]}1" if mixture.weighed else base
    return "Q5_K" if recipe == "q4_k_s" else base
