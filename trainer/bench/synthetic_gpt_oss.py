"""Makes a gpt-oss-20b without its weights, as ``synthetic_30b_a3b.py`` makes a Qwen3: shapes, types and scales only.

Types are those of the files that people download: experts in MXFP4 as they were trained, the other matrices in Q8_0,
routers, norms, sinks and biases in float32.
"""

import math

import torch
from torch import Tensor

from q4kd.trainer.bench.synthetic_7b import BIAS_SIGMA, WEIGHT_SIGMA
from q4kd.trainer.formats.architecture import TeacherConfig
from q4kd.trainer.formats.blocks.layout import block_format
from q4kd.trainer.formats.families import FAMILIES
from q4kd.trainer.formats.rope_scaling import RopeScaling
from q4kd.trainer.formats.tensor_shapes import expected_shapes
from q4kd.trainer.teacher.cuda.weights import DeviceTensor

# A router's logits then have a standard deviation of about one, as in ``synthetic_30b_a3b.py``.
ROUTER_SIGMA = 0.02
# 4-bit floats with a scale of one have a standard deviation of 2.93, bytes one of 73.9.
_MXFP4_EXPONENT = 127 + round(math.log2(WEIGHT_SIGMA / 2.93))
_Q8_0_SCALE = WEIGHT_SIGMA / 73.9
_YARN_FACTOR = 32.0


def gpt_oss_20b(num_layers: int = 24) -> TeacherConfig:
    """Return the dimensions of gpt-oss-20b, or of its first ``num_layers`` layers."""
    family = FAMILIES["gpt-oss"]
    return TeacherConfig(
        architecture="gpt-oss",
        num_layers=num_layers,
        hidden_size=2880,
        ffn_size=2880,
        num_heads=64,
        num_kv_heads=8,
        head_dim=64,
        rms_eps=1e-5,
        rope_base=150_000.0,
        rope_layout=family.rope_layout,
        qk_norm=False,
        context_length=131072,
        vocab_size=201088,
        tied_head=False,
        windows=tuple(0 if layer % 2 else 128 for layer in range(num_layers)),
        rope_scaling=RopeScaling(
            kind="yarn",
            factor=_YARN_FACTOR,
            attention_factor=0.1 * math.log(_YARN_FACTOR) + 1,
            original_context=4096,
            is_rounded=family.rounds_yarn,
        ),
        num_experts=32,
        experts_per_token=4,
        expert_ffn_size=2880,
    )


def tensor_types(config: TeacherConfig) -> dict[str, str]:
    """Return every tensor's GGML type."""
    types = {}
    for name, shape in expected_shapes(config).items():
        is_float = len(shape) == 1 or name.endswith(".bias") or "ffn_gate_inp" in name
        types[name] = "F32" if is_float else "MXFP4" if len(shape) == 3 else "Q8_0"
    return types


def make_tensors(config: TeacherConfig, device: torch.device, seed: int = 0) -> dict[str, DeviceTensor]:
    """Return every tensor of a model with these dimensions, random, on the device, in the file's layout."""
    generator = torch.Generator(device).manual_seed(seed)
    shapes, tensors = expected_shapes(config), {}
    for name, type_name in tensor_types(config).items():
        shape = shapes[name]
        if type_name == "F32":
            values = torch.randn(math.prod(shape[:-1]), shape[-1], device=device, generator=generator)
            if "ffn_gate_inp.weight" in name:
                values *= ROUTER_SIGMA
            elif not name.endswith("attn_sinks.weight"):
                values = values.mul_(BIAS_SIGMA) + float(name.endswith("norm.weight"))
            packed = values.view(torch.uint8)
        else:
            packed = _make_blocks(type_name, math.prod(shape[:-1]), shape[-1], generator)
        tensors[name] = DeviceTensor(name, type_name, shape, packed)
    return tensors


def _make_blocks(type_name: str, rows: int, cols: int, generator: torch.Generator) -> Tensor:
    """Return random packed rows, uint8 ``[rows, row_bytes]``, of MXFP4 or Q8_0, on the generator's device."""
    form, device = block_format(type_name), generator.device
    shape = (rows * cols // form.block_size, form.block_bytes)
    blocks = torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=generator)
    if type_name == "MXFP4":
        blocks[:, 0] = _MXFP4_EXPONENT - 1 + blocks[:, 0] % 3  # blocks differ in scale by up to a factor of four
    else:
        spread = torch.empty(len(blocks), 1, device=device).uniform_(0.5, 1.5, generator=generator)
        blocks[:, 0:2].view(torch.float16).copy_(spread * _Q8_0_SCALE)
    return blocks.view(rows, -1)
