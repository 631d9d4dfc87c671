"""Writes a qwen2 causal LM as a GGUF that llama.cpp and this project's loader both read.

Type recipes: "f32"; "f16"; "q8_0" and "q6_k" (every matrix); "q4_k_m", which is llama.cpp's: Q4_K, but Q6_K for the
output head (the embedding, where the head is tied to it) and, in the layers ``uses_more_bits`` names, for attn_v and
ffn_down. Norms and biases are always F32. A matrix whose columns are not a multiple of 256 cannot hold superblocks (of
32, for Q8_0): it is stored as F16, where llama.cpp would take Q5_0 or Q8_0.
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

from q4kd.trainer.errors import InputError
from q4kd.trainer.files import read_json, sync_folder
from q4kd.trainer.formats import SUPERBLOCK
from q4kd.trainer.quantize import BLOCK, quantize

RECIPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q4_k_m": gguf.LlamaFileType.MOSTLY_Q4_K_M,
    "q6_k": gguf.LlamaFileType.MOSTLY_Q6_K,
}
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
# The split expression of Qwen2's own tokenizer, which llama.cpp calls "qwen2".
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def uses_more_bits(layer: int, layers: int) -> bool:
    """Whether "q4_k_m" gives a layer's attn_v and ffn_down Q6_K: both ends, every third between (llama-quant.cpp)."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def tensor_type(name: str, shape: tuple[int, ...], *, recipe: str, layers: int, tied: bool) -> str:
    """Return the type of the GGUF tensor ``name``: F32, F16, Q8_0, Q6_K or Q4_K. ``shape`` is [rows, cols] or [n]."""
    if len(shape) == 1 or recipe == "f32":
        return "F32"
    if recipe == "q8_0":
        return "F16" if shape[1] % BLOCK["Q8_0"][0] else "Q8_0"
    if recipe == "f16" or shape[1] % SUPERBLOCK:
        return "F16"
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
        config: a transformers ``Qwen2Config`` or its dict.
        state: the model's state dict, Hugging Face names, any float dtype. With a tied head, ``lm_head.weight`` may be
            there only if it equals the embedding.
        tokenizer: the content of tokenizer.json: a byte-level BPE with GPT-2's or Qwen2's pre-tokenizer.
        recipe: a key of ``RECIPES``.
        name: general.name.

    Raises:
        InputError: for what cannot be written truthfully: another architecture or tokenizer, missing, unknown or
            wrongly shaped tensors, values that are not finite, more tokens than embedding rows.
    """
    if recipe not in RECIPES:
        raise InputError("recipe", expected=" or ".join(RECIPES), got=recipe, remedy="choose one of these")
    settings = dict(config) if isinstance(config, Mapping) else config.to_dict()
    _check_config(settings)
    sources = _plan_tensors(settings, state)
    layers, tied = int(settings["num_hidden_layers"]), bool(settings.get("tie_word_embeddings", False))

    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    writer = gguf.GGUFWriter(temporary, "qwen2")
    try:
        writer.add_name(name)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(RECIPES[recipe])
        _add_hyperparameters(writer, settings)
        _add_tokenizer(writer, tokenizer, settings)
        types = {}
        for target, (_source, shape) in sources.items():
            types[target] = kind = tensor_type(target, shape, recipe=recipe, layers=layers, tied=tied)
            stored_shape, dtype = _stored(shape, kind)
            size = int(np.prod(stored_shape)) * dtype.itemsize
            writer.add_tensor_info(target, stored_shape, dtype, size, gguf.GGMLQuantizationType[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for target, (source, _shape) in sources.items():
            writer.write_tensor_data(_convert(source, state[source], types[target]))
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
    """Write the qwen2 of a Hugging Face folder (config.json, tokenizer.json, ``*.safetensors``); see ``write_gguf``."""
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


def _check_config(settings: Mapping[str, Any]) -> None:
    """Refuse what the qwen2 keys of a GGUF cannot say, and what this project's teacher does not implement."""
    for key in _SIZES:
        if not isinstance(settings.get(key), int) or settings[key] < 1:
            raise InputError(
                f"config {key}", expected="a positive integer", got=repr(settings.get(key)), remedy="check config.json"
            )
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    heads = settings["num_attention_heads"]
    for subject, expected, got in (
        ("model_type", "qwen2", settings.get("model_type")),
        ("hidden_act", "silu", settings.get("hidden_act", "silu")),
        ("rope type", "default", rope.get("rope_type", rope.get("type", "default"))),
        ("use_sliding_window", False, bool(settings.get("use_sliding_window", False))),
        ("head_dim", settings["hidden_size"] // heads, settings.get("head_dim") or settings["hidden_size"] // heads),
    ):
        if got != expected:
            raise InputError(f"config {subject}", expected=str(expected), got=str(got), remedy="export another model")


def _rope_theta(settings: Mapping[str, Any]) -> float:
    value = (settings.get("rope_parameters") or {}).get("rope_theta", settings.get("rope_theta"))
    if value is None:
        raise InputError("config rope_theta", expected="a number", got="none", remedy="add it to config.json")
    return float(value)


def _add_hyperparameters(writer: gguf.GGUFWriter, settings: Mapping[str, Any]) -> None:
    writer.add_block_count(settings["num_hidden_layers"])
    writer.add_context_length(settings["max_position_embeddings"])
    writer.add_embedding_length(settings["hidden_size"])
    writer.add_feed_forward_length(settings["intermediate_size"])
    writer.add_head_count(settings["num_attention_heads"])
    writer.add_head_count_kv(settings["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(settings["rms_norm_eps"])
    writer.add_rope_freq_base(_rope_theta(settings))
    writer.add_vocab_size(settings["vocab_size"])


def _plan_tensors(
    settings: Mapping[str, Any], state: Mapping[str, torch.Tensor]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return ``{GGUF name: (Hugging Face name, shape)}`` in file order, having checked it against the state dict."""
    hidden, ffn, vocab = settings["hidden_size"], settings["intermediate_size"], settings["vocab_size"]
    kv = hidden // settings["num_attention_heads"] * settings["num_key_value_heads"]
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {
        "token_embd.weight": ("model.embed_tokens.weight", (vocab, hidden)),
        "output_norm.weight": ("model.norm.weight", (hidden,)),
    }
    tied = bool(settings.get("tie_word_embeddings", False))
    if not tied:
        wanted["output.weight"] = ("lm_head.weight", (vocab, hidden))
    per_layer: dict[str, tuple[str, tuple[int, ...]]] = {
        "attn_norm.weight": ("input_layernorm.weight", (hidden,)),
        "attn_q.weight": ("self_attn.q_proj.weight", (hidden, hidden)),
        "attn_q.bias": ("self_attn.q_proj.bias", (hidden,)),
        "attn_k.weight": ("self_attn.k_proj.weight", (kv, hidden)),
        "attn_k.bias": ("self_attn.k_proj.bias", (kv,)),
        "attn_v.weight": ("self_attn.v_proj.weight", (kv, hidden)),
        "attn_v.bias": ("self_attn.v_proj.bias", (kv,)),
        "attn_output.weight": ("self_attn.o_proj.weight", (hidden, hidden)),
        "ffn_norm.weight": ("post_attention_layernorm.weight", (hidden,)),
        "ffn_gate.weight": ("mlp.gate_proj.weight", (ffn, hidden)),
        "ffn_up.weight": ("mlp.up_proj.weight", (ffn, hidden)),
        "ffn_down.weight": ("mlp.down_proj.weight", (hidden, ffn)),
    }
    for layer in range(settings["num_hidden_layers"]):
        for target, (source, shape) in per_layer.items():
            wanted[f"blk.{layer}.{target}"] = (f"model.layers.{layer}.{source}", shape)
    sources = {source for source, _shape in wanted.values()}
    extra = set(state) - sources
    if tied and "lm_head.weight" in extra and torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"]):
        extra.remove("lm_head.weight")
    if problem := sorted(extra) + sorted(sources - set(state)):
        raise InputError(
            "model tensors",
            expected="exactly those of a qwen2 causal LM" + (" with a tied head" if tied else ""),
            got=f"{len(extra)} unknown and {len(sources - set(state))} missing, first {problem[0]}",
            remedy="check config.json against the weights",
        )
    for source, shape in wanted.values():
        if tuple(state[source].shape) != shape:
            raise InputError(
                source, expected=str(list(shape)), got=str(list(state[source].shape)), remedy="check config.json"
            )
    return wanted


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


def _pre_tokenizers(part: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """Yield the pre-tokenizer steps, sequences flattened."""
    if part and part.get("type") == "Sequence":
        for inner in part["pretokenizers"]:
            yield from _pre_tokenizers(inner)
    elif part:
        yield part


def pre_tokenizer_name(tokenizer: Mapping[str, Any]) -> str:
    """Return llama.cpp's name, "gpt-2" or "qwen2", for how tokenizer.json splits text before merging.

    Raises:
        InputError: for any other, since a wrong name tokenises wrongly without an error.
    """
    steps = list(_pre_tokenizers(tokenizer.get("pre_tokenizer")))
    kinds = [step.get("type") for step in steps]
    plain = not any(step.get("add_prefix_space", False) for step in steps)
    if tokenizer.get("model", {}).get("type") == "BPE" and plain:
        if kinds == ["ByteLevel"] and steps[0].get("use_regex", True) and not tokenizer.get("normalizer"):
            return "gpt-2"
        # NFC is Qwen2's own; llama.cpp leaves it out, and for composed text it changes nothing.
        composed = (tokenizer.get("normalizer") or {"type": "NFC"}).get("type") == "NFC"
        split = kinds == ["Split", "ByteLevel"] and steps[0].get("pattern") == {"Regex": QWEN2_SPLIT}
        if split and composed and not steps[1].get("use_regex", True):
            return "qwen2"
    raise InputError(
        "tokenizer.json",
        expected="a byte-level BPE that splits as GPT-2 or Qwen2 does",
        got=f"model {tokenizer.get('model', {}).get('type')}, pre-tokenizer {kinds}",
        remedy="export this model with llama.cpp's convert_hf_to_gguf.py",
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
    writer.add_add_bos_token(False)
    for key, add in (("bos_token_id", writer.add_bos_token_id), ("eos_token_id", writer.add_eos_token_id)):
        value = settings.get(key)
        if isinstance(value, list):
            value = value[0] if value else None
        if value is not None:
            add(value)
