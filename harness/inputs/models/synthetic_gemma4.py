"""A small random Gemma 4, dense and as a mixture, as packed GGUF files in which every part is alive.

Every third layer has no window: heads of twice the size, half as many keys, values that are the keys before their
norm, and a rotation of the first quarter of each head. Norms of queries are near ``3 / sqrt(D)``, since scores are not
scaled.
"""

from pathlib import Path

import gguf
import numpy as np

from q4kd.harness.inputs.models.synthetic_models import CONTEXT, random_matrix

VOCAB, HIDDEN, FFN, HEADS, LAYERS, WINDOW = 160, 256, 512, 4, 3, 40
HEAD_DIM, WINDOW_HEAD_DIM, KV_HEADS, WINDOW_KV_HEADS = 128, 64, 1, 2
EXPERTS, PER_TOKEN, EXPERT_FFN = 8, 3, 256
_TYPES = ("Q4_K", "Q6_K", "Q8_0", "Q5_K", "IQ4_XS", "Q3_K")
_NORMS = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
_EXPERT_NORMS = ("pre_ffw_norm_2", "post_ffw_norm_1", "post_ffw_norm_2")


def write_gemma4_model(path: Path, *, mixture: bool, seed: int = 0) -> None:
    """Write a Gemma 4 whose matrices have ``_TYPES`` in turn; with ``mixture`` each layer has experts too."""
    rng = np.random.default_rng(seed)
    writer = _writer(path, mixture=mixture)
    dealt = 0

    def matrix(name: str, rows: int, cols: int, experts: int = 0) -> None:
        nonlocal dealt
        type_name = _TYPES[dealt % len(_TYPES)]
        dealt += 1
        data = random_matrix(rng, type_name, max(1, experts) * rows, cols, 0.8 / np.sqrt(cols))
        shaped = data.reshape(experts, rows, -1) if experts else data
        writer.add_tensor(f"{name}.weight", shaped, raw_dtype=gguf.GGMLQuantizationType[type_name])

    def vector(name: str, size: int, gain: float = 1.0) -> None:
        writer.add_tensor(name, (gain * rng.uniform(0.5, 1.5, size)).astype(np.float32))

    pairs = HEAD_DIM // 2
    writer.add_tensor("rope_freqs.weight", np.where(np.arange(pairs) < pairs // 4, 1, 1e30).astype(np.float32))
    matrix("token_embd", VOCAB, HIDDEN)
    vector("output_norm.weight", HIDDEN)
    for layer in range(LAYERS):
        prefix, has_window = f"blk.{layer}.", _has_window(layer)
        size = WINDOW_HEAD_DIM if has_window else HEAD_DIM
        kv_rows = size * (WINDOW_KV_HEADS if has_window else KV_HEADS)
        for name in _NORMS:
            vector(f"{prefix}{name}.weight", HIDDEN)
        vector(f"{prefix}attn_q_norm.weight", size, 3 * size**-0.5)
        vector(f"{prefix}attn_k_norm.weight", size)
        matrix(f"{prefix}attn_q", HEADS * size, HIDDEN)
        matrix(f"{prefix}attn_k", kv_rows, HIDDEN)
        if has_window:
            matrix(f"{prefix}attn_v", kv_rows, HIDDEN)
        matrix(f"{prefix}attn_output", HIDDEN, HEADS * size)
        matrix(f"{prefix}ffn_gate", FFN, HIDDEN)
        matrix(f"{prefix}ffn_up", FFN, HIDDEN)
        matrix(f"{prefix}ffn_down", HIDDEN, FFN)
        vector(f"{prefix}layer_output_scale.weight", 1)
        if mixture:
            for name in _EXPERT_NORMS:
                vector(f"{prefix}{name}.weight", HIDDEN)
            router = rng.normal(0, 2, (EXPERTS, HIDDEN))
            writer.add_tensor(f"{prefix}ffn_gate_inp.weight", router.astype(np.float32))
            vector(f"{prefix}ffn_gate_inp.scale", HIDDEN)
            matrix(f"{prefix}ffn_gate_up_exps", 2 * EXPERT_FFN, HIDDEN, EXPERTS)
            matrix(f"{prefix}ffn_down_exps", HIDDEN, EXPERT_FFN, EXPERTS)
            vector(f"{prefix}ffn_down_exps.scale", EXPERTS)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _has_window(layer: int) -> bool:
    return layer % 3 != 2


def _writer(path: Path, *, mixture: bool) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, "gemma4")
    windows = [_has_window(layer) for layer in range(LAYERS)]
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv([WINDOW_KV_HEADS if has_window else KV_HEADS for has_window in windows])
    writer.add_layer_norm_rms_eps(1e-6)
    for key, size in (("", HEAD_DIM), ("_swa", WINDOW_HEAD_DIM)):
        writer.add_uint32(f"gemma4.attention.key_length{key}", size)
        writer.add_uint32(f"gemma4.attention.value_length{key}", size)
        writer.add_uint32(f"gemma4.rope.dimension_count{key}", size)
    writer.add_rope_freq_base(1e6)
    writer.add_float32("gemma4.rope.freq_base_swa", 1e4)
    writer.add_sliding_window(WINDOW)
    writer.add_array("gemma4.attention.sliding_window_pattern", windows)
    writer.add_float32("gemma4.final_logit_softcapping", 3.0)
    if mixture:
        writer.add_expert_count(EXPERTS)
        writer.add_expert_used_count(PER_TOKEN)
        writer.add_expert_feed_forward_length(EXPERT_FFN)
    return writer
