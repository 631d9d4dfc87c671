"""Read a GGUF teacher with the ``gguf`` package, after its header was walked within bounds."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from q4kd.trainer.errors import InputError
from q4kd.trainer.formats.architecture import ROPE_FACTORS, check_architecture, check_tensors, read_dimensions
from q4kd.trainer.formats.blocks.layout import FORMATS
from q4kd.trainer.formats.gguf.header import check_header
from q4kd.trainer.formats.model_file import ModelFile, PackedTensor

_REMEDY = "download or convert the file again"
# These metadata are read, or change nothing in what these architectures compute.
_KNOWN = {"block_count", "context_length", "embedding_length", "feed_forward_length", "pooling_type", "vocab_size"}
_KNOWN |= {"attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"}
_KNOWN |= {"attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon", "attention.sliding_window"}
_KNOWN |= {"rope.dimension_count", "rope.freq_base", "rope.scaling.finetuned", "rope.scaling.original_context_length"}
_KNOWN |= {"tensor_data_layout"}
# These metadata are not implemented; at the values given they change nothing. Any further key is refused too.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "rope.scaling.type": ("none", "linear", ""),  # llama.cpp's linear scaling divides by the factor
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
        # Mode "c" is a private copy-on-write map: torch gets a writable buffer, and the file cannot change.
        reader = gguf.GGUFReader(path, "c")
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, UnicodeDecodeError, OSError) as error:
        expected, got = "a GGUF file that the gguf package can read", f"{type(error).__name__}: {str(error)[:120]}"
        raise InputError(str(path), expected=expected, got=got, remedy=_REMEDY) from error
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
        got = f"part {number + 1 if isinstance(number, int) else '?'} of {count}"
        first = f"{path.name.rsplit('-', 3)[0]}-00001-of-{count:05d}.gguf"
        remedy = f"merge the parts: llama-gguf-split --merge {first} merged.gguf"
        raise InputError(str(path), expected="a single GGUF file", got=got, remedy=remedy)


def _refuse_companion(path: Path, metadata: Mapping[str, Any]) -> None:
    """Refuse an adapter, a vision projector or an importance matrix: such a file goes with a model but is none."""
    kind, remedy = metadata.get("general.type", "model"), "name the model's own file"
    if kind != "model":
        raise InputError(f"{path}: general.type", expected="model", got=repr(kind)[:80], remedy=remedy)


def _refuse_unsupported(path: Path, architecture: str, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if key not in _KNOWN and value not in _NEUTRAL.get(key, ()):
            neutral = " or ".join(str(neutral) for neutral in _NEUTRAL.get(key, ()) if neutral != "")
            remedy = "use another teacher: leaving this out would make it silently wrong"
            subject, expected = f"{path}: {architecture}.{key}", neutral or "a model without it"
            raise InputError(subject, expected=expected, got=repr(value)[:80], remedy=remedy)
    window, context = values.get("attention.sliding_window"), values.get("context_length")
    # A window as long as the context leaves nothing out.
    if window and not (isinstance(window, int) and isinstance(context, int) and window >= context):
        subject, got = f"{path}: {architecture}.attention.sliding_window", f"{str(window)[:80]} of {context} positions"
        remedy = "use another teacher: attention beyond the window would be silently wrong"
        raise InputError(subject, expected="full attention", got=got, remedy=remedy)


def _check_rope_factors(path: Path, tensors: Mapping[str, PackedTensor]) -> None:
    """Refuse rotary factors that are not positive: frequencies are divided by them."""
    if ROPE_FACTORS not in tensors:
        return
    tensor = tensors[ROPE_FACTORS]
    factors = gguf.quants.dequantize(tensor.data, gguf.GGMLQuantizationType[tensor.type])
    if not (np.isfinite(factors) & (factors > 0)).all():
        got = f"{factors.min():g} to {factors.max():g}"
        raise InputError(f"{path}: tensor {ROPE_FACTORS}", expected="positive numbers", got=got, remedy=_REMEDY)


def _packed(path: Path, tensor: Any, file_bytes: int) -> PackedTensor:
    shape = tuple(int(size) for size in reversed(tensor.shape.tolist()))
    type_name, subject = tensor.tensor_type.name, f"{path}: tensor {tensor.name}"
    if type_name not in FORMATS:
        remedy = "quantise the model to Q4_K_M or Q6_K"
        raise InputError(subject, expected=f"type {', '.join(FORMATS)}", got=type_name, remedy=remedy)
    row_bytes = FORMATS[type_name].row_bytes(shape[-1])
    needed = math.prod(shape[:-1]) * row_bytes
    end = int(tensor.data_offset) + needed
    if end > file_bytes:
        expected = f"{needed} bytes for shape {shape} within the file's {file_bytes}"
        remedy = "download the file again: it is truncated or damaged"
        raise InputError(subject, expected=expected, got=f"an end at byte {end}", remedy=remedy)
    data = tensor.data.view(np.uint8).reshape(-1, row_bytes)
    return PackedTensor(tensor.name, type_name, shape, data)
