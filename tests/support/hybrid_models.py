"""Small random models of Qwen3.5, dense and mixture, and a writer of their GGUF that shares nothing with ours.

Names and transformations are those of llama.cpp's converter (``conversion/qwen.py``): norms are stored as 1 + w but for
that of the delta net, ``A_log`` as minus its exponential, the value heads tiled in place of grouped by their key head.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from family_models import CONTEXT, SIZES, FamilyCase, add_key

_RECURRENT = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "head_dim": 32,
}
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5, "mrope_section": [3, 3, 2]}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
_KEYS = {
    "attention.key_length": 32,
    "attention.value_length": 32,
    "rope.freq_base": 10_000.0,
    "rope.dimension_count": 16,
    "rope.dimension_sections": [3, 3, 2, 0],
    "ssm.conv_kernel": 4,
    "ssm.state_size": 16,
    "ssm.group_count": 2,
    "ssm.time_step_rank": 6,
    "ssm.inner_size": 96,
    "full_attention_interval": 4,
}
_MIXTURE = {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 40,
}
_MIXTURE_KEYS = {
    "expert_count": 8,
    "expert_used_count": 3,
    "expert_feed_forward_length": 32,
    "expert_shared_feed_forward_length": 40,
}
_LISTED = [True, False, True, True, False]

HYBRIDS = {
    "qwen35": FamilyCase(
        "Qwen3_5", "qwen35", _RECURRENT | {"rope_parameters": _ROPE}, _KEYS | {"feed_forward_length": 96}
    ),
    # As many key heads as value heads, a tied head, layers in an order of their own, and YaRN.
    "qwen35-listed": FamilyCase(
        "Qwen3_5",
        "qwen35",
        _RECURRENT
        | {
            "linear_num_key_heads": 6,
            "num_hidden_layers": len(_LISTED),
            "layer_types": ["linear_attention" if is_one else "full_attention" for is_one in _LISTED],
            "tie_word_embeddings": True,
            "rope_parameters": _ROPE | _YARN,
        },
        _KEYS
        | {
            "feed_forward_length": 96,
            "ssm.group_count": 6,
            "attention.recurrent_layers": _LISTED,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 32,
        },
    ),
    "qwen35moe": FamilyCase(
        "Qwen3_5Moe", "qwen35moe", _RECURRENT | _MIXTURE | {"rope_parameters": _ROPE}, _KEYS | _MIXTURE_KEYS
    ),
}
_MODULES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "linear_attn.in_proj_qkv": "attn_qkv",
    "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.conv1d": "ssm_conv1d",
    "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}
_ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def make_hybrid(case: FamilyCase, *, seed: int = 3) -> Any:
    """Return a float64 model, alive in every part: each weight changes the logits, and states live long or shortly."""
    config = getattr(transformers, f"{case.name}TextConfig")(**(SIZES | case.config))
    model = getattr(transformers, f"{case.name}ForCausalLM")(config).eval().double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).float()
            if name.endswith("A_log"):
                parameter.copy_(2 * noise - 2)
            elif parameter.ndim >= 2:
                gain = 1.0 if name == "model.embed_tokens.weight" else parameter.shape[-1] ** -0.5
                parameter.copy_(noise * gain)
            else:
                # Norms of zero-centred weights, the gated one's around one, and biases of time steps.
                parameter.copy_((1.0 if name.endswith("linear_attn.norm.weight") else 0.0) + 0.3 * noise)
    return model


def write_hybrid(path: Path, case: FamilyCase, model: Any, *, vocabulary: bool = False, predictors: int = 0) -> Path:
    """Write the model as a GGUF of float32 tensors, with so many blocks behind its layers that predict more tokens."""
    config = model.config
    writer = gguf.GGUFWriter(path, case.architecture)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers + predictors)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if predictors:
        writer.add_uint32(f"{case.architecture}.nextn_predict_layers", predictors)
    if vocabulary:
        writer.add_tokenizer_model("no_vocab")
        writer.add_vocab_size(config.vocab_size)
    for key, value in case.keys.items():
        if key == "attention.recurrent_layers":
            value = value + [False] * predictors
        add_key(writer, f"{case.architecture}.{key}", value)
    for name, data in stored_tensors(model, predictors):
        writer.add_tensor(name, np.ascontiguousarray(data, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def stored_tensors(model: Any, predictors: int = 0) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tensors of a file, float64, under GGUF's names."""
    config = model.config
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        yield from _stored(name, tensor.numpy(), config)
    for block in range(config.num_hidden_layers, config.num_hidden_layers + predictors):
        # Such a block has a layer's tensors and some of its own; no word of it is read.
        yield f"blk.{block}.attn_norm.weight", np.full(config.hidden_size, np.nan)
        yield f"blk.{block}.nextn.eh_proj.weight", np.full((config.hidden_size, 2 * config.hidden_size), np.nan)


def _stored(name: str, data: np.ndarray, config: Any) -> Iterator[tuple[str, np.ndarray]]:
    module, _, kind = name.rpartition(".")
    if module in _ENDS:
        yield f"{_ENDS[module]}.{kind}", data + 1 if module == "model.norm" else data
        return
    _, _, layer, rest = name.split(".", 3)
    prefix = f"blk.{layer}."
    if rest == "mlp.experts.gate_up_proj":
        gate, up = np.split(data, 2, axis=1)
        yield from ((f"{prefix}ffn_gate_exps.weight", gate), (f"{prefix}ffn_up_exps.weight", up))
    elif rest == "mlp.experts.down_proj":
        yield f"{prefix}ffn_down_exps.weight", data
    elif rest.startswith("linear_attn"):
        yield (
            prefix + _RECURRENT_NAMES.get(rest, f"{_MODULES.get(rest.rpartition('.')[0])}.{kind}"),
            _tiled(rest, data, config),
        )
    else:
        stored = f"{prefix}{_MODULES[rest.rpartition('.')[0]]}.{kind}"
        yield stored, data + 1 if "norm" in rest else data.squeeze()


_RECURRENT_NAMES = {"linear_attn.A_log": "ssm_a", "linear_attn.dt_bias": "ssm_dt.bias"}


def _tiled(rest: str, data: np.ndarray, config: Any) -> np.ndarray:
    """Return a delta net's tensor in the order of files: the first value head of every key head, and so on."""
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    order = np.arange(values).reshape(keys, values // keys).T.ravel()
    size = config.linear_value_head_dim
    elements = (order[:, None] * size + np.arange(size)).ravel()
    before = 2 * keys * config.linear_key_head_dim
    part = rest.removeprefix("linear_attn.").removesuffix(".weight")
    if part == "A_log":
        return -np.exp(data[order])
    if part in ("dt_bias", "in_proj_a", "in_proj_b"):
        return data[order]
    if part in ("in_proj_qkv", "conv1d"):
        data = data.squeeze()
        return np.concatenate([data[:before], data[before:][elements]])
    if part == "in_proj_z":
        return data[elements]
    return data[:, elements] if part == "out_proj" else data
