"""The same gpt-oss in transformers: dense, its weights decoded from the very blocks the packed teacher keeps."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from q4kd.trainer.bench.teacher.dense_twin import make_model
from q4kd.trainer.formats.architecture import TeacherConfig
from q4kd.trainer.formats.blocks.decode import decode_rows
from q4kd.trainer.teacher.cuda.weights import DeviceTensor

_ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_PARTS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.router": "ffn_gate_inp",
}


def build_gpt_oss_twin(config: TeacherConfig, tensors: Mapping[str, DeviceTensor], dtype: torch.dtype) -> Any:
    """Return a ``GptOssForCausalLM`` with the tensors' weights in ``dtype``, on their device.

    Attention is transformers' eager one, since its sinks are in no kernel of torch; experts are multiplied by torch's
    grouped products where transformers has them for the device. The tensors are in the file's layout.
    """
    from transformers import GptOssConfig, GptOssForCausalLM

    make_config: Any = GptOssConfig  # its annotations leave out what it takes by name
    scaling, windows = config.rope_scaling, config.windows
    if scaling is None or scaling.kind != "yarn" or not any(windows):
        raise ValueError(f"expected YaRN and windows, got {scaling} and {windows}")
    settings = make_config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.expert_ffn_size,
        num_local_experts=config.num_experts,
        num_experts_per_tok=config.experts_per_token,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.context_length,
        rms_norm_eps=config.rms_eps,
        sliding_window=max(windows),
        layer_types=["sliding_attention" if window else "full_attention" for window in windows],
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": config.rope_base,
            "factor": scaling.factor,
            "attention_factor": scaling.attention_factor,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "truncate": scaling.is_rounded,
            "original_max_position_embeddings": scaling.original_context,
        },
        tie_word_embeddings=config.tied_head,
    )
    model = make_model(GptOssForCausalLM, settings, dtype, next(iter(tensors.values())).packed.device, "eager")
    for name, weight in model.state_dict().items():
        _fill(name, weight, tensors)
    return model


def _fill(name: str, weight: Tensor, tensors: Mapping[str, DeviceTensor]) -> None:
    """Decode what a tensor of transformers' holds into it, where columns of gate and up take turns."""
    module, _, kind = name.rpartition(".")
    if module in _ENDS:
        weight.copy_(_decoded(tensors[f"{_ENDS[module]}.weight"]))
        return
    _, _, layer, rest = module.split(".", 3)
    prefix, end = f"blk.{layer}.", "bias" if kind.endswith("_bias") else "weight"
    if kind == "sinks":
        weight.copy_(_decoded(tensors[f"{prefix}attn_sinks.weight"]))
    elif rest != "mlp.experts":
        weight.copy_(_decoded(tensors[f"{prefix}{_PARTS[rest]}.{kind}"]))
    elif kind.startswith("down"):
        _fill_experts(tensors[f"{prefix}ffn_down_exps.{end}"], weight)
    else:
        _fill_experts(tensors[f"{prefix}ffn_gate_exps.{end}"], weight[..., 0::2])
        _fill_experts(tensors[f"{prefix}ffn_up_exps.{end}"], weight[..., 1::2])


def _fill_experts(tensor: DeviceTensor, out: Tensor) -> None:
    """Decode a tensor of experts, one after another: biases ``[E, N]``, or matrices into ``[E, K, N]``."""
    if len(tensor.shape) == 2:
        out.copy_(_decoded(tensor))
        return
    rows = tensor.packed.view(math.prod(tensor.shape[:-1]), -1)
    for expert, packed in enumerate(torch.split(rows, tensor.shape[1])):
        tile = torch.empty(tensor.shape[1:], dtype=torch.float32, device=out.device)
        out[expert].copy_(decode_rows(tensor.type, packed, tile, tensor.scale).T)


def _decoded(tensor: DeviceTensor) -> Tensor:
    rows = math.prod(tensor.shape[:-1])
    tile = torch.empty(rows, tensor.shape[-1], dtype=torch.float32, device=tensor.packed.device)
    return decode_rows(tensor.type, tensor.packed.view(rows, -1), tile, tensor.scale).view(tensor.shape)
