"""Makes a Qwen2.5-7B without its weights: exact shapes and Q4_K_M types, with random blocks made on the device.

Speed, memory and rounding do not depend on what the weights say, only on their shapes, types and scale. Every byte of
every block is random except the float16 scales, drawn so that the decoded weights have a standard deviation of about
0.02 and a mean of about 0, as trained ones do.
"""

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from q4kd.trainer.formats.architecture import TeacherConfig
from q4kd.trainer.formats.blocks.layout import block_format
from q4kd.trainer.formats.gguf.recipes import Mixture, tensor_type
from q4kd.trainer.formats.gguf.writer import add_hyperparameters
from q4kd.trainer.formats.tensor_shapes import expected_shapes
from q4kd.trainer.teacher.cuda.weights import DeviceTensor

WEIGHT_SIGMA = 0.02
BIAS_SIGMA = 0.1
# A weight with d = 1 and all other bits uniform has this standard deviation. In Q4_K it is sc * q - 7.5 * m with sc and
# m in 0..63 and q in 0..15 (dmin = 7.5 d centres it); in Q6_K it is sc * (q - 32) with sc in -128..127, q in 0..63.
_UNIT_SIGMA = {"Q4_K": 258.3, "Q6_K": 1365.8}


def qwen2_5_7b(num_layers: int = 28) -> TeacherConfig:
    """Return the dimensions of Qwen2.5-7B, or of its first ``num_layers`` layers."""
    return TeacherConfig(
        architecture="qwen2",
        num_layers=num_layers,
        hidden_size=3584,
        ffn_size=18944,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        rms_eps=1e-6,
        rope_base=1e6,
        rope_layout="split_halves",
        qk_norm=False,
        context_length=32768,
        vocab_size=152064,
        tied_head=False,
    )


def tensor_types(config: TeacherConfig) -> dict[str, str]:
    """Return every tensor's GGML type under llama.cpp's Q4_K_M recipe."""
    mixture = Mixture("q4_k_m", config.num_layers, config.tied_head, config.num_heads // config.num_kv_heads)
    return {name: tensor_type(name, shape, mixture) for name, shape in expected_shapes(config).items()}


def make_blocks(type_name: str, rows: int, cols: int, generator: torch.Generator) -> Tensor:
    """Return random packed rows, uint8 ``[rows, row_bytes]``, of Q4_K or Q6_K, on the generator's device."""
    form = block_format(type_name)
    device = generator.device
    count = rows * cols // form.block_size
    blocks = torch.randint(0, 256, (count, form.block_bytes), dtype=torch.uint8, device=device, generator=generator)
    # Blocks differ in scale by up to a factor of three.
    spread = torch.empty(count, 1, device=device).uniform_(0.5, 1.5, generator=generator)
    d = spread * (WEIGHT_SIGMA / _UNIT_SIGMA[type_name])
    if type_name == "Q4_K":
        blocks[:, 0:4].view(torch.float16).copy_(torch.cat([d, 7.5 * d], dim=1))
    else:
        blocks[:, 208:210].view(torch.float16).copy_(d)
    return blocks.view(rows, -1)


def make_tensors(config: TeacherConfig, device: torch.device, seed: int = 0) -> dict[str, DeviceTensor]:
    """Return every tensor of a model with these dimensions, random, on the device, in the file's layout."""
    generator = torch.Generator(device).manual_seed(seed)
    types = tensor_types(config)
    tensors = {}
    for name, shape in expected_shapes(config).items():
        if len(shape) > 1:
            packed = make_blocks(types[name], shape[0], shape[1], generator)
        else:
            values = torch.randn(1, shape[0], device=device, generator=generator).mul_(BIAS_SIGMA)
            packed = (values if name.endswith(".bias") else values + 1).view(torch.uint8)
        tensors[name] = DeviceTensor(name, types[name], shape, packed)
    return tensors


def write_gguf(path: Path, config: TeacherConfig, tensors: Mapping[str, DeviceTensor]) -> None:
    """Write tensors in the file's layout as a GGUF of a qwen2 model, one at a time through host memory."""
    writer = gguf.GGUFWriter(path, config.architecture)
    add_hyperparameters(writer, config)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    for name, tensor in tensors.items():
        kind, size = gguf.GGMLQuantizationType[tensor.type], tensor.packed.numel()
        if kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), size)
        else:
            writer.add_tensor_info(name, tuple(tensor.packed.shape), np.dtype(np.uint8), size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors.values():
        writer.write_tensor_data(tensor.packed.cpu().numpy())
    writer.close()
