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


def gguf_name(name: str) -> str:
    """Return the GGUF name of a tensor, such as ``blk.7.attn_q.bias`` for ``model.layers.7.self_attn.q_proj.bias``.

    A name that is not Hugging Face's, a GGUF name included, is returned as it is.
    """
    if name in _MODEL:
        return _MODEL[name]
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    module, _, kind = rest.rpartition(".")
    if name.startswith("model.layers.") and layer.isascii() and layer.isdigit() and module in _LAYER:
        return f"blk.{layer}.{_LAYER[module]}.{kind}"
    return name
