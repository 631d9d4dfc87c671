"""The same mixture in transformers: dense, its weights decoded from the very blocks the packed teacher keeps."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from q4kd.trainer.bench.teacher.dense_twin import decode_tensor, make_model
from q4kd.trainer.bench.teacher.hybrid_twin import build_hybrid_twin
from q4kd.trainer.formats.architecture import TeacherConfig
from q4kd.trainer.formats.blocks.decode import decode_rows
from q4kd.trainer.formats.tensor_names import gguf_name
from q4kd.trainer.teacher.cuda.weights import DeviceTensor

_TILE_WEIGHTS = 1 << 25


def build_mixture_twin(config: TeacherConfig, tensors: Mapping[str, DeviceTensor], dtype: torch.dtype) -> Any:
    """Return a ``Qwen3MoeForCausalLM`` with the tensors' weights in ``dtype``, on their device; of a hybrid, its own.

    Attention is by SDPA, experts by torch's grouped products where transformers has them for the device. The tensors
    are in the file's layout, before a ``CudaForward`` repacks them.
    """
    if config.recurrence is not None:
        return build_hybrid_twin(config, tensors, dtype, _decode_experts)
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    make_config: Any = Qwen3MoeConfig  # its annotations leave out what it takes by name
    settings = make_config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_size,
        moe_intermediate_size=config.expert_ffn_size,
        num_experts=config.num_experts,
        num_experts_per_tok=config.experts_per_token,
        norm_topk_prob=True,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.context_length,
        rms_norm_eps=config.rms_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
        tie_word_embeddings=config.tied_head,
        router_aux_loss_coef=0.0,
    )
    model = make_model(Qwen3MoeForCausalLM, settings, dtype, next(iter(tensors.values())).packed.device)
    size = config.expert_ffn_size
    for name, weight in model.state_dict().items():
        prefix, _, part = name.partition(".mlp.")
        if not part:
            decode_tensor(tensors[gguf_name(name)], weight)
            continue
        layer = f"blk.{prefix.rpartition('.')[2]}.ffn_"
        if part == "gate.weight":
            decode_tensor(tensors[layer + "gate_inp.weight"], weight)
        elif part == "experts.down_proj":
            _decode_experts(tensors[layer + "down_exps.weight"], weight)
        elif part == "experts.gate_up_proj":
            _decode_experts(tensors[layer + "gate_exps.weight"], weight[:, :size])
            _decode_experts(tensors[layer + "up_exps.weight"], weight[:, size:])
        else:
            raise ValueError(f"tensor {name}: expected a router, or gate_up_proj and down_proj of the experts")
    return model


def _decode_experts(tensor: DeviceTensor, out_ENK: Tensor) -> None:
    """Decode a tensor of experts in float32 and round it once into ``[E, N, K]``, whose experts may lie apart."""
    experts, rows, cols = out_ENK.shape
    packed = tensor.packed.view(experts * rows, -1)
    step = max(1, _TILE_WEIGHTS // (rows * cols))
    for start in range(0, experts, step):
        stop = min(start + step, experts)
        tile = torch.empty((stop - start) * rows, cols, dtype=torch.float32, device=out_ENK.device)
        decoded = decode_rows(tensor.type, packed[start * rows : stop * rows], tile, tensor.scale)
        out_ENK[start:stop].copy_(decoded.view(stop - start, rows, cols))
