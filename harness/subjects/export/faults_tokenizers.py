"""Faults in tokenizers of GGUF files: named by less than what they do, or read back as another of their kind."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from q4kd.harness.runs.faults import Call, patch

if TYPE_CHECKING:
    from q4kd.trainer.formats.gguf.pre_tokenizers import PreTokenizer

_FIND = "q4kd.trainer.formats.gguf.pre_tokenizers:find_pre_tokenizers"
_SPACES = "q4kd.trainer.formats.gguf.added_tokens:takes_spaces_after"
_NAME = "q4kd.trainer.formats.gguf.added_tokens:name_for"
_SCORES = "q4kd.trainer.formats.gguf.pre_tokenizers:scores_join_alike"
_BYTE_LEVEL = "q4kd.trainer.formats.gguf.tokenizer:_byte_level"


@patch("vocabulary", "split-by-its-digits", "a split is named by how it cuts digits alone", _FIND)
def _by_digits(_original: Call, tokenizer: Mapping[str, Any]) -> "list[PreTokenizer]":
    from q4kd.trainer.formats.gguf.pre_tokenizers import BY_NAME

    cuts = str(tokenizer["pre_tokenizer"])
    name = "llama-bpe" if "{1,3}" in cuts else "qwen2" if "Split" in cuts else "smollm" if "Digits" in cuts else "gpt-2"
    whole_words = tokenizer["model"]["ignore_merges"]
    return [dataclasses.replace(BY_NAME[name], whole_words=whole_words)]


@patch("vocabulary", "whole-words-merged", "a word that is a token is taken apart and merged", _BYTE_LEVEL)
def _merged(original: Callable[..., object], model: object, vocab: object, pre: "PreTokenizer") -> object:
    return original(model, vocab, dataclasses.replace(pre, whole_words=False))


@patch("vocabulary", "marks-not-composed", "texts are read as they come, and characters are not composed", _BYTE_LEVEL)
def _not_composed(original: Callable[..., object], model: object, vocab: object, pre: "PreTokenizer") -> object:
    return original(model, vocab, dataclasses.replace(pre, composes=False))


@patch("vocabulary", "spaces-after-kept", "added tokens of Phi-3 leave the spaces after them to the text", _SPACES)
def _spaces_kept(_original: Call, _metadata: object, _tokens: object) -> bool:
    return False


@patch("vocabulary", "name-of-phi3-left-out", "a file whose added tokens take spaces is named as any other", _NAME)
def _unnamed(_original: Call, title: str, _tokenizer: object) -> str:
    return title


@patch("vocabulary", "merges-taken-for-scores", "merges that no scores make are written as scores", _SCORES)
def _any_merges(_original: Call, _vocab: object, _merges: object, _but: object) -> bool:
    return True
