"""A large teacher made in a second: random, valid K-quant blocks in the shapes of a real model.

Memory and speed need a file much larger than the demo's; its weights need not be good, only finite and alive through
every layer, so that a wrong or skipped computation shows.
"""

from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

HEAD_DIM = 64
# Other types of the layers: the byte of the scale d and, of those with a minimum, its byte and how many d centre it.
LAYER_TYPES: dict[str, tuple[int, int | None, float]] = {
    "Q4_0": (0, None, 0),
    "Q4_1": (0, 2, -7.5),
    "Q5_0": (0, None, 0),
    "Q5_1": (0, 2, -15.5),
    "Q8_0": (0, None, 0),
    "Q2_K": (80, 82, 1.5),
    "Q3_K": (108, None, 0),
    "Q5_K": (0, 2, 15.5),
    "IQ4_NL": (0, None, 0),
    "IQ4_XS": (0, None, 0),
    "IQ3_S": (0, None, 0),
    "IQ3_XXS": (0, None, 0),
    "IQ2_S": (0, None, 0),
    "IQ2_XS": (0, None, 0),
    "IQ2_XXS": (0, None, 0),
}


def random_blocks(rng: np.random.Generator, type_name: str, rows: int, cols: int, sigma: float) -> NDArray[np.uint8]:
    """Return random packed rows of Q4_K or Q6_K, uint8 ``[rows, row_bytes]``; ``cols`` is a multiple of 256.

    The decoded weights have a mean of about 0 and a standard deviation of about ``sigma``.
    """
    count = rows * cols // 256
    if type_name == "Q4_K":
        blocks = rng.integers(0, 256, (count, 144), dtype=np.uint8)
        # sc and m share one random 6-bit range of mean 31.5; q has mean 7.5, so dmin = 7.5 d centres the weights.
        d = np.full(count, sigma / 190, np.float16)
        blocks[:, 0:2] = d.view(np.uint8).reshape(-1, 2)
        blocks[:, 2:4] = (d * np.float16(7.5)).view(np.uint8).reshape(-1, 2)
    else:
        blocks = rng.integers(0, 256, (count, 210), dtype=np.uint8)
        d = np.full(count, sigma / 1365, np.float16)
        blocks[:, 208:210] = d.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


def random_layer_blocks(
    rng: np.random.Generator, type_name: str, rows: int, cols: int, sigma: float
) -> NDArray[np.uint8]:
    """Return the same of a type in ``LAYER_TYPES``; a block's bits are uniform but for its scale and its minimum."""
    kind, (scale_at, minimum_at, centre) = gguf.GGMLQuantizationType[type_name], LAYER_TYPES[type_name]
    size, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (rows * cols // size, num_bytes), dtype=np.uint8)

    def set_half(at: int, value: np.float16) -> None:
        blocks[:, at : at + 2] = np.frombuffer(value.tobytes(), np.uint8)

    def scale_blocks(d: np.float16) -> None:
        set_half(scale_at, d)
        if minimum_at is not None:
            set_half(minimum_at, d * np.float16(centre))

    scale_blocks(np.float16(1))
    unit_sigma = gguf.quants.dequantize(blocks[:4096], kind).std()
    scale_blocks(np.float16(sigma / unit_sigma))
    return blocks.reshape(rows, -1)


def write_large_teacher(
    path: Path,
    *,
    layers: int = 10,
    hidden: int = 1024,
    ffn: int = 4096,
    vocab: int = 4096,
    kv_heads: int = 4,
    tied: bool = False,
    seed: int = 0,
    layer_type: str | None = None,
) -> None:
    """Write a qwen2 GGUF with random K-quant weights (about 94 MB with the defaults: 155 M weights).

    Types are those of a Q4_K_M file: Q4_K, but Q6_K for the output head and, in half of the layers, for the value and
    down projections. Heads have 64 elements, so ``kv_heads`` divides ``hidden / 64``; ``hidden`` and ``ffn`` are
    multiples of 256. With ``tied`` the embedding is the head too. With a ``layer_type`` of ``LAYER_TYPES`` all matrices
    of the layers are of that type.
    """
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(4096)
    writer.add_vocab_size(vocab)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(hidden // HEAD_DIM)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    # llama.cpp loads a model without a vocabulary only when told that there is none.
    writer.add_tokenizer_model("none")

    def packed(name: str, type_name: str, rows: int, cols: int, gain: float = 1.0) -> None:
        sigma = 0.7 * gain / np.sqrt(cols)
        if layer_type is not None and name.startswith("blk."):
            type_name, make = layer_type, random_layer_blocks
        else:
            make = random_blocks
        data = make(rng, type_name, rows, cols, sigma)
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[type_name])

    def constant(name: str, value: float, size: int) -> None:
        writer.add_tensor(name, np.full(size, value, np.float32))

    # The stream starts as large as what a layer adds to it, so that the embedding is not drowned by layer noise.
    packed("token_embd.weight", "Q6_K" if tied else "Q4_K", vocab, hidden, np.sqrt(hidden))
    constant("output_norm.weight", 1, hidden)
    if not tied:
        packed("output.weight", "Q6_K", vocab, hidden)
    # As models are initialised: what 2 * layers additions to the residual stream sum up to does not grow with depth.
    residual = 1 / np.sqrt(2 * layers)
    for layer in range(layers):
        prefix = f"blk.{layer}."
        constant(f"{prefix}attn_norm.weight", 1, hidden)
        constant(f"{prefix}ffn_norm.weight", 1, hidden)
        for part, rows in (("q", hidden), ("k", kv_heads * HEAD_DIM), ("v", kv_heads * HEAD_DIM)):
            packed(f"{prefix}attn_{part}.weight", "Q6_K" if part == "v" and layer % 2 else "Q4_K", rows, hidden)
            constant(f"{prefix}attn_{part}.bias", 0, rows)
        packed(f"{prefix}attn_output.weight", "Q4_K", hidden, hidden, residual)
        packed(f"{prefix}ffn_gate.weight", "Q4_K", ffn, hidden)
        packed(f"{prefix}ffn_up.weight", "Q4_K", ffn, hidden)
        packed(f"{prefix}ffn_down.weight", "Q6_K" if layer % 2 else "Q4_K", hidden, ffn, residual)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
