"""A minimal qwen2 GGUF for tests that need a valid file, or one with a single thing wrong."""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np


def write_model(path: Path, change: Callable[[gguf.GGUFWriter], None] | None = None, **keys: int) -> Path:
    """Write a one-layer qwen2 with F32 tensors of zeros; ``change`` may add to it, ``keys`` change its dimensions."""
    sizes = {"hidden": 64, "ffn": 96, "heads": 4, "kv": 2, "vocab": 40, "layers": 1} | keys
    writer = gguf.GGUFWriter(path, "qwen2")
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
