"""The same model in transformers: dense, its weights decoded from the very blocks the packed teacher keeps.

The blocks are decoded by ``formats/blocks/decode.py`` (torch operations), not by the CUDA kernels that are under test.
"""

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from q4kd.trainer.formats.architecture import TeacherConfig
from q4kd.trainer.formats.blocks.decode import decode_rows
from q4kd.trainer.formats.tensor_names import gguf_name
from q4kd.trainer.teacher.cuda.weights import DeviceTensor

_TILE_WEIGHTS = 1 << 24


def build_twin(config: TeacherConfig, tensors: Mapping[str, DeviceTensor], dtype: torch.dtype) -> Any:
    """Return a ``Qwen2ForCausalLM`` with the tensors' weights in ``dtype``, on their device, attention by SDPA.

    The tensors are in the file's layout, before a ``CudaForward`` repacks them.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    settings = Qwen2Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        max_position_embeddings=config.context_length,
        rms_norm_eps=config.rms_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
        tie_word_embeddings=config.tied_head,
    )
    model = make_model(Qwen2ForCausalLM, settings, dtype, next(iter(tensors.values())).packed.device)
    for name, weight in model.state_dict().items():
        decode_tensor(tensors[gguf_name(name)], weight)
    return model


def make_model(kind: Any, settings: Any, dtype: torch.dtype, device: torch.device, attention: str = "sdpa") -> Any:
    """Return a model of transformers with weights of no meaning, in ``dtype`` on ``device``."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = kind(settings)
            model.set_attn_implementation(attention)
    finally:
        torch.set_default_dtype(before)
    model.requires_grad_(False).eval()
    return model


def decode_tensor(tensor: DeviceTensor, out: Tensor) -> None:
    """Decode a whole tensor in float32 and round it once into ``out``, of the tensor's shape and any float dtype."""
    rows, cols = out.shape if out.dim() == 2 else (1, out.shape[0])
    flat, step = out.view(rows, cols), max(1, _TILE_WEIGHTS // cols)
    for start in range(0, rows, step):
        packed = tensor.packed[start : start + step]
        tile = torch.empty(len(packed), cols, dtype=torch.float32, device=out.device)
        flat[start : start + step].copy_(decode_rows(tensor.type, packed, tile, tensor.scale))


def to_nf4(model: Any) -> None:
    """Replace every linear layer but the head by bitsandbytes' 4-bit NF4 one, computing in bfloat16, in place.

    Raises:
        ImportError: when bitsandbytes is not installed.
    """
    bitsandbytes = importlib.import_module("bitsandbytes")

    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    setattr(parent, name, _nf4(bitsandbytes, linear))


def _nf4(bitsandbytes: Any, linear: torch.nn.Linear) -> Any:
    packed = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=torch.bfloat16,
        quant_type="nf4",
    )
    packed.weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
    packed.bias = linear.bias
    return packed.to(linear.weight.device)
