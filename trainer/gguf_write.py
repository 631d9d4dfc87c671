"""Writes a qwen2, qwen3, llama or mistral causal LM as a GGUF that llama.cpp and this project's loader both read.

Type recipes: "f32"; "f16"; "q8_0" and "q6_k" (every matrix); "q4_k_m", which is llama.cpp's: Q4_K, but Q6_K for the
output head (the embedding, where the head is tied to it) and, in the layers ``uses_more_bits`` names, for attn_v and
ffn_down. Norms and biases are always F32. A matrix whose columns are not a multiple of 256 cannot hold superblocks: it
is stored as Q8_0 (llama.cpp takes Q5_0 or Q8_0), and as F16 where they are not a multiple of 32 either.

As in llama.cpp's converter, mistral is written as llama, the rows of llama's Q and K are permuted for the interleaved
rotary embedding, and Llama 3.1's frequency scaling becomes the tensor ``rope_freqs.weight``.
"""

import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open

from q4kd.trainer.architecture import ROPE_FACTORS, TeacherConfig, expected_shapes
from q4kd.trainer.errors import InputError
from q4kd.trainer.files import read_json, sync_folder
from q4kd.trainer.formats import SUPERBLOCK
from q4kd.trainer.huggingface_config import read_huggingface_config, rope_factors
from q4kd.trainer.quantize import BLOCK, quantize
from q4kd.trainer.tensor_names import gguf_name

RECIPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q4_k_m": gguf.LlamaFileType.MOSTLY_Q4_K_M,
    "q6_k": gguf.LlamaFileType.MOSTLY_Q6_K,
}
# The split expressions of Qwen2's and Llama 3's own tokenizers, which llama.cpp calls "qwen2" and "llama-bpe".
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPLIT = QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def uses_more_bits(layer: int, layers: int) -> bool:
    """Whether "q4_k_m" gives a layer's attn_v and ffn_down Q6_K: both ends, every third between (llama-quant.cpp)."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def tensor_type(name: str, shape: tuple[int, ...], *, recipe: str, layers: int, tied: bool) -> str:
    """Return the type of the GGUF tensor ``name``: F32, F16, Q8_0, Q6_K or Q4_K. ``shape`` is [rows, cols] or [n]."""
    if len(shape) == 1 or recipe == "f32":
        return "F32"
    if recipe == "f16" or shape[1] % BLOCK["Q8_0"][0]:
        return "F16"
    if recipe == "q8_0" or shape[1] % SUPERBLOCK:
        return "Q8_0"
    if recipe == "q6_k" or name == "output.weight" or (name == "token_embd.weight" and tied):
        return "Q6_K"
    part = name.split(".")
    if part[0] == "blk" and part[2] in ("attn_v", "ffn_down") and uses_more_bits(int(part[1]), layers):
        return "Q6_K"
    return "Q4_K"


def write_gguf(
    path: Path,
    *,
    config: Any,
    state: Mapping[str, torch.Tensor],
    tokenizer: Mapping[str, Any],
    recipe: str,
    name: str,
) -> None:
    """Write ``path``, whole or not at all; one tensor at a time is converted.

    Args:
        path: the file to write; an existing one is replaced.
        config: a transformers config (qwen2, qwen3, llama, mistral) or its dict.
        state: the model's state dict, Hugging Face names, any float dtype. With a tied head, ``lm_head.weight`` may be
            there only if it equals the embedding.
        tokenizer: the content of tokenizer.json: a byte-level BPE that splits as GPT-2, Qwen2 or Llama 3 does.
        recipe: a key of ``RECIPES``.
        name: general.name.

    Raises:
        InputError: for what cannot be written truthfully: another architecture or tokenizer, missing, unknown or
            wrongly shaped tensors, values that are not finite, more tokens than embedding rows.
    """
    if recipe not in RECIPES:
        raise InputError("recipe", expected=" or ".join(RECIPES), got=recipe, remedy="choose one of these")
    settings = dict(config) if isinstance(config, Mapping) else config.to_dict()
    dimensions = read_huggingface_config(settings)
    factors = rope_factors(settings)
    tensors = dict(state) if factors is None else {**state, ROPE_FACTORS: torch.from_numpy(factors)}
    sources = _plan_tensors(dimensions, tensors)

    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    writer = gguf.GGUFWriter(temporary, dimensions.architecture)
    try:
        writer.add_name(name)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(RECIPES[recipe])
        _add_hyperparameters(writer, dimensions)
        _add_tokenizer(writer, tokenizer, settings)
        types = {}
        for target, source in sources.items():
            shape = tuple(tensors[source].shape)
            types[target] = kind = tensor_type(
                target, shape, recipe=recipe, layers=dimensions.num_layers, tied=dimensions.tied_head
            )
            stored_shape, dtype = _stored(shape, kind)
            size = int(np.prod(stored_shape)) * dtype.itemsize
            writer.add_tensor_info(target, stored_shape, dtype, size, gguf.GGMLQuantizationType[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for target, source in sources.items():
            rows = _file_rows(dimensions, target, tensors[source])
            writer.write_tensor_data(_convert(source, rows, types[target]))
        writer.flush()
        for file in writer.fout or ():
            os.fsync(file.fileno())
        writer.close()
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        for file in writer.fout or ():
            file.close()
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_gguf_from_folder(path: Path, *, model: Path, recipe: str, name: str) -> None:
    """Write the model of a Hugging Face folder (config.json, tokenizer.json, ``*.safetensors``); see ``write_gguf``."""
    state: dict[str, torch.Tensor] = {}
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            state |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - not a mapping
    write_gguf(
        path,
        config=read_json(model / "config.json"),
        state=state,
        tokenizer=read_json(model / "tokenizer.json"),
        recipe=recipe,
        name=name,
    )


def _add_hyperparameters(writer: gguf.GGUFWriter, config: TeacherConfig) -> None:
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
    if config.architecture == "llama":
        writer.add_rope_dimension_count(config.head_dim)


def _plan_tensors(config: TeacherConfig, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return ``{GGUF name: name in tensors}`` in file order, having checked names and shapes against the config."""
    wanted = {
        name: shape
        for name, shape in expected_shapes(config).items()
        # Only Qwen2 has biases; only Llama 3.1's rotary embedding has factors.
        if (config.architecture == "qwen2" or not name.endswith(".bias"))
        and (name != ROPE_FACTORS or ROPE_FACTORS in tensors)
    }
    sources = {gguf_name(source): source for source in tensors if source == ROPE_FACTORS or gguf_name(source) != source}
    unknown = {source for source in tensors if sources.get(gguf_name(source)) != source}
    unknown |= {source for target, source in sources.items() if target not in wanted}
    head, embedding = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    if config.tied_head and head is not None and embedding is not None and torch.equal(head, embedding):
        unknown.discard("lm_head.weight")
    missing = [target for target in wanted if target not in sources]
    if unknown or missing:
        raise InputError(
            "model tensors",
            expected=f"exactly those of a {config.architecture} causal LM" + " with a tied head" * config.tied_head,
            got=f"{len(unknown)} unknown and {len(missing)} missing, first {(sorted(unknown) + missing)[0]}",
            remedy="check config.json against the weights",
        )
    for target, shape in wanted.items():
        found = tuple(tensors[sources[target]].shape)
        if found != shape:
            raise InputError(
                sources[target], expected=str(list(shape)), got=str(list(found)), remedy="check config.json"
            )
    return {target: sources[target] for target in wanted}


def _file_rows(config: TeacherConfig, target: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor, its rows as in the file: Hugging Face pairs ``(i, i + D/2)``, llama ``(2i, 2i + 1)``."""
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}.get(target.split(".")[-2])
    if heads is None or config.rope_layout == "split_halves":
        return tensor
    return tensor.reshape(heads, 2, config.head_dim // 2, -1).transpose(1, 2).reshape(tensor.shape)


def _stored(shape: tuple[int, ...], kind: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return the shape and dtype of the array that ``quantize`` makes of a float32 array of ``shape``."""
    if kind in BLOCK:
        weights, size = BLOCK[kind]
        return (shape[0], shape[1] // weights * size), np.dtype(np.uint8)
    return shape, np.dtype(np.float16 if kind == "F16" else np.float32)


def _convert(source: str, tensor: torch.Tensor, kind: str) -> npt.NDArray[Any]:
    try:
        return quantize(tensor.detach().to("cpu", torch.float32).numpy(), kind)
    except InputError as error:
        raise InputError(
            f"{source}: {error.subject}", expected=error.expected, got=error.got, remedy=error.remedy
        ) from error


def _steps(part: Mapping[str, Any] | None, inner: str) -> Iterator[Mapping[str, Any]]:
    """Yield the steps of a part of tokenizer.json, sequences (whose members are under ``inner``) flattened."""
    if part and part.get("type") == "Sequence":
        for step in part[inner]:
            yield from _steps(step, inner)
    elif part:
        yield part


def pre_tokenizer_name(tokenizer: Mapping[str, Any]) -> str:
    """Return llama.cpp's name, "gpt-2", "qwen2" or "llama-bpe", for how tokenizer.json splits text before merging.

    Raises:
        InputError: for any other, since a wrong name tokenises wrongly without an error.
    """
    model, normalizer = tokenizer.get("model", {}), tokenizer.get("normalizer")
    steps = list(_steps(tokenizer.get("pre_tokenizer"), "pretokenizers"))
    kinds = [step.get("type") for step in steps]
    plain = not any(step.get("add_prefix_space", False) for step in steps)
    whole_words = bool(model.get("ignore_merges", False))
    if model.get("type") == "BPE" and plain:
        if kinds == ["ByteLevel"] and steps[0].get("use_regex", True) and not normalizer and not whole_words:
            return "gpt-2"
        if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
            pattern = steps[0].get("pattern")
            # NFC is Qwen2's own; llama.cpp leaves it out, and for composed text it changes nothing.
            composed = (normalizer or {"type": "NFC"}).get("type") == "NFC"
            if pattern == {"Regex": QWEN2_SPLIT} and composed and not whole_words:
                return "qwen2"
            # llama.cpp takes a word that is a token before it looks at any merge, as ignore_merges says.
            if pattern == {"Regex": LLAMA3_SPLIT} and not normalizer and whole_words:
                return "llama-bpe"
    raise InputError(
        "tokenizer.json",
        expected="a byte-level BPE that splits as GPT-2, Qwen2 or Llama 3 does",
        got=f"model {model.get('type')}, pre-tokenizer {kinds}",
        remedy="export this model with llama.cpp's convert_hf_to_gguf.py",
    )


def _adds_bos(tokenizer: Mapping[str, Any]) -> bool:
    """Whether tokenizer.json puts a special token before every text."""
    steps = _steps(tokenizer.get("post_processor"), "processors")
    return any(
        "SpecialToken" in (step.get("single") or [{}])[0] for step in steps if step.get("type") == "TemplateProcessing"
    )


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    vocab = settings["vocab_size"]
    by_id = {index: token for token, index in tokenizer["model"]["vocab"].items()}
    kinds = dict.fromkeys(by_id, gguf.TokenType.NORMAL)
    for added in tokenizer.get("added_tokens", ()):
        by_id[added["id"]] = added["content"]
        kinds[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    if by_id and max(by_id) >= vocab:
        raise InputError(
            "tokenizer.json", expected=f"ids below vocab_size {vocab}", got=str(max(by_id)), remedy="check config.json"
        )
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(tokenizer))
    writer.add_token_list([by_id.get(index, f"[PAD{index}]") for index in range(vocab)])
    writer.add_token_types([int(kinds.get(index, gguf.TokenType.UNUSED)) for index in range(vocab)])
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_add_bos_token(_adds_bos(tokenizer))
    for key, add in (("bos_token_id", writer.add_bos_token_id), ("eos_token_id", writer.add_eos_token_id)):
        value = settings.get(key)
        if isinstance(value, list):
            value = value[0] if value else None
        if value is not None:
            add(value)
