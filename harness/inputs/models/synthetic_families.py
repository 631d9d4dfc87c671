"""Small random models of the dense families, one of each particular that a family has, as GGUF files.

Weights are float32 and alive: a window, a turn, a norm, a cap or a multiplier that is left out shows.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from q4kd.harness.inputs.models.synthetic_models import CONTEXT, VOCAB

HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM = 64, 96, 4, 2, 16
# Documents of 37 and 91 positions are shorter than the context before scaling, those of 322 and 150 longer.
WINDOW, ORIGINAL = 40, 100
_PRE, _POST = ("attn_norm", "ffn_norm"), ("post_attention_norm", "post_ffw_norm")
_YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 8.0, "rope.scaling.original_context_length": ORIGINAL}


@dataclass(frozen=True)
class FamilyModel:
    """A model of a family.

    Attributes:
        architecture: GGUF name.
        keys: metadata beside the dimensions, without prefix.
        layers: blocks.
        norms: norms of each block over the hidden size.
        head_norms: sizes of the norms of queries and keys; none where empty.
        is_fused: whether gate and up are one matrix; ``fused_qkv`` says the same of Q, K and V.
        factors: names of divisors of the rotary frequencies.
    """

    architecture: str
    keys: dict[str, Any] = field(default_factory=dict)
    layers: int = 4
    norms: tuple[str, ...] = _PRE
    head_norms: tuple[int, ...] = ()
    is_fused: bool = False
    fused_qkv: bool = False
    biases: bool = False
    factors: tuple[str, ...] = ()


FAMILIES = {
    "gemma3": FamilyModel(
        "gemma3",
        {"rope.freq_base": 1e6, "rope.scaling.factor": 8.0, "attention.sliding_window": WINDOW},
        layers=6,
        norms=_PRE + _POST,
        head_norms=(HEAD_DIM, HEAD_DIM),
    ),
    "gemma2": FamilyModel(
        "gemma2",
        {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "attention.sliding_window": WINDOW},
        norms=_PRE + _POST,
    ),
    "mistral-window": FamilyModel("llama", {"attention.sliding_window": WINDOW}),
    "olmo3": FamilyModel(
        "olmo2",
        _YARN | {"attention.sliding_window": WINDOW, "attention.sliding_window_pattern": [True, True, False, True]},
        norms=_POST,
        head_norms=(HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM),
    ),
    "llama-linear": FamilyModel("llama", {"rope.scaling.factor": 4.0}),
    "qwen2-yarn": FamilyModel("qwen2", _YARN, biases=True),
    "phi3-long": FamilyModel(
        "phi3",
        {
            "rope.scaling.original_context_length": ORIGINAL,
            "rope.scaling.attn_factor": 1.25,
            "rope.dimension_count": 12,
            "attention.sliding_window": 0,
        },
        is_fused=True,
        fused_qkv=True,
        factors=("rope_factors_short", "rope_factors_long"),
    ),
    "granite": FamilyModel(
        "granite", {"embedding_scale": 3.0, "residual_scale": 0.4, "attention.scale": 0.7, "logit_scale": 2.5}
    ),
    "smollm3": FamilyModel("smollm3"),
    "glm4": FamilyModel("glm4", {"rope.dimension_count": 8}, norms=_PRE + _POST, is_fused=True, biases=True),
    "ministral3": FamilyModel(
        "mistral3", _YARN | {"rope.scaling.yarn_log_multiplier": 1.0, "attention.temperature_scale": 0.3}
    ),
}
# The families of each claim.
WINDOWS = ("gemma3", "gemma2", "mistral-window", "olmo3")
SCALINGS = ("llama-linear", "qwen2-yarn", "phi3-long", "ministral3")
OTHERS = ("granite", "smollm3", "glm4")


def write_family_model(path: Path, model: FamilyModel, *, seed: int = 0) -> None:
    """Write a model as GGUF."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, model.architecture)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(model.layers)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in model.keys.items():
        _add_key(writer, f"{model.architecture}.{key}", value)

    def matrix(name: str, rows: int, cols: int) -> None:
        writer.add_tensor(f"{name}.weight", rng.normal(0, cols**-0.5, (rows, cols)).astype(np.float32))

    def vector(name: str, size: int, low: float, high: float) -> None:
        writer.add_tensor(name, rng.uniform(low, high, size).astype(np.float32))

    matrix("token_embd", VOCAB, HIDDEN)
    matrix("output", VOCAB, HIDDEN)
    vector("output_norm.weight", HIDDEN, 0.5, 1.5)
    for name in model.factors:
        vector(f"{name}.weight", model.keys["rope.dimension_count"] // 2, 1.0, 8.0)
    rows = {"q": HEADS * HEAD_DIM, "k": KV_HEADS * HEAD_DIM, "v": KV_HEADS * HEAD_DIM}
    for layer in range(model.layers):
        prefix = f"blk.{layer}."
        for part, count in {"qkv": sum(rows.values())}.items() if model.fused_qkv else rows.items():
            matrix(f"{prefix}attn_{part}", count, HIDDEN)
            if model.biases:
                vector(f"{prefix}attn_{part}.bias", count, -0.5, 0.5)
        for part, size in zip("qk", model.head_norms, strict=False):
            vector(f"{prefix}attn_{part}_norm.weight", size, 0.5, 1.5)
        matrix(f"{prefix}attn_output", HIDDEN, rows["q"])
        for part, count in {"up": 2 * FFN}.items() if model.is_fused else {"gate": FFN, "up": FFN}.items():
            matrix(f"{prefix}ffn_{part}", count, HIDDEN)
        matrix(f"{prefix}ffn_down", HIDDEN, FFN)
        for name in model.norms:
            vector(f"{prefix}{name}.weight", HIDDEN, 0.5, 1.5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_key(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    else:
        writer.add_float32(key, value)
