"""A teacher file on disk: dimensions, tokenizer tokens and packed tensors, memory-mapped and checked.

Letters in shapes: V vocabulary, H hidden size, F feed-forward size, N query heads, K key-value heads, D head size.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from q4kd.trainer.errors import InputError
from q4kd.trainer.formats import FORMATS
from q4kd.trainer.gguf_header import check_header

SUPPORTED_ARCHITECTURES = ("qwen2",)
VECTOR_TYPES = ("F16", "F32")
_LAYER_MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Dimensions of a decoder-only transformer, read from the file's metadata and tensors."""

    architecture: str
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_eps: float
    rope_base: float
    context_length: int
    vocab_size: int
    tied_head: bool


@dataclass(frozen=True)
class PackedTensor:
    """One tensor as it lies in the file.

    Attributes:
        name: GGUF name, such as ``blk.0.attn_q.weight``.
        type: GGML type name, such as ``Q4_K``.
        shape: outermost dimension first: ``(rows, cols)`` or ``(length,)``.
        data: uint8 ``[rows, row_bytes]``, a view of the memory map.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor in the file."""
        return int(self.data.nbytes)


@dataclass(frozen=True, kw_only=True)
class ModelFile:
    """A checked model file. The tensors are views of a private memory map: nothing is read before it is used."""

    path: Path
    config: TeacherConfig
    tensors: Mapping[str, PackedTensor]
    tokens: tuple[str, ...]
    metadata: Mapping[str, Any]
    file_bytes: int

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors, without header and padding."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def bytes_by_type(self) -> dict[str, int]:
        """Tensor bytes per GGML type."""
        count: Counter[str] = Counter()
        for tensor in self.tensors.values():
            count[tensor.type] += tensor.num_bytes
        return dict(count)


def open_model(path: Path) -> ModelFile:
    """Open and check a GGUF teacher.

    Raises:
        InputError: for a file that is not GGUF, is truncated, holds an architecture, tensor or type that is not
            implemented, or whose shapes contradict its metadata.
    """
    check_header(path)
    try:
        # 'c' is a private copy-on-write map: torch gets a writable buffer without a warning, the file cannot change.
        reader = gguf.GGUFReader(path, "c")
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError, OSError) as error:
        raise InputError(
            str(path),
            expected="a GGUF file that the gguf package can read",
            got=f"{type(error).__name__}: {str(error)[:120]}",
            remedy="download or convert the file again",
        ) from error
    _refuse_unsupported(path, metadata)
    file_bytes = path.stat().st_size
    tensors = {tensor.name: _packed(path, tensor, file_bytes) for tensor in reader.tensors}
    config = _read_config(path, metadata, tensors)
    _check_tensors(path, config, tensors)
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    return ModelFile(
        path=path, config=config, tensors=tensors, tokens=tuple(tokens), metadata=metadata, file_bytes=file_bytes
    )


def _refuse_unsupported(path: Path, metadata: Mapping[str, Any]) -> None:
    architecture = metadata.get("general.architecture")
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise InputError(
            str(path),
            expected=f"architecture {' or '.join(SUPPORTED_ARCHITECTURES)}",
            got=repr(architecture),
            remedy="use a teacher of a supported architecture",
        )
    for key, value in metadata.items():
        unsafe = (
            (key.endswith(".expert_count") and value)
            or (key.endswith(".rope.scaling.type") and value not in ("none", ""))
            or (key.endswith(".attention.sliding_window") and value)
            or (key == "split.count" and value > 1)
        )
        if unsafe:
            raise InputError(
                str(path), expected=f"a model without {key}", got=str(value), remedy="use a dense, single-file model"
            )


def _packed(path: Path, tensor: Any, file_bytes: int) -> PackedTensor:
    shape = tuple(int(size) for size in reversed(tensor.shape.tolist()))
    type_name = tensor.tensor_type.name
    if type_name not in FORMATS:
        raise InputError(
            f"{path}: tensor {tensor.name}",
            expected=f"type {', '.join(FORMATS)}",
            got=type_name,
            remedy="quantise the model to Q4_K_M or Q6_K",
        )
    row_bytes = FORMATS[type_name].row_bytes(shape[-1])
    needed = math.prod(shape[:-1]) * row_bytes
    end = int(tensor.data_offset) + needed
    if end > file_bytes:
        raise InputError(
            f"{path}: tensor {tensor.name}",
            expected=f"{needed} bytes for shape {shape} within the file's {file_bytes}",
            got=f"an end at byte {end}",
            remedy="download the file again: it is truncated or damaged",
        )
    data = tensor.data.view(np.uint8).reshape(-1, row_bytes)
    return PackedTensor(tensor.name, type_name, shape, data)


def _read_config(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, PackedTensor]) -> TeacherConfig:
    architecture = metadata["general.architecture"]

    def number(key: str, low: float, high: float, default: float | None = None) -> float:
        value = metadata.get(f"{architecture}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise InputError(
                f"{path}: {architecture}.{key}",
                expected=f"a number from {low:g} to {high:g}",
                got=repr(value)[:80],
                remedy="convert the model again",
            )
        return value

    if "token_embd.weight" not in tensors:
        raise InputError(str(path), expected="a tensor token_embd.weight", got="none", remedy="convert the model again")
    hidden = int(number("embedding_length", 1, 1 << 20))
    heads = int(number("attention.head_count", 1, 1024))
    head_dim = int(number("attention.key_length", 1, 1024, hidden // heads))
    return TeacherConfig(
        architecture=architecture,
        num_layers=int(number("block_count", 1, 1024)),
        hidden_size=hidden,
        ffn_size=int(number("feed_forward_length", 1, 1 << 22)),
        num_heads=heads,
        num_kv_heads=int(number("attention.head_count_kv", 1, heads, heads)),
        head_dim=head_dim,
        rms_eps=float(number("attention.layer_norm_rms_epsilon", 1e-12, 1e-1)),
        rope_base=float(number("rope.freq_base", 1.0, 1e12, 10_000.0)),
        context_length=int(number("context_length", 1, 1 << 24)),
        vocab_size=tensors["token_embd.weight"].shape[0],
        tied_head="output.weight" not in tensors,
    )


def expected_shapes(config: TeacherConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor a file with this config may hold (biases included)."""
    hidden, q_size = config.hidden_size, config.num_heads * config.head_dim
    kv_size = config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (config.vocab_size, hidden),
        "output_norm.weight": (hidden,),
    }
    if not config.tied_head:
        shapes["output.weight"] = (config.vocab_size, hidden)
    rows_cols = {
        "attn_q": (q_size, hidden),
        "attn_k": (kv_size, hidden),
        "attn_v": (kv_size, hidden),
        "attn_output": (hidden, q_size),
        "ffn_gate": (config.ffn_size, hidden),
        "ffn_up": (config.ffn_size, hidden),
        "ffn_down": (hidden, config.ffn_size),
    }
    for layer in range(config.num_layers):
        prefix = f"blk.{layer}."
        shapes |= {f"{prefix}{name}.weight": rows_cols[name] for name in _LAYER_MATRICES}
        shapes |= {f"{prefix}{name}.bias": rows_cols[name][:1] for name in ("attn_q", "attn_k", "attn_v")}
        shapes |= {f"{prefix}attn_norm.weight": (hidden,), f"{prefix}ffn_norm.weight": (hidden,)}
    return shapes


def _check_tensors(path: Path, config: TeacherConfig, tensors: Mapping[str, PackedTensor]) -> None:
    if config.num_heads % config.num_kv_heads or config.head_dim % 2:
        raise InputError(
            str(path),
            expected="query heads a multiple of key-value heads and an even head size",
            got=f"{config.num_heads}, {config.num_kv_heads} and {config.head_dim}",
            remedy="convert the model again",
        )
    shapes = expected_shapes(config)
    for name, tensor in tensors.items():
        if name not in shapes:
            raise InputError(
                f"{path}: tensor {name}",
                expected=f"only the tensors of {config.architecture}",
                got="a tensor that would be ignored",
                remedy="use a model without it; ignoring a weight would make the teacher silently wrong",
            )
        if tensor.shape != shapes[name]:
            raise InputError(
                f"{path}: tensor {name}",
                expected=f"shape {shapes[name]}",
                got=f"{tensor.shape}",
                remedy="convert the model again: its metadata and tensors disagree",
            )
        if len(tensor.shape) == 1 and tensor.type not in VECTOR_TYPES:
            raise InputError(
                f"{path}: tensor {name}", expected="an F32 or F16 vector", got=tensor.type, remedy="convert again"
            )
    missing = sorted(name for name in shapes if name not in tensors and not name.endswith(".bias"))
    if missing:
        raise InputError(
            str(path), expected=f"tensor {missing[0]}", got=f"{len(missing)} missing", remedy="download the file again"
        )
