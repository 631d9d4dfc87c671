"""Small random gpt-oss models as GGUF files, experts in MXFP4 and the other matrices in Q8_0, and broken twins of them.

Gates and products beside them often go beyond the clamps, sinks differ from head to head, and biases are as large as
what they are added to, so that each of these shows where it is left out. In two of the models only attention, or only
the experts, changes the states.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from q4kd.harness.inputs.models.synthetic_mixtures import VOCAB
from q4kd.harness.inputs.models.synthetic_models import CONTEXT, random_matrix

HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, LAYERS, EXPERTS, PER_TOKEN, WINDOW = 96, 64, 4, 2, 32, 3, 8, 3, 40
PARTS = ("whole", "attention", "experts")
Write = Callable[[str, NDArray[Any], str], None]


def write_gpt_oss(path: Path, *, part: str = "whole", broken: str = "", seed: int = 0) -> None:
    """Write a gpt-oss of three layers; windows on the first and the last.

    Args:
        path: of the file.
        part: of ``PARTS``, what changes the states.
        broken: a key of ``BROKEN``, or empty for a valid file.
        seed: of the weights.
    """
    writer = gguf.GGUFWriter(path, "gpt-oss")
    for key, value in (_SETTINGS | BROKEN.get(broken, {})).items():
        if isinstance(value, str):
            writer.add_string(f"gpt-oss.{key}", value)
        elif isinstance(value, float):
            writer.add_float32(f"gpt-oss.{key}", value)
        elif value is not None:
            writer.add_uint32(f"gpt-oss.{key}", value)
    for name, (packed, type_name) in _tensors(np.random.default_rng(seed), part).items():
        kind, data = type_name, packed
        if name == LEFT_OUT.get(broken):
            continue
        if broken == "quantised bias" and name == "blk.1.ffn_up_exps.bias":
            kind, data = "Q8_0", gguf.quants.quantize(packed, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


_SETTINGS: dict[str, Any] = {
    "context_length": CONTEXT,
    "embedding_length": HIDDEN,
    "block_count": LAYERS,
    "feed_forward_length": FFN,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.key_length": HEAD_DIM,
    "attention.value_length": HEAD_DIM,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "attention.sliding_window": WINDOW,
    "rope.freq_base": 150_000.0,
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 64,
    "expert_count": EXPERTS,
    "expert_used_count": PER_TOKEN,
    "expert_feed_forward_length": FFN,
}
# What a broken file says otherwise; None takes a key away.
BROKEN: dict[str, dict[str, Any]] = {
    "no window": {"attention.sliding_window": None},
    "softmax over all experts": {"expert_gating_func": 1},
    "windows of another base": {"rope.freq_base_swa": 10_000.0},
    "linear scaling": {"rope.scaling.type": "linear"},
    "no sinks": {},
    "no bias of an expert": {},
    "no bias of the router": {},
    "quantised bias": {},
}
LEFT_OUT = {
    "no sinks": "blk.1.attn_sinks.weight",
    "no bias of an expert": "blk.1.ffn_down_exps.bias",
    "no bias of the router": "blk.1.ffn_gate_inp.bias",
}


def _tensors(rng: np.random.Generator, part: str) -> dict[str, tuple[NDArray[Any], str]]:
    """Return packed data and type of every tensor, in the order of the file."""
    found: dict[str, tuple[NDArray[Any], str]] = {}

    def plain(name: str, values: NDArray[np.float64], scale: float = 1.0) -> None:
        found[name] = (scale * values).astype(np.float32), "F32"

    def matrix(name: str, rows: int, cols: int, type_name: str = "Q8_0", gain: float = 1.0) -> None:
        found[f"{name}.weight"] = random_matrix(rng, type_name, rows, cols, gain / np.sqrt(cols)), type_name

    def experts(name: str, rows: int, cols: int, gain: float, scale: float = 1.0) -> None:
        weights = rng.normal(0, scale * gain / np.sqrt(cols), (EXPERTS * rows, cols)).astype(np.float32)
        packed = gguf.quants.quantize(weights, gguf.GGMLQuantizationType.MXFP4)
        found[f"{name}.weight"] = packed.reshape(EXPERTS, rows, -1), "MXFP4"
        plain(f"{name}.bias", rng.normal(0, 1, (EXPERTS, rows)), scale)

    attention, mixture = float(part != "experts"), float(part != "attention")
    matrix("token_embd", VOCAB, HIDDEN, gain=np.sqrt(HIDDEN))
    matrix("output", VOCAB, HIDDEN)
    plain("output_norm.weight", rng.uniform(0.5, 1.5, HIDDEN))
    for layer in range(LAYERS):
        prefix = f"blk.{layer}."
        for name in ("attn_norm", "post_attention_norm"):
            plain(f"{prefix}{name}.weight", rng.uniform(0.5, 1.5, HIDDEN))
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            matrix(f"{prefix}attn_{name}", heads * HEAD_DIM, HIDDEN)
            plain(f"{prefix}attn_{name}.bias", rng.normal(0, 0.5, heads * HEAD_DIM))
        plain(f"{prefix}attn_sinks.weight", rng.normal(1, 1.5, HEADS))
        matrix(f"{prefix}attn_output", HIDDEN, HEADS * HEAD_DIM, gain=2 * attention)
        plain(f"{prefix}attn_output.bias", rng.normal(0, 0.3, HIDDEN), attention)
        plain(f"{prefix}ffn_gate_inp.weight", rng.normal(0, 2 / np.sqrt(HIDDEN), (EXPERTS, HIDDEN)))
        plain(f"{prefix}ffn_gate_inp.bias", rng.normal(0, 1, EXPERTS))
        experts(f"{prefix}ffn_gate_exps", FFN, HIDDEN, 5.0)
        experts(f"{prefix}ffn_up_exps", FFN, HIDDEN, 5.0)
        experts(f"{prefix}ffn_down_exps", HIDDEN, FFN, 0.2, mixture)
    return found
