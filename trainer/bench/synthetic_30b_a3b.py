"""Makes a Qwen3-30B-A3B without its weights, as ``synthetic_7b.py`` makes a Qwen2.5-7B: shapes, types and scales only.

Routers are random too, so tokens spread over all experts: 8,192 tokens give each of 128 experts about 512 rows.
"""

import math
from typing import TYPE_CHECKING

from q4kd.trainer.formats.architecture import TeacherConfig
from q4kd.trainer.formats.gguf.recipes import Mixture, tensor_type
from q4kd.trainer.formats.tensor_shapes import expected_shapes

if TYPE_CHECKING:
    import torch

    from q4kd.trainer.teacher.cuda.weights import DeviceTensor

# A router's logits then have a standard deviation of about one: experts are unlike, and none is rarely chosen.
ROUTER_SIGMA = 0.02
CONVOLUTION_SIGMA = 0.5


def qwen3_30b_a3b(num_layers: int = 48) -> TeacherConfig:
    """Return the dimensions of Qwen3-30B-A3B, or of its first ``num_layers`` layers."""
    return TeacherConfig(
        architecture="qwen3moe",
        num_layers=num_layers,
        hidden_size=2048,
        ffn_size=6144,
        num_heads=32,
        num_kv_heads=4,
        head_dim=128,
        rms_eps=1e-6,
        rope_base=1e6,
        rope_layout="split_halves",
        qk_norm=True,
        context_length=40960,
        vocab_size=151936,
        tied_head=False,
        num_experts=128,
        experts_per_token=8,
        expert_ffn_size=768,
    )


def tensor_types(config: TeacherConfig) -> dict[str, str]:
    """Return every tensor's GGML type under llama.cpp's Q4_K_M recipe; biases are left out, which Qwen3 has not.

    The recipe treats ``ffn_down_exps`` as ``ffn_down``, and leaves routers (``ffn_gate_inp``) and convolutions in F32
    (``llama-quant.cpp``, ``llama_tensor_get_type`` and ``tensor_allows_quantization``).
    """
    mixture = Mixture("q4_k_m", config.num_layers, config.tied_head, config.num_heads // config.num_kv_heads)
    types = {}
    for name, shape in expected_shapes(config).items():
        if name.endswith(".bias") and not name.endswith("ssm_dt.bias"):
            continue
        flat = (math.prod(shape[:-1]), shape[-1]) if len(shape) > 1 else shape
        is_kept = name.endswith(("ffn_gate_inp.weight", "ssm_conv1d.weight"))
        plain = name.replace("_exps.", ".").replace("_shexp.", ".")
        types[name] = "F32" if is_kept else tensor_type(plain, flat, mixture)
    return types


def make_tensors(config: TeacherConfig, device: "torch.device", seed: int = 0) -> "dict[str, DeviceTensor]":
    """Return every tensor of a model with these dimensions, random, on the device, in the file's layout."""
    import torch

    from q4kd.trainer.bench.synthetic_7b import make_blocks
    from q4kd.trainer.teacher.cuda.weights import DeviceTensor

    generator = torch.Generator(device).manual_seed(seed)
    shapes = expected_shapes(config)
    tensors = {}
    for name, type_name in tensor_types(config).items():
        shape = shapes[name]
        if type_name != "F32":
            packed = make_blocks(type_name, math.prod(shape[:-1]), shape[-1], generator)
        elif len(shape) > 1:
            sigma = CONVOLUTION_SIGMA if name.endswith("ssm_conv1d.weight") else ROUTER_SIGMA
            packed = torch.randn(shape, device=device, generator=generator).mul_(sigma).view(torch.uint8)
        else:
            made = torch.randn(1, *shape, device=device, generator=generator)
            # Decays are below 0: a state then keeps between a thousandth and all but a thousandth of itself at a token.
            made = -(2 * made - 2).exp_() if name.endswith("ssm_a") else made.mul_(0.1).add_(1)
            packed = made.view(torch.uint8)
        tensors[name] = DeviceTensor(name, type_name, shape, packed)
    return tensors
