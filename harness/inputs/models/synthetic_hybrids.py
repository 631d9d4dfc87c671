"""Small random hybrid decoders as GGUF files: gated delta nets beside gated attention, a mixture and a dense one.

Decays reach from states that live for hundreds of tokens to states that are gone after one, so that a chunk of the
teacher's arithmetic holds both. The matrices have several types; two value heads read a key head.
"""

from pathlib import Path

import gguf
import numpy as np

from q4kd.harness.inputs.models.synthetic_models import CONTEXT, random_matrix

VOCAB = 160
HYBRIDS = ("qwen35", "qwen35moe")
TYPES = ("Q4_K", "Q6_K", "Q8_0", "Q5_K", "IQ4_XS", "Q3_K")
HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, ROTATED = 256, 256, 4, 4, 2, 64, 32
KEY_HEADS, VALUE_HEADS, STATE, TAPS = 4, 8, 64, 4
EXPERTS, PER_TOKEN = 6, 2


def write_hybrid_model(path: Path, architecture: str, *, seed: int = 0) -> None:
    """Write a model of four layers, the last of which attends, and behind them one block that predicts more tokens."""
    rng = np.random.default_rng(seed)
    writer = _writer(path, architecture)
    dealt = 0

    def matrix(name: str, rows: int, cols: int, experts: int = 0) -> None:
        nonlocal dealt
        type_name = TYPES[dealt % len(TYPES)]
        dealt += 1
        data = random_matrix(rng, type_name, max(1, experts) * rows, cols, 0.8 / np.sqrt(cols))
        shaped = data.reshape(experts, rows, -1) if experts else data
        writer.add_tensor(f"{name}.weight", shaped, raw_dtype=gguf.GGMLQuantizationType[type_name])

    def plain(name: str, *shape: int, low: float = 0.5, high: float = 1.5) -> None:
        writer.add_tensor(name, rng.uniform(low, high, shape).astype(np.float32))

    matrix("token_embd", VOCAB, HIDDEN)
    matrix("output", VOCAB, HIDDEN)
    plain("output_norm.weight", HIDDEN)
    for layer in range(LAYERS):
        prefix = f"blk.{layer}."
        for name in ("attn_norm", "post_attention_norm"):
            plain(f"{prefix}{name}.weight", HIDDEN)
        if layer == LAYERS - 1:
            for name, rows in (("q", 2 * HEADS * HEAD_DIM), ("k", KV_HEADS * HEAD_DIM), ("v", KV_HEADS * HEAD_DIM)):
                matrix(f"{prefix}attn_{name}", rows, HIDDEN)
            matrix(f"{prefix}attn_output", HIDDEN, HEADS * HEAD_DIM)
            for name in ("attn_q_norm", "attn_k_norm"):
                plain(f"{prefix}{name}.weight", HEAD_DIM)
        else:
            channels, values = (2 * KEY_HEADS + VALUE_HEADS) * STATE, VALUE_HEADS * STATE
            matrix(f"{prefix}attn_qkv", channels, HIDDEN)
            matrix(f"{prefix}attn_gate", values, HIDDEN)
            for name in ("alpha", "beta"):
                data = rng.normal(0, 1 / np.sqrt(HIDDEN), (VALUE_HEADS, HIDDEN))
                writer.add_tensor(f"{prefix}ssm_{name}.weight", data.astype(np.float32))
            plain(f"{prefix}ssm_conv1d.weight", channels, TAPS, low=-1.0, high=1.0)
            plain(f"{prefix}ssm_dt.bias", VALUE_HEADS, low=-1.0, high=1.0)
            # From a state of which a hundredth is gone after a token to one of which nothing is left.
            decays = -np.geomspace(0.01, 30, VALUE_HEADS)
            writer.add_tensor(f"{prefix}ssm_a", rng.permutation(decays).astype(np.float32))
            plain(f"{prefix}ssm_norm.weight", STATE)
            matrix(f"{prefix}ssm_out", HIDDEN, values)
        shapes = {"gate": (FFN, HIDDEN), "up": (FFN, HIDDEN), "down": (HIDDEN, FFN)}
        if architecture == "qwen35":
            for name, (rows, cols) in shapes.items():
                matrix(f"{prefix}ffn_{name}", rows, cols)
            continue
        router = rng.normal(0, 2 / np.sqrt(HIDDEN), (EXPERTS, HIDDEN))
        writer.add_tensor(f"{prefix}ffn_gate_inp.weight", router.astype(np.float32))
        plain(f"{prefix}ffn_gate_inp_shexp.weight", HIDDEN, low=-0.2, high=0.2)
        for name, (rows, cols) in shapes.items():
            matrix(f"{prefix}ffn_{name}_exps", rows, cols, EXPERTS)
            matrix(f"{prefix}ffn_{name}_shexp", rows, cols)
    plain(f"blk.{LAYERS}.attn_norm.weight", HIDDEN)
    plain(f"blk.{LAYERS}.nextn.eh_proj.weight", HIDDEN, 2 * HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _writer(path: Path, architecture: str) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS + 1)
    writer.add_nextn_predict_layers(1)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(ROTATED)
    writer.add_rope_dimension_sections([6, 5, 5, 0])
    writer.add_ssm_conv_kernel(TAPS)
    writer.add_ssm_state_size(STATE)
    writer.add_ssm_group_count(KEY_HEADS)
    writer.add_ssm_time_step_rank(VALUE_HEADS)
    writer.add_ssm_inner_size(VALUE_HEADS * STATE)
    writer.add_full_attention_interval(LAYERS)
    if architecture == "qwen35":
        writer.add_feed_forward_length(FFN)
        return writer
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(PER_TOKEN)
    writer.add_expert_feed_forward_length(FFN)
    writer.add_expert_shared_feed_forward_length(FFN)
    return writer
