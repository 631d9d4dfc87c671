"""Translates Hugging Face's tensor names, which most .apr files use, to GGUF's, which this project uses everywhere."""

_MODEL = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# Gemma and OLMo call the norm behind attention what others call the one before the feed-forward.
_POST_NORMS = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}
_GEMMA_NORMS = {**_POST_NORMS, "pre_feedforward_layernorm": "ffn_norm"}
_GATE_UP = {"mlp.gate_up_proj": "ffn_up"}
_OF_ARCHITECTURE = {
    "gemma2": _GEMMA_NORMS,
    "gemma3": _GEMMA_NORMS,
    "olmo2": _POST_NORMS,
    "phi3": {"self_attn.qkv_proj": "attn_qkv", **_GATE_UP},
    "glm4": {"post_self_attn_layernorm": "post_attention_norm", "post_mlp_layernorm": "post_ffw_norm", **_GATE_UP},
}


def gguf_name(name: str, architecture: str = "") -> str:
    """Return the GGUF name of a tensor, such as ``blk.7.attn_q.bias`` for ``model.layers.7.self_attn.q_proj.bias``.

    ``architecture`` is GGUF's name of it, for tensors that some call otherwise than llama does. A name that is not
    Hugging Face's, a GGUF name included, is returned as it is.
    """
    if name in _MODEL:
        return _MODEL[name]
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    module, _, kind = rest.rpartition(".")
    known = _OF_ARCHITECTURE.get(architecture, {}).get(module) or _LAYER.get(module)
    if name.startswith("model.layers.") and layer.isascii() and layer.isdigit() and known:
        return f"blk.{layer}.{known}.{kind}"
    return name
