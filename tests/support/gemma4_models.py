"""Small random Gemma 4 models of transformers, and a writer of their GGUF that shares nothing with ours.

Names and metadata are those of llama.cpp's converter (``conversion/gemma.py``): norms are stored as they are, gate and
up of the experts as one tensor, and what the full layers divide their frequencies by in ``rope_freqs.weight``.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from family_models import add_key

CONTEXT, LENGTH, WINDOW, VOCAB = 256, 72, 7, 320
HEAD, WINDOW_HEAD, HEADS, KV_HEADS, WINDOW_KV_HEADS = 32, 16, 4, 1, 2
_TYPES = ["sliding_attention", "sliding_attention", "full_attention"] * 2
_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "post_feedforward_layernorm_1": "post_ffw_norm_1",
    "post_feedforward_layernorm_2": "post_ffw_norm_2",
    "pre_feedforward_layernorm_2": "pre_ffw_norm_2",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "router.proj": "ffn_gate_inp",
}
_WHOLE = {
    "layer_scalar": "layer_output_scale.weight",
    "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
    "experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "experts.down_proj": "ffn_down_exps.weight",
}
_ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


@dataclass(frozen=True)
class Gemma4Case:
    """A model.

    Attributes:
        config: changes of its config.
        keys: further metadata without prefix; None takes a key away.
        splits_gate_up: whether gate and up of the experts are two tensors.
    """

    config: dict[str, Any] = field(default_factory=dict)
    keys: dict[str, Any] = field(default_factory=dict)
    splits_gate_up: bool = False


_EXPERTS = {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 3, "moe_intermediate_size": 24}
_EXPERT_KEYS = {"expert_count": 8, "expert_used_count": 3, "expert_feed_forward_length": 24}
_CAP, _CAP_KEY = {"final_logit_softcapping": 3.0}, {"final_logit_softcapping": 3.0}
GEMMA4 = {
    "gemma4": Gemma4Case({"attention_k_eq_v": True, **_CAP}, _CAP_KEY),
    # Values of their own in every layer, as many key-value heads in all, an untied head and no cap.
    "gemma4-values": Gemma4Case(
        {"attention_k_eq_v": False, "num_global_key_value_heads": None, "tie_word_embeddings": False},
        {"attention.head_count_kv": WINDOW_KV_HEADS},
    ),
}
GEMMA4_MIXTURES = {
    "gemma4-mixture": Gemma4Case({"attention_k_eq_v": True, **_CAP, **_EXPERTS}, _CAP_KEY | _EXPERT_KEYS),
    "gemma4-mixture-apart": Gemma4Case(
        {"attention_k_eq_v": True, **_EXPERTS, "top_k_experts": 8}, _EXPERT_KEYS | {"expert_used_count": 8}, True
    ),
}


def make_gemma4(case: Gemma4Case, *, seed: int = 0) -> Any:
    """Return a float64 model, alive in every part: each weight, norm and scale changes the logits."""
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": len(_TYPES),
        "num_attention_heads": HEADS,
        "num_key_value_heads": WINDOW_KV_HEADS,
        "num_global_key_value_heads": KV_HEADS,
        "head_dim": WINDOW_HEAD,
        "global_head_dim": HEAD,
        "layer_types": list(_TYPES),
        "sliding_window": WINDOW,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "hidden_size_per_layer_input": 0,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1_000.0},
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 10_000.0},
        },
        "pad_token_id": None,
        "attn_implementation": "eager",
        "experts_implementation": "eager",
    }
    config = transformers.Gemma4TextConfig(**(settings | case.config))
    model = transformers.Gemma4ForCausalLM(config).eval().double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).float()
            if name.endswith(("router.scale", "per_expert_scale")) or (tensor.ndim == 1 and name.endswith("weight")):
                tensor.copy_(1 + 0.3 * noise)
            elif name.endswith("layer_scalar"):
                tensor.copy_(0.8 + 0.1 * noise)
            elif tensor.ndim >= 2:
                # Scores of normalised heads are not scaled: norms of queries near 1 / D keep them from saturating.
                gain = 4.0 if "router" in name else 1.0
                tensor.copy_(noise * gain * tensor.shape[-1] ** -0.5)
        for layer in model.model.layers:
            layer.self_attn.q_norm.weight.mul_(layer.self_attn.head_dim**-0.5)
    return model


def write_gemma4(path: Path, case: Gemma4Case, model: Any, *, vocabulary: bool = False, **changes: Any) -> Path:
    """Write the model as a GGUF of float32 tensors.

    ``vocabulary`` names none, as llama.cpp wants to hear; ``changes`` are of tensors, by GGUF name: an array, or None
    to leave one out.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, "gemma4")
    full = [kind == "full_attention" for kind in config.layer_types]
    rotated = int(HEAD * 0.25 / 2)
    keys: dict[str, Any] = {
        "context_length": CONTEXT,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": HEADS,
        "attention.head_count_kv": [KV_HEADS if is_full else WINDOW_KV_HEADS for is_full in full],
        "attention.key_length": HEAD,
        "attention.value_length": HEAD,
        "attention.key_length_swa": WINDOW_HEAD,
        "attention.value_length_swa": WINDOW_HEAD,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.sliding_window": WINDOW,
        "attention.sliding_window_pattern": [not is_full for is_full in full],
        "attention.shared_kv_layers": 0,
        "embedding_length_per_layer_input": 0,
        "rope.freq_base": 10_000.0,
        "rope.freq_base_swa": 1_000.0,
        "rope.dimension_count": HEAD,
        "rope.dimension_count_swa": WINDOW_HEAD,
    }
    for key, value in (keys | case.keys).items():
        if value is not None:
            add_key(writer, f"gemma4.{key}", value)
    if vocabulary:
        writer.add_tokenizer_model("no_vocab")
        writer.add_vocab_size(config.vocab_size)
    arrays = {"rope_freqs.weight": np.array([1.0] * rotated + [1e30] * (HEAD // 2 - rotated), np.float32)}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        arrays |= _stored(name, tensor.float().numpy(), case)
    for name, array in (arrays | changes).items():
        if array is not None:
            writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _stored(name: str, data: np.ndarray, case: Gemma4Case) -> dict[str, np.ndarray]:
    module, _, kind = name.rpartition(".")
    if module in _ENDS:
        return {f"{_ENDS[module]}.{kind}": data}
    _, _, layer, rest = name.split(".", 3)
    prefix = f"blk.{layer}."
    if rest == "experts.gate_up_proj" and case.splits_gate_up:
        gate, up = np.split(data, 2, axis=1)
        return {f"{prefix}ffn_gate_exps.weight": gate, f"{prefix}ffn_up_exps.weight": up}
    if rest in _WHOLE:
        return {prefix + _WHOLE[rest]: data.reshape(1) if rest == "layer_scalar" else data}
    return {f"{prefix}{_NAMES[rest.rpartition('.')[0]]}.{kind}": data}
