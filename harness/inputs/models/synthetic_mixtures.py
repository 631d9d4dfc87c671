"""Small random mixtures of experts as GGUF files: one of many tensor types, and one whose logits say who was chosen.

All have the vocabulary of ``VOCAB`` tokens, so that they are run on the same ids.
"""

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from q4kd.harness.inputs.models.synthetic_models import CONTEXT, random_matrix

VOCAB = 160
Float32s = NDArray[np.float32]

# --- a mixture in which every part is alive ---

TYPES = ("Q4_K", "Q6_K", "Q8_0", "Q5_K", "IQ4_XS", "Q3_K")
HIDDEN, FFN, HEADS, HEAD_DIM, LAYERS, EXPERTS, PER_TOKEN = 256, 256, 4, 64, 2, 8, 3


def write_mixture(path: Path, *, seed: int = 0) -> None:
    """Write a qwen3moe of two layers whose matrices have ``TYPES`` in turn."""
    rng = np.random.default_rng(seed)
    writer = _writer(path, HIDDEN, LAYERS, EXPERTS, PER_TOKEN, FFN)
    dealt = 0

    def matrix(name: str, rows: int, cols: int, experts: int = 0) -> None:
        nonlocal dealt
        type_name = TYPES[dealt % len(TYPES)]
        dealt += 1
        data = random_matrix(rng, type_name, max(1, experts) * rows, cols, 0.8 / np.sqrt(cols))
        shaped = data.reshape(experts, rows, -1) if experts else data
        writer.add_tensor(f"{name}.weight", shaped, raw_dtype=gguf.GGMLQuantizationType[type_name])

    def vector(name: str, size: int) -> None:
        writer.add_tensor(f"{name}.weight", rng.uniform(0.5, 1.5, size).astype(np.float32))

    matrix("token_embd", VOCAB, HIDDEN)
    matrix("output", VOCAB, HIDDEN)
    vector("output_norm", HIDDEN)
    for layer in range(LAYERS):
        prefix = f"blk.{layer}."
        for name in ("attn_norm", "ffn_norm"):
            vector(f"{prefix}{name}", HIDDEN)
        for name in ("attn_q_norm", "attn_k_norm"):
            vector(f"{prefix}{name}", HEAD_DIM)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            matrix(f"{prefix}{name}", HIDDEN, HIDDEN)
        router = rng.normal(0, 2 / np.sqrt(HIDDEN), (EXPERTS, HIDDEN))
        writer.add_tensor(f"{prefix}ffn_gate_inp.weight", router.astype(np.float32))
        for name in ("gate", "up", "down"):
            matrix(f"{prefix}ffn_{name}_exps", HIDDEN, HIDDEN, EXPERTS)
    _finish(writer)


# --- a mixture whose logits are the weights of its experts ---

MARKED, MARKED_PER_TOKEN, MARKED_FFN, MARKED_HIDDEN = 16, 3, 32, 64
CONSTANT = MARKED_HIDDEN - MARKED - 1  # an element of the states that is the same for all tokens, and kept by the layer
IDLE = 5  # an expert that no token chooses


def write_marked_mixture(path: Path, *, seed: int = 0) -> None:
    """Write a qwen3moe of one layer in which expert e writes to element ``CONSTANT + 1 + e`` of the states alone.

    Attention adds nothing. Every expert computes the same from the constant element, so that what it writes is the
    weight that the router gave it, and the head's rows hand these elements out: logits 0 to 15 are those of the
    experts, and logit 16 that of the constant. Matrices of the experts are Q8_0, so that they stay packed.
    """
    rng = np.random.default_rng(seed)
    writer = _writer(path, MARKED_HIDDEN, 1, MARKED, MARKED_PER_TOKEN, MARKED_FFN, heads=1)
    embedding = rng.normal(0, 1, (VOCAB, MARKED_HIDDEN))
    embedding[:, CONSTANT:] = 0
    embedding[:, CONSTANT] = 1.5
    head = np.zeros((VOCAB, MARKED_HIDDEN))
    head[np.arange(MARKED), CONSTANT + 1 + np.arange(MARKED)] = 1
    head[MARKED, CONSTANT] = 1
    router = rng.normal(0, 0.2, (MARKED, MARKED_HIDDEN))
    router[:, CONSTANT:] = 0
    router[IDLE, CONSTANT] = -50
    inner = np.zeros((MARKED, MARKED_FFN, MARKED_HIDDEN))
    inner[:, :, CONSTANT] = 1.3
    down = np.zeros((MARKED, MARKED_HIDDEN, MARKED_FFN))
    down[np.arange(MARKED), CONSTANT + 1 + np.arange(MARKED)] = 0.1
    plain: Mapping[str, NDArray[np.float64]] = {
        "token_embd": embedding,
        "output": head,
        "output_norm": np.ones(MARKED_HIDDEN),
        "blk.0.attn_norm": np.ones(MARKED_HIDDEN),
        "blk.0.ffn_norm": np.ones(MARKED_HIDDEN),
        "blk.0.attn_q_norm": np.ones(HEAD_DIM),
        "blk.0.attn_k_norm": np.ones(HEAD_DIM),
        **{f"blk.0.attn_{part}": rng.normal(0, 0.1, (HEAD_DIM, MARKED_HIDDEN)) for part in "qkv"},
        "blk.0.attn_output": np.zeros((MARKED_HIDDEN, HEAD_DIM)),
        "blk.0.ffn_gate_inp": router,
    }
    for name, values in plain.items():
        writer.add_tensor(f"{name}.weight", values.astype(np.float32))
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, values in (("gate", inner), ("up", inner), ("down", down)):
        packed = gguf.quants.quantize(values.astype(np.float32), kind)
        writer.add_tensor(f"blk.0.ffn_{name}_exps.weight", packed, raw_dtype=kind)
    _finish(writer)


def _writer(
    path: Path, hidden: int, layers: int, experts: int, per_token: int, ffn: int, heads: int = HEADS
) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(4 * ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_expert_count(experts)
    writer.add_expert_used_count(per_token)
    writer.add_expert_feed_forward_length(ffn)
    return writer


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
