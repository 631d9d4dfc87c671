"""A minimal GGUF for tests that need a valid file, or one with a single thing wrong."""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np

from q4kd.harness.inputs.models.code_blocks import CODE_TYPES, random_code_blocks
from q4kd.harness.inputs.models.synthetic_models import TENSOR_SCALE
from q4kd.trainer.formats.blocks.quantize import quantize


def write_model(
    path: Path,
    change: Callable[[gguf.GGUFWriter], None] | None = None,
    *,
    architecture: str = "qwen2",
    **keys: int,
) -> Path:
    """Write a one-layer model with F32 tensors of zeros; ``change`` may add to it, ``keys`` change its dimensions."""
    sizes = {"hidden": 64, "ffn": 96, "heads": 4, "kv": 2, "vocab": 40, "layers": 1} | keys
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_embedding_length(sizes["hidden"])
    writer.add_block_count(sizes["layers"])
    writer.add_feed_forward_length(sizes["ffn"])
    writer.add_head_count(sizes["heads"])
    writer.add_head_count_kv(sizes["kv"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_context_length(128)
    head_dim = 16
    for name, shape in {
        "token_embd.weight": (40, 64),
        "output_norm.weight": (64,),
        "blk.0.attn_norm.weight": (64,),
        "blk.0.ffn_norm.weight": (64,),
        "blk.0.attn_q.weight": (4 * head_dim, 64),
        "blk.0.attn_k.weight": (2 * head_dim, 64),
        "blk.0.attn_v.weight": (2 * head_dim, 64),
        "blk.0.attn_output.weight": (64, 64),
        "blk.0.ffn_gate.weight": (96, 64),
        "blk.0.ffn_up.weight": (96, 64),
        "blk.0.ffn_down.weight": (64, 96),
    }.items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    if change:
        change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def retype(
    source: Path, target: Path, types: Callable[[str], str | None], unscaled: tuple[str, ...] = ("token_embd",)
) -> Path:
    """Copy a GGUF, storing each F32 tensor as ``types(name)`` where that is a type and not None.

    What the gguf package cannot quantise to, our quantiser writes; the types of codes get random blocks of about the
    tensor's standard deviation. NVFP4 matrices get a scale of their own beside them, but those whose names
    hold one of ``unscaled``.
    """
    reader = gguf.GGUFReader(source)
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            sub_type = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type)
    for tensor in reader.tensors:
        data, name = np.asarray(tensor.data), types(tensor.name)
        if name is None:
            writer.add_tensor(tensor.name, data)
            continue
        kind = gguf.GGMLQuantizationType[name]
        if name in CODE_TYPES:
            is_scaled = name == "NVFP4" and not any(part in tensor.name for part in unscaled)
            scale = TENSOR_SCALE if is_scaled else 1.0
            count = data.size // gguf.GGML_QUANT_SIZES[kind][0]
            packed = random_code_blocks(rng, name, count, float(data.std()) / scale).reshape(len(data), -1)
            if scale != 1.0:
                writer.add_tensor(tensor.name.replace(".weight", ".scale"), np.array([scale], np.float32))
        else:
            try:
                packed = gguf.quants.quantize(data, kind)
            except NotImplementedError:
                packed = quantize(data, name)
        writer.add_tensor(tensor.name, packed.view(np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
