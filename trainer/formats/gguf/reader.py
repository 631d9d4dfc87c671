"""Read a GGUF teacher: what its header says is checked, and its tensors are used as they lie in the mapped file."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from q4kd.trainer.errors import InputError
from q4kd.trainer.formats.architecture import check_architecture, read_dimensions
from q4kd.trainer.formats.blocks.layout import FORMATS, GGML_TYPES
from q4kd.trainer.formats.families import FAMILIES
from q4kd.trainer.formats.gguf.header import Header, TensorEntry
from q4kd.trainer.formats.gguf.metadata import MetadataArray
from q4kd.trainer.formats.gguf.scales import take_scales
from q4kd.trainer.formats.gguf.split import model_metadata, open_shards
from q4kd.trainer.formats.layer_sizes import own_scales
from q4kd.trainer.formats.model_file import ModelFile, PackedTensor
from q4kd.trainer.formats.rope_scaling import LONG_FACTORS, SHORT_FACTORS
from q4kd.trainer.formats.tensor_shapes import ROPE_FACTORS, check_tensors

_REMEDY = "download or convert the file again"
# These metadata are read, or change nothing in what these architectures compute.
# Metadata that every model may have.
PLAIN_KEYS = {"block_count", "context_length", "embedding_length", "feed_forward_length", "pooling_type", "vocab_size"}
PLAIN_KEYS |= {"attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"}
PLAIN_KEYS |= {"attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon"}
PLAIN_KEYS |= {"rope.dimension_count", "rope.freq_base", "rope.scaling.original_context_length"}
PLAIN_KEYS |= {"tensor_data_layout"}
# These metadata are not implemented; at the values given they change nothing. Any further key is refused too.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_shared_count": (0,),
    "expert_shared_feed_forward_length": (0,),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_weights_norm": (True,),
    "expert_weights_scale": (0.0, 1.0),  # 0 means not set
    "leading_dense_block_count": (0,),
    "attention.shared_kv_layers": (0,),
    "embedding_length_per_layer_input": (0,),
    "rope.scaling.type": ("none", "linear", ""),  # llama.cpp's linear scaling divides by the factor
    "rope.scaling.factor": (0.0, 1.0),  # 0 means not set; a factor without a type is applied
    "rope.scaling.attn_factor": (1.0,),
    "rope.scale_linear": (0.0, 1.0),
    "rope.scaling.finetuned": (True,),
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
    """Open and check a GGUF teacher; any shard of a split one stands for all of them.

    Raises:
        InputError: as ``open_model``.
    """
    shards = open_shards(path)
    path, metadata = shards[0].path, model_metadata(shards)
    refuse_companion(path, metadata)
    architecture = check_architecture(path, metadata.get("general.architecture"))
    prefix = f"{architecture}."
    values = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    refuse_unsupported(path, architecture, values)
    tensors: dict[str, PackedTensor] = {}
    for shard in shards:
        header, data = shard.header, shard.mapped.data
        tensors |= {entry.name: _packed(shard.path, entry, header, data) for entry in header.tensors}
        check_layout(shard.path, header, tensors)
    if not tensors:
        expected, got, remedy = "a model with weights", "no tensor", "name the model's own file"
        raise InputError(str(path), expected=expected, got=got, remedy=remedy)
    tensors = take_scales(path, tensors, own_scales(architecture))
    config = read_dimensions(path, architecture, values, tensors)
    tensors = {name: tensor for name, tensor in tensors.items() if not config.is_skipped(name)}
    check_tensors(path, config, tensors)
    _check_rope_factors(path, tensors)
    _check_decays(path, tensors)
    return ModelFile(
        path=path,
        config=config,
        tensors=tensors,
        tokens=read_tokens(metadata),
        metadata=metadata,
        files=tuple(shard.mapped for shard in shards),
    )


def read_tokens(metadata: Mapping[str, Any]) -> Sequence[str]:
    """Return the token strings by id, not decoded yet; none where there is no array of strings."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    return tokens if isinstance(tokens, MetadataArray) and tokens.holds_strings else ()


def check_layout(path: Path, header: Header, tensors: Mapping[str, PackedTensor]) -> None:
    """Check that each tensor begins where the one before it ends, at the next multiple of the alignment.

    llama.cpp asks the same. Two tensors on the same bytes, or a shifted one, would be silently wrong.

    Raises:
        InputError: naming the first tensor that begins elsewhere.
    """
    end = 0
    for entry in header.tensors:
        if entry.offset != end:
            got = f"byte {entry.offset}: " + (
                f"not a multiple of the alignment, {header.alignment}"
                if entry.offset % header.alignment
                else "on the bytes of another tensor"
                if entry.offset < end
                else f"a gap of {entry.offset - end} bytes"
            )
            expected = f"data that begin where the tensor before it ends, at byte {end}"
            raise InputError(f"{path}: tensor {entry.name}", expected=expected, got=got, remedy=_REMEDY)
        end += -(-tensors[entry.name].num_bytes // header.alignment) * header.alignment


def refuse_companion(path: Path, metadata: Mapping[str, Any]) -> None:
    """Refuse an adapter, a vision projector or an importance matrix: such a file goes with a model but is none.

    Raises:
        InputError: naming what it is.
    """
    kind, remedy = metadata.get("general.type", "model"), "name the model's own file"
    if kind != "model":
        raise InputError(f"{path}: general.type", expected="model", got=repr(kind)[:80], remedy=remedy)


def refuse_unsupported(path: Path, architecture: str, values: Mapping[str, Any]) -> None:
    """Refuse metadata that change what a model computes and are not implemented.

    Raises:
        InputError: naming the first such key.
    """
    window, context = values.get("attention.sliding_window"), values.get("context_length")
    # A window as long as the context leaves nothing out.
    is_whole = not window or (isinstance(window, int) and isinstance(context, int) and window >= context)
    # `inspect` asks about architectures that are not known, too: of these nothing special is.
    known = PLAIN_KEYS | (FAMILIES[architecture].metadata_keys if architecture in FAMILIES else frozenset())
    if architecture != "granite":  # for which false means no rotary embedding
        known |= {"rope.scaling.finetuned"}
    neutral_values = _NEUTRAL | {"expert_gating_func": _gating(architecture)}
    for key, value in values.items():
        if key in known or value in neutral_values.get(key, ()) or (key == "attention.sliding_window" and is_whole):
            continue
        subject, got = f"{path}: {architecture}.{key}", repr(value)[:80]
        if key == "attention.sliding_window":
            remedy = "use another teacher: attention beyond the window would be silently wrong"
            raise InputError(subject, expected="full attention", got=f"{got} of {context} positions", remedy=remedy)
        neutral = " or ".join(str(neutral) for neutral in neutral_values.get(key, ()) if neutral != "")
        remedy = "use another teacher: leaving this out would make it silently wrong"
        raise InputError(subject, expected=neutral or "a model without it", got=got, remedy=remedy)


def _gating(architecture: str) -> tuple[int, ...]:
    """Return the values of ``expert_gating_func`` that change nothing: the family's own, or those of any softmax."""
    return FAMILIES[architecture].gating if architecture in FAMILIES else (0, 1)


def _check_rope_factors(path: Path, tensors: Mapping[str, PackedTensor]) -> None:
    """Refuse rotary factors that are not positive: frequencies are divided by them."""
    import gguf

    for name in tensors.keys() & {ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS}:
        tensor = tensors[name]
        factors = gguf.quants.dequantize(tensor.data, gguf.GGMLQuantizationType[tensor.type])
        if not (np.isfinite(factors) & (factors > 0)).all():
            got = f"{factors.min():g} to {factors.max():g}"
            raise InputError(f"{path}: tensor {name}", expected="positive numbers", got=got, remedy=_REMEDY)


def _check_decays(path: Path, tensors: Mapping[str, PackedTensor]) -> None:
    """Refuse recurrent states that would grow at every token: what they keep is the exponential of these, and less."""
    import gguf

    for name in (name for name in tensors if name.endswith(".ssm_a")):
        tensor = tensors[name]
        decays = gguf.quants.dequantize(tensor.data, gguf.GGMLQuantizationType[tensor.type])
        if not (np.isfinite(decays) & (decays <= 0)).all():
            got = f"{decays.min():g} to {decays.max():g}"
            raise InputError(f"{path}: tensor {name}", expected="numbers up to 0", got=got, remedy=_REMEDY)


def _packed(path: Path, entry: TensorEntry, header: Header, data: npt.NDArray[np.uint8]) -> PackedTensor:
    shape, subject = entry.shape, f"{path}: tensor {entry.name}"
    type_name = GGML_TYPES.get(entry.type_id)
    if type_name is None:
        expected, remedy = f"type {', '.join(FORMATS)}", "quantise the model to Q4_K_M or Q6_K"
        raise InputError(subject, expected=expected, got=ggml_type_name(entry.type_id), remedy=remedy)
    row_bytes = FORMATS[type_name].row_bytes(shape[-1])
    needed = math.prod(shape[:-1]) * row_bytes
    start = header.data_start + entry.offset
    if start + needed > len(data):
        expected = f"{needed} bytes for shape {shape} within the file's {len(data)}"
        remedy = "download the file again: it is truncated or damaged"
        raise InputError(subject, expected=expected, got=f"an end at byte {start + needed}", remedy=remedy)
    return PackedTensor(entry.name, type_name, shape, data[start : start + needed].reshape(-1, row_bytes))


def ggml_type_name(type_id: int) -> str:
    """Return the name of a type that is not supported, as far as the gguf package knows it."""
    import gguf

    try:
        return gguf.GGMLQuantizationType(type_id).name
    except ValueError:
        return f"type number {type_id}, which is newer than this version of q4kd, or none"
