"""Small random models of every architecture and tensor type, and broken twins of them.

Their weights are random but alive: scales are chosen so that every layer changes the logits, and a rotation, a norm or
a divisor that is left out shows.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from q4kd.harness.inputs.models.code_blocks import CODE_TYPES, random_code_blocks
from q4kd.harness.oracles.block_spec_low import LOW_SPECS
from q4kd.trainer.bench.synthetic import random_blocks

TENSOR_SCALE = 0.0123  # beside NVFP4 matrices, about that of real files
# The head ends a tile of 1,024 rows that is not full, and a text may be longer than several blocks of attention.
LAYERS, HIDDEN, FFN, VOCAB, CONTEXT = 3, 256, 512, 1100, 640


@dataclass(frozen=True)
class SmallModel:
    """The properties of a small model.

    Attributes:
        architecture: GGUF name.
        types: tensor types, dealt to the matrices in turn.
        tied: whether the head is the embedding.
        head_dim: elements of a head; 4 query heads and 2 key-value heads.
        biases: whether Q, K and V have one.
        rope_factors: whether the file holds ``rope_freqs``.
        sliding_window: written to the metadata when set.
    """

    architecture: str
    types: tuple[str, ...]
    tied: bool = False
    head_dim: int = 64
    biases: bool = False
    rope_factors: bool = False
    sliding_window: int | None = None


MODELS = {
    "qwen2": SmallModel("qwen2", ("Q4_K", "Q6_K"), tied=True, biases=True),
    "qwen3": SmallModel(
        "qwen3",
        ("IQ3_S", "Q8_0", "Q4_K", "Q4_0", *CODE_TYPES[1:], "Q6_K", "Q3_K", "IQ4_XS", "Q2_K"),
        tied=True,
        head_dim=128,
    ),
    "llama3": SmallModel("llama", ("Q5_0", "Q5_K", "BF16", "Q4_K", "F32", "Q4_1", "IQ4_NL", "Q5_1"), rope_factors=True),
    # Mistral's files say llama; a window as long as the context leaves nothing out.
    "mistral": SmallModel("llama", ("Q4_K", "Q6_K", "F16"), sliding_window=CONTEXT),
}


def random_matrix(rng: np.random.Generator, type_name: str, rows: int, cols: int, sigma: float) -> NDArray[np.uint8]:
    """Return random packed rows, uint8 ``[rows, row_bytes]``, whose weights have standard deviation about ``sigma``."""
    if type_name in ("Q4_K", "Q6_K"):
        return random_blocks(rng, type_name, rows, cols, sigma)
    kind = gguf.GGMLQuantizationType[type_name]
    if type_name in CODE_TYPES:
        count = rows * cols // gguf.GGML_QUANT_SIZES[kind][0]
        return random_code_blocks(rng, type_name, count, sigma).reshape(rows, -1)
    if type_name == "Q5_K":
        blocks = rng.integers(0, 256, (rows * cols // 256, 176), dtype=np.uint8)
        # The layout is Q4_K's, with quants of mean 15.5.
        d = np.full(len(blocks), sigma / 380, np.float16)
        blocks[:, 0:2] = d.view(np.uint8).reshape(-1, 2)
        blocks[:, 2:4] = (d * np.float16(15.5)).view(np.uint8).reshape(-1, 2)
        return blocks.reshape(rows, -1)
    if type_name in ("Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS"):
        return _random_low_blocks(rng, type_name, rows, cols, sigma)
    weights = rng.normal(0, sigma, (rows, cols)).astype(np.float32)
    packed: NDArray[Any] = gguf.quants.quantize(weights, kind)
    return np.ascontiguousarray(packed).view(np.uint8).reshape(rows, -1)


def _random_low_blocks(
    rng: np.random.Generator, type_name: str, rows: int, cols: int, sigma: float
) -> NDArray[np.uint8]:
    """Return the same of types that the gguf package does not quantise to: random bits, one scale for all blocks."""
    size, weights, places, _ = LOW_SPECS[type_name.lower()]
    blocks = rng.integers(0, 256, (rows * cols // weights, size), dtype=np.uint8)
    for scale in (1.0, None):
        if scale is None:
            scale = sigma / float(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[type_name]).std())
        # Q2_K has a minimum; its scales and mins share one random range, and its quants have mean 1.5.
        for place, value in zip(places, (scale, 1.5 * scale), strict=False):
            blocks[:, place : place + 2] = np.array([value], np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def write_small_model(
    path: Path, model: SmallModel, *, seed: int = 0, change: Callable[[gguf.GGUFWriter], None] | None = None
) -> None:
    """Write a model as GGUF; ``change`` may add to the writer what makes it invalid."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, model.architecture)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    if model.sliding_window is not None:
        writer.add_sliding_window(model.sliding_window)
    dealt = 0

    def matrix(name: str, rows: int, cols: int) -> None:
        nonlocal dealt
        type_name = model.types[dealt % len(model.types)]
        dealt += 1
        scaled = type_name == "NVFP4" and name != "token_embd.weight"
        scale = TENSOR_SCALE if scaled else 1.0
        data = random_matrix(rng, type_name, rows, cols, 0.8 / np.sqrt(cols) / scale)
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[type_name])
        if scaled:
            writer.add_tensor(name.replace(".weight", ".scale"), np.array([scale], np.float32))
            writer.add_tensor(name.replace(".weight", ".input_scale"), np.array([3.0], np.float32))

    def vector(name: str, size: int, low: float, high: float) -> None:
        writer.add_tensor(name, rng.uniform(low, high, size).astype(np.float32))

    matrix("token_embd.weight", VOCAB, HIDDEN)
    vector("output_norm.weight", HIDDEN, 0.5, 1.5)
    if not model.tied:
        matrix("output.weight", VOCAB, HIDDEN)
    if model.rope_factors:
        vector("rope_freqs.weight", model.head_dim // 2, 1.0, 8.0)
    q_size, kv_size = 4 * model.head_dim, 2 * model.head_dim
    for layer in range(LAYERS):
        prefix = f"blk.{layer}."
        vector(f"{prefix}attn_norm.weight", HIDDEN, 0.5, 1.5)
        vector(f"{prefix}ffn_norm.weight", HIDDEN, 0.5, 1.5)
        for name, rows, cols in (
            ("attn_q", q_size, HIDDEN),
            ("attn_k", kv_size, HIDDEN),
            ("attn_v", kv_size, HIDDEN),
            ("attn_output", HIDDEN, q_size),
            ("ffn_gate", FFN, HIDDEN),
            ("ffn_up", FFN, HIDDEN),
            ("ffn_down", HIDDEN, FFN),
        ):
            matrix(f"{prefix}{name}.weight", rows, cols)
        if model.biases:
            for name, size in (("attn_q", q_size), ("attn_k", kv_size), ("attn_v", kv_size)):
                vector(f"{prefix}{name}.bias", size, -0.5, 0.5)
        if model.architecture == "qwen3":
            vector(f"{prefix}attn_q_norm.weight", model.head_dim, 0.5, 1.5)
            vector(f"{prefix}attn_k_norm.weight", model.head_dim, 0.5, 1.5)
    if change:
        change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# A GGUF may say each of these, and would be silently wrong if it were ignored: case -> addition to a valid llama file.
def _quantise_norm(writer: gguf.GGUFWriter) -> None:
    """Hold a norm's weights in Q8_0 blocks, which engines read as float32."""
    del writer.tensors[-1]["output_norm.weight"]
    blocks = gguf.quants.quantize(np.ones(HIDDEN, np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("output_norm.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)


BROKEN_GGUF: dict[str, Callable[[gguf.GGUFWriter], None]] = {
    "unknown tensor": lambda writer: writer.add_tensor("blk.0.ffn_gate_inp.weight", np.ones((4, HIDDEN), np.float32)),
    "experts": lambda writer: writer.add_expert_count(8),
    "rope scaling": lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN),
    "partial rotary": lambda writer: writer.add_rope_dimension_count(32),
    "sliding window": lambda writer: writer.add_sliding_window_pattern(2),
    "split file": lambda writer: writer.add_uint16("split.count", 3),
    "logit softcapping": lambda writer: writer.add_float32("llama.final_logit_softcapping", 30.0),
    "adapter": lambda writer: writer.add_type("adapter"),
    "quantised norm": _quantise_norm,
}


def write_truncated(path: Path, source: Path) -> None:
    """Write all but the last 4,096 bytes of a model."""
    path.write_bytes(source.read_bytes()[:-4096])


def write_moved(path: Path, source: Path, name: str, to: str, by: int = 0) -> None:
    """Write a copy whose header lets tensor ``name`` begin ``by`` bytes behind the beginning of tensor ``to``."""
    data = bytearray(source.read_bytes())

    def place(tensor: str) -> int:
        at = data.index(struct.pack("<Q", len(tensor)) + tensor.encode()) + 8 + len(tensor)
        return at + 4 + 8 * int(struct.unpack_from("<I", data, at)[0]) + 4

    struct.pack_into("<Q", data, place(name), struct.unpack_from("<Q", data, place(to))[0] + by)
    path.write_bytes(data)


def write_nan_scale(path: Path, source: Path) -> None:
    """Write a copy in which the scale of one Q4_K block is NaN."""
    reader = gguf.GGUFReader(source)
    tensor = next(found for found in reader.tensors if found.tensor_type.name == "Q4_K")
    data = bytearray(source.read_bytes())
    at = int(tensor.data_offset) + 144 * 7
    data[at : at + 2] = np.float16(np.nan).tobytes()
    path.write_bytes(bytes(data))


def write_huge_norm(path: Path, source: Path) -> None:
    """Write a copy in which one weight of the last norm is 3e38, whose square float32 does not hold."""
    reader = gguf.GGUFReader(source)
    tensor = next(found for found in reader.tensors if found.name == "output_norm.weight")
    data = bytearray(source.read_bytes())
    at = int(tensor.data_offset) + 4 * 3
    data[at : at + 4] = np.float32(3e38).tobytes()
    path.write_bytes(bytes(data))


def model_ids(positions: int) -> NDArray[np.int64]:
    """Return the token ids that every small model is run on."""
    return np.random.default_rng(5).integers(0, VOCAB, positions)
