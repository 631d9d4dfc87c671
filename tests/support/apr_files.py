"""A small .apr writer for tests: a well-formed file of one qwen2 layer, or one with any field forged.

Written from the format's description alone; it shares nothing with the reader, nor with the harness's own writer of
``harness/inputs/models/apr_write.py``.
"""

import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

F32, F16, Q4_K, Q6_K, BF16 = 0, 1, 12, 14, 30
HIDDEN, FFN, VOCAB, HEAD = 256, 2, 3, 2
ROW_MAJOR = 1024


@dataclass
class Entry:
    """One index entry and its data; ``offset`` and ``size`` are computed unless forged."""

    name: bytes
    dtype: int
    shape: tuple[int, ...]
    data: bytes
    offset: int | None = None
    size: int | None = None


@dataclass
class AprImage:
    """An .apr file before it is laid out. ``forged`` replaces header fields; ``None`` checksums are computed."""

    metadata: dict[str, Any] | bytes
    entries: list[Entry]
    magic: bytes = b"APR\0"
    version: tuple[int, int] = (2, 0)
    flags: int = ROW_MAJOR
    forged: dict[str, int] = field(default_factory=dict)
    header_checksum: int | None = None
    footer: int | None = None
    sort: bool = True

    def entry(self, name: str) -> Entry:
        return next(entry for entry in self.entries if entry.name == name.encode())

    def build(self) -> bytes:
        entries = sorted(self.entries, key=lambda entry: entry.name) if self.sort else self.entries
        text = self.metadata if isinstance(self.metadata, bytes) else json.dumps(self.metadata).encode()
        index, data = bytearray(), bytearray()
        for entry in entries:
            offset = len(data) if entry.offset is None else entry.offset
            size = len(entry.data) if entry.size is None else entry.size
            index += struct.pack("<H", len(entry.name)) + entry.name
            index += struct.pack("<BB", entry.dtype, len(entry.shape))
            index += struct.pack(f"<{len(entry.shape)}QQQ", *entry.shape, offset, size)
            data += _pad(entry.data)
        text_room, index_room = _pad(text), _pad(bytes(index))
        fields = {
            "tensor_count": len(entries),
            "metadata_offset": 64,
            "metadata_size": len(text),
            "index_offset": 64 + len(text_room),
            "data_offset": 64 + len(text_room) + len(index_room),
        } | self.forged
        head = self.magic + struct.pack("<BBHIQIQQ", *self.version, self.flags, *fields.values())
        body = bytearray(head + bytes(24) + text_room + index_room + data + bytes(4))
        return seal(body, self.header_checksum, self.footer)

    def write(self, path: Path) -> Path:
        path.write_bytes(self.build())
        return path


def seal(content: bytes | bytearray, header_checksum: int | None = None, footer: int | None = None) -> bytes:
    """Store both checksums, right unless forged."""
    content = bytearray(content)
    computed = zlib.crc32(bytes(content[:40]) + bytes(content[44:64]))
    struct.pack_into("<I", content, 40, computed if header_checksum is None else header_checksum)
    struct.pack_into("<I", content, len(content) - 4, zlib.crc32(content[:-4]) if footer is None else footer)
    return bytes(content)


def tiny_metadata(**changes: Any) -> dict[str, Any]:
    """The metadata of ``tiny_model``, as aprender writes them; a change to None is a null."""
    return {
        "architecture": "qwen2",
        "hidden_size": HIDDEN,
        "num_layers": 1,
        "num_heads": 1,
        "num_kv_heads": 1,
        "head_dim": HEAD,
        "intermediate_size": FFN,
        "max_position_embeddings": 64,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "license": None,
    } | changes


def tiny_model(names: Mapping[str, str] | None = None, **changes: Any) -> AprImage:
    """A whole model in 10 kB: one layer with tensors of all five types, under Hugging Face's names."""
    layer = "model.layers.0."
    tensors: dict[str, tuple[int, tuple[int, ...]]] = {
        "model.embed_tokens.weight": (Q4_K, (VOCAB, HIDDEN)),
        "model.norm.weight": (F32, (HIDDEN,)),
        layer + "input_layernorm.weight": (F16, (HIDDEN,)),
        layer + "post_attention_layernorm.weight": (BF16, (HIDDEN,)),
        layer + "self_attn.q_proj.weight": (Q6_K, (HEAD, HIDDEN)),
        layer + "self_attn.q_proj.bias": (F32, (HEAD,)),
        layer + "self_attn.k_proj.bias": (F32, (HEAD,)),
        layer + "self_attn.v_proj.bias": (F16, (HEAD,)),
        layer + "self_attn.k_proj.weight": (Q4_K, (HEAD, HIDDEN)),
        layer + "self_attn.v_proj.weight": (Q4_K, (HEAD, HIDDEN)),
        layer + "self_attn.o_proj.weight": (F16, (HIDDEN, HEAD)),
        layer + "mlp.gate_proj.weight": (Q4_K, (FFN, HIDDEN)),
        layer + "mlp.up_proj.weight": (Q4_K, (FFN, HIDDEN)),
        layer + "mlp.down_proj.weight": (F32, (HIDDEN, FFN)),
    }
    entries = []
    for number, (name, (dtype, shape)) in enumerate(tensors.items()):
        stored = (names or {}).get(name, name)
        entries.append(Entry(stored.encode(), dtype, shape, bytes([number]) * _bytes(dtype, shape)))
    return AprImage(tiny_metadata(**changes), entries)


def _bytes(dtype: int, shape: tuple[int, ...]) -> int:
    block, size = {F32: (1, 4), F16: (1, 2), BF16: (1, 2), Q4_K: (256, 144), Q6_K: (256, 210)}[dtype]
    count = 1
    for dimension in shape:
        count *= dimension
    return count // block * size


def _pad(content: bytes) -> bytes:
    return content + bytes(-len(content) % 64)
