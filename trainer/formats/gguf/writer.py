"""Writes a causal LM of a known family as a GGUF that llama.cpp and this project's loader both read.

``recipes.py`` says which type each tensor gets. Norms and biases are always F32.

As in llama.cpp's converter, mistral is written as llama, the rows of Q and K of llama and its relatives are permuted
for the interleaved rotary embedding, Gemma's norms are stored as 1 + w, and the divisors of rotary frequencies (Llama
3.1's and those of long texts) become tensors.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch

from q4kd.trainer.errors import InputError
from q4kd.trainer.files import read_json, replacing_path
from q4kd.trainer.formats.architecture import TeacherConfig
from q4kd.trainer.formats.blocks.quantize import BLOCK, quantize
from q4kd.trainer.formats.family_metadata import family_metadata
from q4kd.trainer.formats.gguf.added_tokens import name_for
from q4kd.trainer.formats.gguf.importance import Importance, importance_of
from q4kd.trainer.formats.gguf.recipes import RECIPES, Mixture, tensor_type
from q4kd.trainer.formats.gguf.vocabulary import Vocabulary, add_vocabulary, config_special_ids
from q4kd.trainer.formats.huggingface.reader import read_huggingface_config, read_weights, rope_tensors
from q4kd.trainer.formats.rope_scaling import LONG_FACTORS, SHORT_FACTORS
from q4kd.trainer.formats.tensor_names import gguf_name
from q4kd.trainer.formats.tensor_shapes import ROPE_FACTORS, expected_shapes

_ROPE_TENSORS = (ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS)


def write_gguf(
    path: Path,
    *,
    config: Any,
    state: Mapping[str, torch.Tensor],
    tokenizer: Mapping[str, Any] | Vocabulary,
    recipe: str,
    name: str,
    notes: Mapping[str, str | int] | None = None,
    importance: Importance | None = None,
    check: Callable[[Path], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write ``path``, whole or not at all; one tensor at a time is converted.

    Args:
        path: file to write; an existing one is replaced.
        config: a transformers config of one of ``huggingface.ARCHITECTURES``, or its dict.
        state: the model's state dict, with Hugging Face names and of any float dtype. With a tied head,
            ``lm_head.weight`` may be there only if it equals the embedding.
        tokenizer: a vocabulary, or the content of tokenizer.json, whose special ids are then those of ``config``.
        recipe: a key of ``RECIPES``.
        name: what the model is called; ``name_for`` says how far general.name may be another.
        notes: further metadata on where the model comes from, under keys that begin with ``q4kd.``.
        importance: how much squared errors of each column count, by the tensor's GGUF name; see ``read_importance``.
        check: function called with the complete file before it takes its name; if it raises, nothing is left behind.
        progress: function called with (bytes done, all bytes) after each tensor.

    Raises:
        InputError: for what cannot be written truthfully: another architecture or tokenizer, missing, unknown or
            wrongly shaped tensors, values that are not finite, more tokens than embedding rows.
        OSError: when the file cannot be written.
    """
    if recipe not in RECIPES:
        raise InputError("recipe", expected=" or ".join(RECIPES), got=recipe, remedy="choose one of these")
    settings = dict(config) if isinstance(config, Mapping) else config.to_dict()
    dimensions = read_huggingface_config(settings)
    if not isinstance(tokenizer, Vocabulary):
        tokenizer = Vocabulary(content=tokenizer, special_ids=config_special_ids(settings))
    tensors = with_rope_factors(settings, state)
    sources = plan_tensors(dimensions, tensors)
    if importance is not None and not importance.keys() & sources.keys():
        got, remedy = f"none, but {next(iter(importance), 'nothing')!r}"[:80], "use the importance matrix of this model"
        raise InputError("importance matrix", expected="tensors of this model", got=got, remedy=remedy)

    with replacing_path(path) as temporary:
        writer = gguf.GGUFWriter(temporary, dimensions.architecture)
        try:
            writer.add_name(name_for(name, tokenizer.content))
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            writer.add_file_type(RECIPES[recipe])
            for key, value in (notes or {}).items():
                if isinstance(value, str):
                    writer.add_string(key, value)
                else:
                    writer.add_uint64(key, value)
            add_hyperparameters(writer, dimensions)
            add_vocabulary(writer, tokenizer, dimensions.vocab_size)
            _write_tensors(writer, dimensions, tensors, sources, recipe, importance, progress)
        finally:
            for file in writer.fout or ():
                file.close()
        if check:
            check(temporary)


def _write_tensors(
    writer: gguf.GGUFWriter,
    dimensions: TeacherConfig,
    tensors: Mapping[str, torch.Tensor],
    sources: Mapping[str, str],
    recipe: str,
    importance: Importance | None,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Announce every tensor, write the header, then convert and write one tensor at a time."""
    types, sizes = {}, {}
    groups = dimensions.num_heads // dimensions.num_kv_heads
    mixture = Mixture(recipe, dimensions.num_layers, dimensions.tied_head, groups, importance is not None)
    for target, source in sources.items():
        shape = tuple(tensors[source].shape)
        types[target] = kind = tensor_type(target, shape, mixture)
        stored_shape, dtype = _stored(shape, kind)
        sizes[target] = int(np.prod(stored_shape)) * dtype.itemsize
        writer.add_tensor_info(target, stored_shape, dtype, sizes[target], gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    done = 0
    for target, source in sources.items():
        rows = file_rows(dimensions, target, tensors[source])
        known = importance_of(importance, target, rows.shape[-1])
        writer.write_tensor_data(_convert(source, rows, types[target], known))
        done += sizes[target]
        if progress:
            progress(done, sum(sizes.values()))


def with_rope_factors(settings: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors of a file: the model's, and the divisors of its rotary frequencies."""
    return {**state, **{name: torch.from_numpy(factors) for name, factors in rope_tensors(settings).items()}}


def write_gguf_from_folder(path: Path, *, model: Path, recipe: str, name: str) -> None:
    """Write the model of a Hugging Face folder (config.json, tokenizer.json, ``*.safetensors``); see ``write_gguf``."""
    config, tokenizer = read_json(model / "config.json"), read_json(model / "tokenizer.json")
    write_gguf(path, config=config, state=read_weights(model), tokenizer=tokenizer, recipe=recipe, name=name)


def add_hyperparameters(writer: gguf.GGUFWriter, config: TeacherConfig) -> None:
    """Write a model's dimensions to a GGUF whose header is not written yet."""
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.ffn_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_eps)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_vocab_size(config.vocab_size)
    if config.head_dim * config.num_heads != config.hidden_size:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    for key, value in family_metadata(config).items():
        key = f"{config.architecture}.{key}"
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_array(key, value)


def plan_tensors(config: TeacherConfig, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return ``{GGUF name: name in tensors}`` in file order, having checked names and shapes against the config."""
    sources = {gguf_name(source, config.architecture): source for source in tensors}
    sources = {target: source for target, source in sources.items() if target != source or source in _ROPE_TENSORS}
    wanted = {
        name: shape
        for name, shape in expected_shapes(config).items()
        if (_has_biases(config, sources) or not name.endswith(".bias"))
        and (name != ROPE_FACTORS or ROPE_FACTORS in tensors)
    }
    unknown = {source for source in tensors if sources.get(gguf_name(source, config.architecture)) != source}
    unknown |= {source for target, source in sources.items() if target not in wanted}
    head, embedding = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    if config.tied_head and head is not None and embedding is not None and torch.equal(head, embedding):
        unknown.discard("lm_head.weight")
    missing = [target for target in wanted if target not in sources]
    remedy = "use the config.json that was saved with these weights"
    if unknown or missing:
        expected = f"exactly those of a {config.architecture} causal LM" + " with a tied head" * config.tied_head
        got = f"{len(unknown)} unknown and {len(missing)} missing, first {(sorted(unknown) + missing)[0]}"
        raise InputError("model tensors", expected=expected, got=got, remedy=remedy)
    for target, shape in wanted.items():
        found = tuple(tensors[sources[target]].shape)
        if found != shape:
            raise InputError(sources[target], expected=str(list(shape)), got=str(list(found)), remedy=remedy)
    return {target: sources[target] for target in wanted}


def _has_biases(config: TeacherConfig, sources: Mapping[str, str]) -> bool:
    """Return whether Q, K and V have biases: Qwen2's always, GLM-4's where they are stored.

    Other models that have them have one of the attention's output too, which no family takes.
    """
    stored = any(target.endswith(".bias") for target in sources)
    return config.architecture == "qwen2" or (config.architecture == "glm4" and stored)


def file_rows(config: TeacherConfig, target: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor as the file holds it.

    Hugging Face rotates rows ``(i, i + D/2)`` of Q and K, llama and its relatives ``(2i, 2i + 1)``; Gemma's norms are
    stored as 1 + w, float32.
    """
    part = target.split(".")[-2]
    if part.endswith("norm") and config.family.norm_offset:
        return tensor.float() + config.family.norm_offset
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}.get(part)
    if heads is None or not config.family.is_permuted:
        return tensor
    return tensor.reshape(heads, 2, config.head_dim // 2, -1).transpose(1, 2).reshape(tensor.shape)


def _stored(shape: tuple[int, ...], kind: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return the shape and dtype of the array that ``quantize`` makes of a float32 array of ``shape``."""
    if kind in BLOCK:
        weights, size = BLOCK[kind]
        return (shape[0], shape[1] // weights * size), np.dtype(np.uint8)
    if kind == "BF16":
        return (*shape[:-1], 2 * shape[-1]), np.dtype(np.uint8)
    return shape, np.dtype(np.float16 if kind == "F16" else np.float32)


def _convert(
    source: str, tensor: torch.Tensor, kind: str, importance: npt.NDArray[np.float32] | None
) -> npt.NDArray[Any]:
    if kind == "BF16":
        rounded = tensor.detach().to("cpu", torch.bfloat16).contiguous()
        if not torch.isfinite(rounded).all():
            got, remedy = "NaN or infinite as bfloat16", "export an earlier checkpoint"
            raise InputError(source, expected="finite values", got=got, remedy=remedy)
        return rounded.view(torch.uint8).numpy()
    try:
        return quantize(tensor.detach().to("cpu", torch.float32).numpy(), kind, importance)
    except InputError as error:
        subject = f"{source}: {error.subject}"
        raise InputError(subject, expected=error.expected, got=error.got, remedy=error.remedy) from error
