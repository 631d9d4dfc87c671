"""Read a GGUF teacher with the ``gguf`` package, after its header was walked within bounds."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from q4kd.trainer.architecture import ROPE_FACTORS, check_architecture, check_tensors, read_dimensions
from q4kd.trainer.errors import InputError
from q4kd.trainer.formats import FORMATS
from q4kd.trainer.gguf_header import check_header
from q4kd.trainer.model_file import ModelFile, PackedTensor

# Metadata that are read, or that change nothing in what these architectures compute.
_KNOWN = {
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_epsilon",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "pooling_type",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "tensor_data_layout",
    "vocab_size",
}
# Metadata that are not implemented, with the values at which they change nothing. Any further key is refused too.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "rope.scaling.type": ("none", "linear", ""),  # llama.cpp's linear scaling is 1 / factor
    "rope.scaling.factor": (0.0, 1.0),  # 0 means not set; a factor without a type is applied
    "rope.scaling.attn_factor": (1.0,),
    "rope.scale_linear": (0.0, 1.0),
    "attention.scale": (0.0,),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "nextn_predict_layers": (0,),
    "use_parallel_residual": (False,),
}


def open_gguf(path: Path) -> ModelFile:
    """Open and check a GGUF teacher.

    Raises:
        InputError: as ``open_model``.
    """
    check_header(path)
    try:
        # 'c' is a private copy-on-write map: torch gets a writable buffer without a warning, the file cannot change.
        reader = gguf.GGUFReader(path, "c")
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, UnicodeDecodeError, OSError) as error:
        raise InputError(
            str(path),
            expected="a GGUF file that the gguf package can read",
            got=f"{type(error).__name__}: {str(error)[:120]}",
            remedy="download or convert the file again",
        ) from error
    _refuse_split(path, metadata)
    _refuse_companion(path, metadata)
    architecture = check_architecture(path, metadata.get("general.architecture"))
    prefix = f"{architecture}."
    values = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    _refuse_unsupported(path, architecture, values)
    file_bytes = path.stat().st_size
    tensors = {tensor.name: _packed(path, tensor, file_bytes) for tensor in reader.tensors}
    config = read_dimensions(path, architecture, values, tensors)
    check_tensors(path, config, tensors)
    _check_rope_factors(path, tensors)
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        tokens = []
    return ModelFile(
        path=path, config=config, tensors=tensors, tokens=tuple(tokens), metadata=metadata, file_bytes=file_bytes
    )


def _refuse_split(path: Path, metadata: Mapping[str, Any]) -> None:
    count = metadata.get("split.count")
    if isinstance(count, int) and count > 1:
        number = metadata.get("split.no")
        first = f"{path.name.rsplit('-', 3)[0]}-00001-of-{count:05d}.gguf"
        raise InputError(
            str(path),
            expected="a single GGUF file",
            got=f"part {number + 1 if isinstance(number, int) else '?'} of {count}",
            remedy=f"merge the parts: llama-gguf-split --merge {first} merged.gguf",
        )


def _refuse_companion(path: Path, metadata: Mapping[str, Any]) -> None:
    """Refuse an adapter, a vision projector or an importance matrix: files that go with a model and are none."""
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise InputError(
            f"{path}: general.type", expected="model", got=repr(kind)[:80], remedy="name the model's own file"
        )


def _refuse_unsupported(path: Path, architecture: str, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if key not in _KNOWN and value not in _NEUTRAL.get(key, ()):
            raise InputError(
                f"{path}: {architecture}.{key}",
                expected=" or ".join(str(neutral) for neutral in _NEUTRAL.get(key, ()) if neutral != "")
                or "a model without it",
                got=repr(value)[:80],
                remedy="use another teacher: leaving this out would make it silently wrong",
            )
    window, context = values.get("attention.sliding_window"), values.get("context_length")
    # A window as long as the context leaves nothing out.
    if window and not (isinstance(window, int) and isinstance(context, int) and window >= context):
        raise InputError(
            f"{path}: {architecture}.attention.sliding_window",
            expected="full attention",
            got=f"{str(window)[:80]} of {context} positions",
            remedy="use another teacher: attention beyond the window would be silently wrong",
        )


def _check_rope_factors(path: Path, tensors: Mapping[str, PackedTensor]) -> None:
    """Refuse rotary factors that are not positive: frequencies are divided by them."""
    if ROPE_FACTORS not in tensors:
        return
    tensor = tensors[ROPE_FACTORS]
    factors = gguf.quants.dequantize(tensor.data, gguf.GGMLQuantizationType[tensor.type])
    if not (np.isfinite(factors) & (factors > 0)).all():
        raise InputError(
            f"{path}: tensor {ROPE_FACTORS}",
            expected="positive numbers",
            got=f"{factors.min():g} to {factors.max():g}",
            remedy="download or convert the file again",
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
