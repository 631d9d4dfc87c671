"""A small Llama with a SentencePiece vocabulary: bytes, an unknown token, merges, added tokens, and rows of padding."""

import json
import string
from pathlib import Path

import numpy as np

SPACE = "\u2581"
MERGES = [(SPACE, "a"), ("t", "h"), ("th", "e"), (SPACE, "the"), ("i", "n"), ("e", "r"), (SPACE, "t"), ("in", "er")]
ADDED, PADDING_ROWS = "<tool>", 5


def write_sentencepiece_llama(folder: Path) -> None:
    """Write config.json, tokenizer.json and model.safetensors of a Llama of one layer with random weights."""
    from safetensors.numpy import save_file

    folder.mkdir()
    special = ["<unk>", "<s>", "</s>"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), SPACE, *string.ascii_lowercase]
    tokens += list(dict.fromkeys(left + right for left, right in MERGES))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": index, "content": token, **flags, "special": True} for index, token in enumerate(special)]
    added.append({"id": len(tokens), "content": ADDED, **flags, "special": False})
    begin, text = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    begins = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, text],
            "pair": [begin, text, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": begins,
        },
        "decoder": None,
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [list(pair) for pair in MERGES],
        },
    }
    rows, hidden, ffn, kv_size = len(tokens) + 1 + PADDING_ROWS, 32, 64, 16
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": rows,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    for name, content in (
        ("tokenizer.json", tokenizer),
        ("config.json", config),
        ("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **named}),
    ):
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    rng, layer = np.random.default_rng(3), "model.layers.0."
    shapes = {"model.embed_tokens": (rows, hidden), "model.norm": (hidden,)}
    attention = {"q": (hidden, hidden), "k": (kv_size, hidden), "v": (kv_size, hidden), "o": (hidden, hidden)}
    shapes |= {f"{layer}self_attn.{name}_proj": shape for name, shape in attention.items()}
    feed_forward = {"gate": (ffn, hidden), "up": (ffn, hidden), "down": (hidden, ffn)}
    shapes |= {f"{layer}mlp.{name}_proj": shape for name, shape in feed_forward.items()}
    shapes |= {f"{layer}{name}_layernorm": (hidden,) for name in ("input", "post_attention")}
    weights = {f"{name}.weight": rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
