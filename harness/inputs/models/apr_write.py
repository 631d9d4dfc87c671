"""Write the model of a GGUF as an .apr file, block for block: what the experiments compare the two containers with.

It shares no table with the trainer's reader: layout and codes are written down here a second time, from
paiml/aprender (crates/apr-format/src/v2/writer.rs and header_impl.rs).
"""

import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
from numpy.typing import NDArray

from q4kd.harness.oracles.reference import HF_NAMES
from q4kd.trainer.errors import InputError
from q4kd.trainer.files import replacing

Names = Literal["huggingface", "gguf"]
DTYPES = {"F32": 0, "F16": 1, "Q4_K": 12, "Q6_K": 14, "BF16": 30}
ROW_MAJOR, QUANTIZED, HAS_VOCABULARY = 1024, 32, 512
_ALIGNMENT = 64
_HF_LAYER = {name: module for module, name in HF_NAMES.items()}
_HF_MODEL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
# aprender's key -> GGUF's, without the architecture's prefix
_SIZES = {
    "hidden_size": "embedding_length",
    "num_layers": "block_count",
    "num_heads": "attention.head_count",
    "num_kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
}


@dataclass(frozen=True)
class AprTensor:
    """One tensor to write: dtype code, shape with the outermost dimension first, and its bytes, contiguous uint8."""

    dtype: int
    shape: tuple[int, ...]
    data: NDArray[np.uint8]


def huggingface_name(name: str) -> str:
    """Return Hugging Face's name of a GGUF tensor; one that has none (``rope_freqs.weight``) is returned as it is."""
    part = name.split(".")
    if part[0] == "blk" and len(part) == 4 and part[2] in _HF_LAYER:
        return f"model.layers.{part[1]}.{_HF_LAYER[part[2]]}.{part[3]}"
    return _HF_MODEL.get(name, name)


def write_apr(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, AprTensor], *, flags: int) -> None:
    """Write ``path``, whole or not at all: version 2.0, sections padded to 64 bytes, index sorted, CRC-32 footer.

    Args:
        path: the file to write; an existing one is replaced.
        metadata: the JSON section; NaN and infinities are refused (ValueError).
        tensors: by the name to store; one at a time is read.
        flags: flags of the header.
    """
    text = json.dumps(metadata, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    names = sorted(tensors, key=str.encode)
    index = bytearray()
    offset = 0
    for name in names:
        tensor, encoded = tensors[name], name.encode()
        index += struct.pack("<H", len(encoded)) + encoded + struct.pack("<BB", tensor.dtype, len(tensor.shape))
        index += struct.pack(f"<{len(tensor.shape)}QQQ", *tensor.shape, offset, tensor.data.nbytes)
        offset += _padded(tensor.data.nbytes)
    index_offset = 64 + _padded(len(text))
    data_offset = index_offset + _padded(len(index))
    start = struct.pack("<4sBBHIQIQQ", b"APR\0", 2, 0, flags, len(names), 64, len(text), index_offset, data_offset)
    reserved = bytes(20)
    header = start + struct.pack("<I", zlib.crc32(start + reserved)) + reserved

    sections = [memoryview(header), memoryview(text), memoryview(index)]
    checksum = 0
    with replacing(path) as file:
        for section in [*sections, *(tensors[name].data.data for name in names)]:
            for piece in (section, bytes(_padded(section.nbytes) - section.nbytes)):
                file.write(piece)
                checksum = zlib.crc32(piece, checksum)
        file.write(struct.pack("<I", checksum))


def convert_gguf(source: Path, target: Path, *, names: Names = "huggingface", copy_head: bool = False) -> None:
    """Write the model of a GGUF as .apr, every block unchanged, with the metadata that aprender's own import writes.

    Args:
        source: a GGUF of qwen2, qwen3 or llama with F32, F16, BF16, Q4_K and Q6_K tensors.
        target: the .apr to write.
        names: convention of the tensor names. Q and K keep the GGUF's order of rows, and ``rope_type`` says so.
        copy_head: store a tied head a second time as the output head, as aprender's import does.

    Raises:
        InputError: for a tensor type that .apr cannot hold.
    """
    reader = gguf.GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    found: dict[str, AprTensor] = {}
    for tensor in reader.tensors:
        kind = tensor.tensor_type.name
        if kind not in DTYPES:
            subject, remedy = f"{source}: tensor {tensor.name}", "choose a GGUF whose types .apr can hold"
            raise InputError(subject, expected=", ".join(DTYPES), got=kind, remedy=remedy)
        shape = tuple(int(size) for size in reversed(tensor.shape.tolist()))
        found[tensor.name] = AprTensor(DTYPES[kind], shape, np.asarray(tensor.data).reshape(-1).view(np.uint8))
    if copy_head:
        found.setdefault("output.weight", found["token_embd.weight"])
    stored = {huggingface_name(name) if names == "huggingface" else name: tensor for name, tensor in found.items()}
    quantized = any(tensor.dtype in (12, 14) for tensor in found.values())
    metadata = _metadata(fields, found)
    flags = ROW_MAJOR | (QUANTIZED if quantized else 0) | (HAS_VOCABULARY if "tokenizer.vocabulary" in metadata else 0)
    write_apr(target, metadata, stored, flags=flags)


def _metadata(fields: Mapping[str, Any], tensors: Mapping[str, AprTensor]) -> dict[str, Any]:
    """Build the metadata as aprender's import of a GGUF does: real numbers as the shortest text of their float32."""
    architecture = fields["general.architecture"]
    metadata: dict[str, Any] = {
        "model_type": architecture,
        "name": fields.get("general.name", architecture),
        "original_format": "gguf",
        "architecture": architecture,
        "hf_model_type": architecture,
        "license": None,
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "rope_type": 0 if architecture == "llama" else 2,
    }
    metadata |= {key: fields.get(f"{architecture}.{name}") for key, name in _SIZES.items()}
    for key, name in (("rms_norm_eps", "attention.layer_norm_rms_epsilon"), ("rope_theta", "rope.freq_base")):
        value = fields.get(f"{architecture}.{name}")
        metadata[key] = None if value is None else float(str(np.float32(value)))
    for key, name in (("tokenizer.vocabulary", "tokens"), ("tokenizer.merges", "merges")):
        if f"tokenizer.ggml.{name}" in fields:
            metadata[key] = fields[f"tokenizer.ggml.{name}"]
    return metadata


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
