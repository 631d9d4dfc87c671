"""What transformers' gpt-oss calls its tensors and how it lays them out, and what a GGUF has instead.

Names and layouts are those of llama.cpp's converter (``conversion/gpt_oss.py``): transformers multiplies states by the
experts' matrices from the right, and holds the columns of gate and up in turn.
"""

from typing import Any

import numpy as np
import torch

_ENDS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_PARTS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.router": "ffn_gate_inp",
}


def enliven(model: Any, generator: torch.Generator) -> None:
    """Let every part change the logits: sinks that differ, biases, and gates and products beyond their clamps."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).float()
            if name.endswith("sinks"):
                parameter.copy_(1 + 2 * noise)
            elif name.endswith(("gate_up_proj", "down_proj")):
                parameter.copy_(noise * (5.0 if "gate" in name else 0.3) * parameter.shape[1] ** -0.5)
            elif name.endswith(("proj_bias", "router.bias")):
                parameter.copy_(0.5 * noise)


def gpt_oss_tensors(name: str, data: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Return the tensors of a file that one of transformers' becomes."""
    if name in _ENDS:
        return [(_ENDS[name], data)]
    _, _, layer, rest = name.split(".", 3)
    module, _, kind = rest.rpartition(".")
    prefix = f"blk.{layer}."
    if kind == "sinks":
        return [(prefix + "attn_sinks.weight", data)]
    if module != "mlp.experts":
        return [(f"{prefix}{_PARTS[module]}.{kind}", data)]
    end = "bias" if kind.endswith("_bias") else "weight"
    rows = data if end == "bias" else data.transpose(0, 2, 1)
    if kind.startswith("down"):
        return [(f"{prefix}ffn_down_exps.{end}", rows)]
    return [(f"{prefix}ffn_gate_exps.{end}", rows[:, 0::2]), (f"{prefix}ffn_up_exps.{end}", rows[:, 1::2])]
