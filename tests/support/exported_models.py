"""Hugging Face folders to export: a random model that is alive in every part, and a tokenizer of every kind."""

import argparse
import functools
import json
import textwrap
from pathlib import Path
from typing import Any

from architecture_models import CASES, make_model
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from q4kd.trainer.formats.gguf.pre_tokenizers import LLAMA3_SPLIT, QWEN2_SPLIT
from q4kd.trainer.formats.gguf.vocabulary import SPACE
from q4kd.trainer.student.model import quiet_transformers

VOCAB = 640
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SPECIAL = ["<unk>", "<s>", "</s>", "<|end|>", "<pad>"]
# Architecture and tokenizer of each folder.
FOLDERS = {
    "qwen2": ("qwen2", "qwen2"),
    "qwen2-tied": ("qwen2-tied", "qwen2"),
    "qwen3": ("qwen3", "qwen2"),
    "llama": ("llama", "llama-bpe"),
    "llama3-tied": ("llama3-tied", "gpt-2"),
    "smollm": ("llama", "smollm"),
    "mistral": ("mistral", "llama"),
}
TEXTS = (
    "def export(path, *, out=None):\n    return f'{path!r} → {out}'  # 12345 tokens, don't stop",
    "  two  spaces\t\ttabs\n\n\nand lines \r\n",
    "Grüße aus Zürich, naïve café — 東京 🎉 ½",
    "",
    "x",
)


def _texts() -> list[str]:
    modules: tuple[Any, ...] = (argparse, textwrap, functools)
    return [Path(module.__file__).read_text() for module in modules]


@functools.cache
def make_backend(kind: str) -> Tokenizer:
    """Train a BPE that splits as llama.cpp's pre-tokenizer of that name does."""
    if kind == "llama":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
        tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
        # Words only while training; SentencePiece has no other cut.
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="never")
        special = [*SPECIAL, *[f"<0x{byte:02X}>" for byte in range(256)]]
        alphabet = []
    else:
        tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "llama-bpe"))
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind in ("gpt-2", "smollm"))
        first = {
            "qwen2": [pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated", invert=False)],
            "llama-bpe": [pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated", invert=False)],
            "smollm": [pre_tokenizers.Digits(individual_digits=True)],
            "gpt-2": [],
        }[kind]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, level]) if first else level
        if kind == "qwen2":
            tokenizer.normalizer = normalizers.NFC()
        tokenizer.decoder = decoders.ByteLevel()
        special, alphabet = SPECIAL, pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 8, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_texts(), trainer=trainer)
    return tokenizer


def write_folder(folder: Path, name: str, **sizes: int) -> Path:
    """Write model, tokenizer and generation config; the vocabulary leaves the last rows of the model unused."""
    quiet_transformers()
    case, kind = FOLDERS[name]
    ids = {"bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 4}
    model = make_model(CASES[case], vocab_size=VOCAB, **ids, **sizes)
    model.generation_config.update(**ids)
    model.save_pretrained(folder)
    backend = make_backend(kind)
    if kind == "llama":
        # The byte tokens are ordinary ones, and nothing cuts a text, as in Llama 2's own file.
        content = json.loads(backend.to_str())
        content["pre_tokenizer"] = None
        content["added_tokens"] = [added for added in content["added_tokens"] if not added["content"].startswith("<0x")]
        step = {"SpecialToken": {"id": "<s>", "type_id": 0}}
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [step, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [step, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        }
        backend = Tokenizer.from_str(json.dumps(content))
    names = {"bos_token": "<s>", "eos_token": "<|end|>", "pad_token": "<pad>"}
    if kind == "llama":
        names["unk_token"] = "<unk>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder
