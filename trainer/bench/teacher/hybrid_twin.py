"""The same hybrid decoder in transformers: dense, its weights decoded from the very blocks the packed teacher keeps.

transformers' own arithmetic of delta nets is torch's operations where ``fla`` and ``causal_conv1d`` are not installed.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from q4kd.trainer.bench.teacher.dense_twin import decode_tensor, make_model
from q4kd.trainer.formats.architecture import TeacherConfig
from q4kd.trainer.formats.recurrence import Recurrence
from q4kd.trainer.teacher.cuda.weights import DeviceTensor

_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "linear_attn.in_proj_qkv.weight": "attn_qkv.weight",
    "linear_attn.in_proj_z.weight": "attn_gate.weight",
    "linear_attn.in_proj_a.weight": "ssm_alpha.weight",
    "linear_attn.in_proj_b.weight": "ssm_beta.weight",
    "linear_attn.conv1d.weight": "ssm_conv1d.weight",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "linear_attn.A_log": "ssm_a",
    "linear_attn.norm.weight": "ssm_norm.weight",
    "linear_attn.out_proj.weight": "ssm_out.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.shared_expert.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_expert.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_expert.down_proj.weight": "ffn_down_shexp.weight",
    "mlp.shared_expert_gate.weight": "ffn_gate_inp_shexp.weight",
}
_ENDS = {"model.embed_tokens.weight": "token_embd.weight", "lm_head.weight": "output.weight"}
_ENDS["model.norm.weight"] = "output_norm.weight"


def build_hybrid_twin(
    config: TeacherConfig,
    tensors: Mapping[str, DeviceTensor],
    dtype: torch.dtype,
    decode_experts: Callable[[DeviceTensor, Tensor], None],
) -> Any:
    """Return a ``Qwen3_5MoeForCausalLM`` with the tensors' weights in ``dtype``, on their device.

    ``decode_experts`` writes a tensor of experts to ``[E, N, K]``. The tensors are in the file's layout, before a
    ``CudaForward`` repacks them.
    """
    from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

    sizes = config.recurrence
    if sizes is None:
        raise ValueError(f"{config.architecture}: expected a model with recurrent layers")
    make_config: Any = Qwen3_5MoeTextConfig  # its annotations leave out what it takes by name
    rope = {"rope_type": "default", "rope_theta": config.rope_base}
    settings = make_config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        moe_intermediate_size=config.expert_ffn_size,
        shared_expert_intermediate_size=config.shared_ffn_size,
        num_experts=config.num_experts,
        num_experts_per_tok=config.experts_per_token,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.context_length,
        rms_norm_eps=config.rms_eps,
        rope_parameters=rope | {"partial_rotary_factor": config.rotary_dim / config.head_dim},
        tie_word_embeddings=config.tied_head,
        linear_conv_kernel_dim=sizes.taps,
        linear_key_head_dim=sizes.head_dim,
        linear_value_head_dim=sizes.head_dim,
        linear_num_key_heads=sizes.key_heads,
        linear_num_value_heads=sizes.value_heads,
        layer_types=["linear_attention" if is_one else "full_attention" for is_one in sizes.layers],
    )
    model = make_model(Qwen3_5MoeForCausalLM, settings, dtype, next(iter(tensors.values())).packed.device)
    for name, weight in model.state_dict().items():
        if name in _ENDS:
            _fill(name, tensors[_ENDS[name]], weight, sizes)
            continue
        _, _, layer, rest = name.split(".", 3)
        prefix = f"blk.{layer}."
        if rest == "mlp.experts.down_proj":
            decode_experts(tensors[prefix + "ffn_down_exps.weight"], weight)
        elif rest == "mlp.experts.gate_up_proj":
            decode_experts(tensors[prefix + "ffn_gate_exps.weight"], weight[:, : config.expert_ffn_size])
            decode_experts(tensors[prefix + "ffn_up_exps.weight"], weight[:, config.expert_ffn_size :])
        else:
            _fill(rest, tensors[prefix + _NAMES[rest]], weight, sizes)
    return model


def _fill(name: str, tensor: DeviceTensor, weight: Tensor, sizes: Recurrence) -> None:
    """Decode a tensor into a weight of transformers: value heads grouped, norms without the 1 that files add."""
    shape = tensor.shape
    decoded = torch.empty(shape, dtype=torch.float32, device=weight.device)
    decode_tensor(tensor, decoded)
    part = name.removeprefix("linear_attn.").removesuffix(".weight")
    if part == "A_log":
        decoded = (-decoded).log()
    elif "norm" in part and not name.startswith("linear_attn"):
        decoded -= 1
    if name.startswith("linear_attn"):
        decoded = _grouped(part, decoded, sizes)
    weight.copy_(decoded.view(weight.shape))


def _grouped(part: str, decoded: Tensor, sizes: Recurrence) -> Tensor:
    """Return a delta net's tensor with the value heads of each key head beside each other."""
    heads = torch.arange(sizes.value_heads, device=decoded.device).view(-1, sizes.key_heads).T.flatten()
    inside = torch.arange(sizes.head_dim, device=decoded.device)
    elements = (heads[:, None] * sizes.head_dim + inside).flatten()
    if part in ("A_log", "dt_bias", "in_proj_a", "in_proj_b"):
        return decoded[heads]
    if part == "in_proj_z":
        return decoded[elements]
    if part in ("in_proj_qkv", "conv1d"):
        return torch.cat([decoded[: 2 * sizes.key_size], decoded[2 * sizes.key_size :][elements]])
    return decoded[:, elements] if part == "out_proj" else decoded
