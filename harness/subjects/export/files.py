"""What exported files say of their tokenizer and of the model, by their bytes, beside the folder they were made from.

Each table counts what differs from what the folder's own JSON says. The rules are written down here a second time:
llama.cpp's kinds of token, SentencePiece's scores, and the keys that tokenisation and generation depend on.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from q4kd.harness.oracles import gguf_metadata as kinds
from q4kd.harness.oracles.gguf_metadata import Value, read_metadata
from q4kd.trainer.files import read_json

FILE_TYPES = {"f16": 1, "q8_0": 7, "q4_k_m": 15}
Table = dict[str, int | str | bool]


def file_table(path: Path, folder: Path, file_type: int, template: str | None) -> Table:
    """Return what of a GGUF's metadata differs from tokenizer.json and config.json of a qwen2 or llama folder."""
    tokenizer, config, found = (
        read_json(folder / "tokenizer.json"),
        read_json(folder / "config.json"),
        read_metadata(path),
    )
    is_pieces = bool(tokenizer["model"].get("byte_fallback"))
    tokens, types = expected_tokens(tokenizer, int(config["vocab_size"]), is_pieces)
    stored, stored_types = _items(found, "tokenizer.ggml.tokens"), _items(found, "tokenizer.ggml.token_type")
    merges = [_merge(pair) for pair in tokenizer["model"]["merges"]]
    if is_pieces:
        rank: dict[str, int] = {}
        for number, pair in enumerate(merges, start=1):
            rank.setdefault(pair.replace(" ", "", 1), number)
        wanted: list[Value] = [-float(rank.get(str(token), 0)) for token in tokens]
        joined = {"scores that differ": _differences(_items(found, "tokenizer.ggml.scores"), wanted)}
    else:
        lines: list[Value] = [*merges]
        joined = {"merges that differ": _differences(_items(found, "tokenizer.ggml.merges"), lines)}
    expected = _expected_keys(config, is_pieces, file_type, template)
    listed = {f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "merges", "scores")}
    prefixes = (f"{config['model_type']}.", "tokenizer.")
    strange = {key for key in found if key.startswith(prefixes)} - expected.keys() - listed
    differing = [key for key, value in expected.items() if not _same(found.get(key), value)]
    return {
        "tokens that differ": _differences(stored, tokens),
        "kinds of tokens that differ": _differences(stored_types, types),
        "added tokens of no special kind": sum(kind == kinds.USER_DEFINED for kind in stored_types),
        "control tokens": sum(kind == kinds.CONTROL for kind in stored_types),
        **joined,
        "keys that differ": ", ".join(sorted(differing)) or "none",
        "keys that are not expected": ", ".join(sorted(strange)) or "none",
    }


def expected_tokens(tokenizer: Mapping[str, Any], rows: int, is_pieces: bool) -> tuple[list[Value], list[Value]]:
    """Return the string and the kind of each row: of the vocabulary, then as the added tokens say, else unused."""
    strings = {index: token for token, index in tokenizer["model"]["vocab"].items()}
    types = dict.fromkeys(strings, kinds.NORMAL)
    if is_pieces:
        types |= {index: kinds.BYTE for index, token in strings.items() if re.fullmatch("<0x[0-9A-F]{2}>", token)}
    for added in tokenizer["added_tokens"]:
        strings[added["id"]] = added["content"]
        types[added["id"]] = kinds.CONTROL if added["special"] else kinds.USER_DEFINED
        if is_pieces and added["content"] == tokenizer["model"]["unk_token"]:
            types[added["id"]] = kinds.UNKNOWN
    tokens: list[Value] = [strings.get(index, f"[PAD{index}]") for index in range(rows)]
    return tokens, [types.get(index, kinds.UNUSED) for index in range(rows)]


def _expected_keys(
    config: Mapping[str, Any], is_pieces: bool, file_type: int, template: str | None
) -> dict[str, Value]:
    name, rope = config["model_type"], config.get("rope_parameters") or config
    head_size = config["hidden_size"] // config["num_attention_heads"]
    keys: dict[str, Value] = {
        "general.architecture": name,
        "general.file_type": file_type,
        "general.quantization_version": 2,
        f"{name}.block_count": config["num_hidden_layers"],
        f"{name}.context_length": config["max_position_embeddings"],
        f"{name}.embedding_length": config["hidden_size"],
        f"{name}.feed_forward_length": config["intermediate_size"],
        f"{name}.attention.head_count": config["num_attention_heads"],
        f"{name}.attention.head_count_kv": config["num_key_value_heads"],
        f"{name}.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        f"{name}.rope.freq_base": rope["rope_theta"],
        f"{name}.vocab_size": config["vocab_size"],
        "tokenizer.ggml.model": "llama" if is_pieces else "gpt2",
        "tokenizer.ggml.pre": "default" if is_pieces else "qwen2",
        "tokenizer.ggml.add_bos_token": is_pieces,
        "tokenizer.ggml.bos_token_id": config["bos_token_id"],
        "tokenizer.ggml.eos_token_id": config["eos_token_id"],
    }
    if is_pieces:
        keys |= {"tokenizer.ggml.unknown_token_id": 0, "tokenizer.ggml.add_space_prefix": True}
        keys[f"{name}.rope.dimension_count"] = head_size
    else:
        # transformers pads texts of Qwen2's tokenizer with its end of text, which no file of the folder names.
        keys["tokenizer.ggml.padding_token_id"] = config["eos_token_id"]
    return keys if template is None else {**keys, "tokenizer.chat_template": template}


def _items(found: Mapping[str, Value], key: str) -> list[Value]:
    value = found.get(key)
    return value if isinstance(value, list) else []


def _same(found: Value | None, wanted: Value) -> bool:
    if isinstance(wanted, float):
        return isinstance(found, float) and np.float32(found) == np.float32(wanted)
    return type(found) is type(wanted) and found == wanted


def _differences(found: list[Value], wanted: list[Value]) -> int:
    pairs = sum(one != other for one, other in zip(found, wanted, strict=False))
    return pairs + abs(len(found) - len(wanted))


# --- a Hugging Face folder ---

# Parts of tokenizer.json on which ids depend, and keys of config.json on which generation does.
_PARTS = ("added_tokens", "normalizer", "pre_tokenizer", "decoder")
_KEYS = ("bos_token_id", "eos_token_id", "vocab_size", "max_position_embeddings", "tie_word_embeddings", "rms_norm_eps")


def _merge(pair: str | list[str]) -> str:
    return pair if isinstance(pair, str) else " ".join(pair)


def folder_table(folder: Path, source: Path) -> Table:
    """Return what an exported folder's tokenizer and config say otherwise than those of the student it came from."""
    ours, theirs = (read_json(at / "tokenizer.json") for at in (folder, source))
    config, wanted = (read_json(at / "config.json") for at in (folder, source))
    merges = [list(map(_merge, at["model"]["merges"])) for at in (ours, theirs)]
    keys = [key for key in _KEYS if config.get(key) != wanted.get(key)]
    parts = [part for part in _PARTS if ours.get(part) != theirs.get(part)]
    rope = [(at.get("rope_parameters") or at)["rope_theta"] for at in (config, wanted)]
    named = read_json(folder / "tokenizer_config.json")
    generation = folder / "generation_config.json"
    settings = read_json(generation) if generation.is_file() else {}
    return {
        "vocabulary is the same": ours["model"]["vocab"] == theirs["model"]["vocab"],
        "merges are the same": merges[0] == merges[1],
        "parts of the tokenizer that differ": ", ".join(parts) or "none",
        "added tokens of no special kind": sum(not added["special"] for added in ours["added_tokens"]),
        "begin and end of text": f"{named.get('bos_token')} {named.get('eos_token')}",
        "keys of the config that differ": ", ".join(keys) or "none",
        "rotary base is the same": rope[0] == rope[1],
        "tokens added to a text": _added_to_a_text(folder),
        "end token of generation": settings.get("eos_token_id", "absent"),
    }


def _added_to_a_text(folder: Path) -> int:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return len(tokenizer.encode("a b")) - len(tokenizer.encode("a b", add_special_tokens=False))
