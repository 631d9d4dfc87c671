"""Makes a tokenizer of the ``tokenizers`` library from what a GGUF holds: the inverse of ``gguf/vocabulary.py``."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, TypeGuard

import gguf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from q4kd.trainer.errors import InputError
from q4kd.trainer.formats.gguf.added_tokens import KEEP_SPACES, takes_spaces_after
from q4kd.trainer.formats.gguf.metadata import MetadataArray
from q4kd.trainer.formats.gguf.pre_tokenizers import (
    BY_NAME,
    GEMMA4,
    OTHERWISE,
    SENTENCEPIECE,
    PreTokenizer,
    check_kind,
)
from q4kd.trainer.formats.gguf.vocabulary import SPACE
from q4kd.trainer.formats.model_file import ModelFile

# Longer pieces, in characters, are not taken apart; SentencePiece's own limit is 16, runs of spaces come to 32.
_MAX_PIECE = 256
# Gemma's 262,144 pieces have 1.5 million characters and are made by 513,511 merges. 1.7 million took 11 s and 0.9 GB.
_MAX_CHARACTERS, _MAX_MERGES = 8_000_000, 2_000_000
# Gemma's runs of spaces are user-defined, and merged from single ones all the same.
_MERGED = (gguf.TokenType.NORMAL, gguf.TokenType.USER_DEFINED)


def read_tokenizer(model: ModelFile) -> Tokenizer:
    """Return the tokenizer of a GGUF. It adds no special tokens; those that a text spells are recognised.

    Raises:
        InputError: when the file holds none, or one whose way of splitting text is not known here.
    """
    types, subject = model.metadata.get("tokenizer.ggml.token_type"), f"{model.path}: tokenizer"
    check_kind(subject, model.metadata)
    kind = model.metadata["tokenizer.ggml.model"]
    if not _is_array(types) or len(types) != len(model.tokens):
        types = [int(gguf.TokenType.NORMAL)] * len(model.tokens)
    used = enumerate(zip(model.tokens, types, strict=True))
    vocab = {token: index for index, (token, of_token) in used if of_token != gguf.TokenType.UNUSED}
    try:
        if kind == SENTENCEPIECE:
            tokenizer = _sentencepiece(model, vocab, types)
        elif kind == GEMMA4:
            tokenizer = _pieces(model, vocab, _listed_merges(model, vocab), types)
        else:
            tokenizer = _byte_level(model, vocab, BY_NAME[str(model.metadata["tokenizer.ggml.pre"])])
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        expected = "tokens and merges that fit together"
        raise InputError(subject, expected=expected, got=str(error)[:120], remedy=OTHERWISE) from error
    special = (gguf.TokenType.CONTROL, gguf.TokenType.UNKNOWN)
    is_phi3 = takes_spaces_after(model.metadata, model.tokens)
    for kinds, is_special in ((special, True), ((gguf.TokenType.USER_DEFINED,), False)):
        chosen = [token for token, of_token in zip(model.tokens, types, strict=True) if of_token in kinds]
        added = [
            AddedToken(token, special=is_special, normalized=False, rstrip=is_phi3 and token not in KEEP_SPACES)
            for token in chosen
            if token and not (kind == SENTENCEPIECE and _is_run(token, gguf.TokenType.USER_DEFINED))
        ]
        # All at once: the library goes over every added token at each call.
        (tokenizer.add_special_tokens if is_special else tokenizer.add_tokens)(added)
    return tokenizer


def _is_run(token: str, of_token: int) -> bool:
    """Return whether a token is several spaces, which SentencePiece has as one of its pieces."""
    return bool(of_token == gguf.TokenType.USER_DEFINED and len(token) > 1 and not token.strip(" "))


def _is_array(value: object) -> TypeGuard[Sequence[Any]]:
    """Return whether metadata are an array, of a GGUF or of another container's JSON."""
    return isinstance(value, list | tuple | MetadataArray)


def _listed_merges(model: ModelFile, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Return the merges that a file lists, first to last."""
    listed = model.metadata.get("tokenizer.ggml.merges")
    pairs = [str(merge).partition(" ")[::2] for merge in listed] if _is_array(listed) else []
    merges = [(left, right) for left, right in pairs if {left, right, left + right} <= vocab.keys()]
    if len(merges) < len(pairs) or not merges:
        raise ValueError(f"{len(pairs) - len(merges)} of {len(pairs)} merges name no tokens")
    return merges


def _byte_level(model: ModelFile, vocab: dict[str, int], pre: PreTokenizer) -> Tokenizer:
    merges = _listed_merges(model, vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre.whole_words))
    steps: list[Any] = []
    if pre.digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    steps += [pre_tokenizers.Split(Regex(split), behavior="isolated", invert=False) for split in pre.splits]
    if pre.composes:
        tokenizer.normalizer = normalizers.NFC()
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.gpt2))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(model: ModelFile, vocab: dict[str, int], types: Sequence[int]) -> Tokenizer:
    """Rebuild the merges from the scores: two pieces join into a third, the one of highest score first."""
    scores = model.metadata.get("tokenizer.ggml.scores")
    if not _is_array(scores) or len(scores) != len(model.tokens):
        raise ValueError("no score for each token")
    # llama.cpp's converter writes runs of spaces as they are, without their scores: they come before everything else.
    runs = {token.replace(" ", SPACE): index for token, index in vocab.items() if _is_run(token, types[index])}
    vocab = {token: index for token, index in vocab.items() if not _is_run(token, types[index])} | runs
    normal = {token: index for token, index in vocab.items() if types[index] in _MERGED}
    ranks = {token: -math.inf if token in runs else -scores[index] for token, index in normal.items()}
    pieces = [(token, rank) for token, rank in ranks.items() if len(token) <= _MAX_PIECE]
    if (count := sum(len(token) for token, _rank in pieces)) > _MAX_CHARACTERS:
        raise ValueError(f"pieces of {count:,} characters together")
    every = (
        (rank, normal[token[:cut]], normal[token[cut:]], token[:cut], token[cut:])
        for token, rank in pieces
        for cut in range(1, len(token))
        if token[:cut] in normal and token[cut:] in normal
    )
    found = list(itertools.islice(every, _MAX_MERGES + 1))
    if len(found) > _MAX_MERGES:
        raise ValueError(f"more than {_MAX_MERGES:,} merges")
    return _pieces(model, vocab, [(left, right) for *_key, left, right in sorted(found)], types)


def _pieces(model: ModelFile, vocab: dict[str, int], merges: list[tuple[str, str]], types: Sequence[int]) -> Tokenizer:
    """Return a BPE of pieces whose spaces are ``SPACE``, and whose bytes stand for what has no token."""
    unknown = next((token for token, index in vocab.items() if types[index] == gguf.TokenType.UNKNOWN), None)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    steps: list[Any] = [normalizers.Replace(" ", SPACE)]
    is_gemma4 = model.metadata.get("tokenizer.ggml.model") == GEMMA4
    if not is_gemma4 and model.metadata.get("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, normalizers.Prepend(SPACE))
    tokenizer.normalizer = normalizers.Sequence(steps)
    return tokenizer
