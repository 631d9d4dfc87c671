"""Tokenizers that cut text as those of published models do, each with a small vocabulary of its own.

The steps are those of the models' own tokenizer.json, written out here: nothing is taken from the trainer.
"""

import json
from typing import Any

from q4kd.harness.inputs.published.hard_text import hard_lines

_CASES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_QWEN2 = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CL100K = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN35 = r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
# llama.cpp's name: the model whose steps these are, its expressions, whether it composes, whether it takes whole words.
BYTE_LEVEL: dict[str, tuple[str, tuple[str, ...], bool, bool]] = {
    "qwen2": ("Qwen3", (_CASES + _QWEN2,), True, False),
    "qwen35": ("Qwen3.5", (_CASES + _QWEN35,), True, False),
    "llama-bpe": ("Llama 3", (_CASES + _CL100K,), False, True),
    "dbrx": ("OLMo 2", (_CASES + _CL100K,), False, False),
    "gpt-4o": ("gpt-oss", (_O200K,), False, False),
    "tekken": ("Mistral NeMo", (_TEKKEN,), False, True),
    "deepseek-v3": ("DeepSeek-V3", _DEEPSEEK, False, False),
    "gpt-2": ("GPT-2", (), False, False),
    "smollm": ("SmolLM and Granite", (), False, False),
}
PIECES = ("Llama 2", "Gemma 3", "Phi-3", "Gemma 4")
ADDED = ("<s>", "<|im_start|>", "<think>")
# Phi-3's added tokens, of which some take the spaces after them.
_PHI3 = ("<s>", "</s>", "<|endoftext|>", "<|assistant|>", "<|placeholder1|>", "<|end|>", "<|user|>")
_KEEP_SPACES = ("<unk>", "<s>", "<|endoftext|>")
_SPACE, _VOCAB, _TEXTS = "▁", 900, 1500


def _added(vocab: dict[str, int], texts: tuple[str, ...] = ADDED) -> list[dict[str, Any]]:
    """Return added tokens, of which one is not special; those that the vocabulary has keep their ids."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    ids = vocab | {text: len(vocab) + n for n, text in enumerate(text for text in texts if text not in vocab)}
    plain = "</s>" if "</s>" in texts else ADDED[-1]
    return [{"id": ids[text], "content": text, **flags, "special": text != plain} for text in texts]


def byte_level(name: str) -> dict[str, Any]:
    """Return the content of a tokenizer.json whose steps are those of the models of a name of ``BYTE_LEVEL``."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    _, splits, composes, whole_words = BYTE_LEVEL[name]
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole_words))
    steps: list[Any] = [pre_tokenizers.Split(Regex(split), behavior="isolated", invert=False) for split in splits]
    if name == "smollm":
        steps = [pre_tokenizers.Digits(individual_digits=True)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not splits)]
    )
    if composes:
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCAB, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(hard_lines(_TEXTS, 5), trainer=trainer)
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    if whole_words:  # A token that no merge makes, as Llama 3 has some, is one by being a whole word.
        content["model"]["merges"] = [pair for pair in content["model"]["merges"] if "".join(pair) != "Ġreturn"]
    content["added_tokens"] = _added(content["model"]["vocab"])
    return content


def pieces(name: str) -> dict[str, Any]:
    """Return the content of a tokenizer.json made of a SentencePiece model with byte fallback: a name of ``PIECES``."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="never")
    # Rare characters are left to the bytes.
    trainer = trainers.BpeTrainer(vocab_size=_VOCAB, limit_alphabet=200, show_progress=False)
    tokenizer.train_from_iterator(hard_lines(_TEXTS, 5), trainer=trainer)
    ids = tokenizer.get_vocab()
    # No piece looks like a part of a byte's name; its letters are pieces.
    learnt = [piece for piece in sorted(ids, key=ids.__getitem__) if len(piece) == 1 or not {*"<>"} & {*piece}]
    # An id says nothing of a score.
    tokens = dict.fromkeys(["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), _SPACE, *learnt[::-1]])
    vocab = {token: index for index, token in enumerate(tokens)}
    # SentencePiece joins any two neighbours that are a token together, the one of best score first.
    merges = [
        [token[:cut], token[cut:]]
        for token in learnt
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    if name == "Gemma 4":  # It has merges of its own, and runs of line ends.
        own = json.loads(tokenizer.to_str())["model"]["merges"]
        merges = [pair for pair in own if {*pair, "".join(pair)} <= vocab.keys() and "\n" not in "".join(pair)]
        runs = ["\n" * length for length in range(1, 6)]
        vocab |= {run: len(vocab) + number for number, run in enumerate(run for run in runs if run not in vocab)}
        merges += [[runs[left], runs[whole - left - 1]] for whole in range(1, len(runs)) for left in range(whole)]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prepend = {"type": "Prepend", "prepend": _SPACE}
    at_spaces = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    options = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "ignore_merges": False}
    is_gemma, added = name.startswith("Gemma"), _added(vocab, _PHI3 if name == "Phi-3" else ADDED)
    added = [{**added[0], "id": 0, "content": "<unk>"}, *added]
    if name == "Phi-3":
        added = [{**one, "rstrip": one["content"] not in _KEEP_SPACES} for one in added]
    begin, text = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    begins = {"<s>": {"id": "<s>", "ids": [added[1]["id"]], "tokens": ["<s>"]}}
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": replace if is_gemma else {"type": "Sequence", "normalizers": [prepend, replace]},
        "pre_tokenizer": at_spaces if is_gemma else None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, text],
            "pair": [begin, text, text],
            "special_tokens": begins,
        },
        "model": {"type": "BPE", **options, "vocab": vocab, "merges": merges},
    }
