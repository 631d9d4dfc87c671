"""Texts to tokens as a tokenizer means them: what begins a text, and how a completion goes on in its prompt.

A tokenizer that puts a begin-of-text token before every text (Llama, Mistral, Gemma) belongs to models that have seen
no text without one. SentencePiece puts a space before every text that it is given, so a completion that is tokenised
by itself is not the text that was written.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from q4kd.trainer.errors import InputError

Encode = Callable[[list[str]], list[list[int]]]
# A text before the completion, whose tokens are taken off again. Which one a tokenizer keeps apart is tried.
_LEADS = ("\n", "\x01", "=", "§")
_PROBES = ("a", "4", "(", "=", " a", "  a", "é")
# llama.cpp's defaults, where the file does not say: src/llama-vocab.cpp, llama_vocab::impl::load.
_BEGINS_WITHOUT_SAYING = (("llama", None), ("gpt2", "llama-bpe"), ("gpt2", "llama3"))


def begin_tokens(tokenizer: Any, setting: str) -> tuple[int, ...]:
    """Return the ids that are put before every text and prompt.

    Args:
        tokenizer: a Hugging Face tokenizer.
        setting: ``auto`` puts what the tokenizer's own encoding with special tokens does, ``true`` at least its
            begin-of-text token, ``false`` nothing.

    Raises:
        InputError: for ``true`` with a tokenizer that names no begin-of-text token.
    """
    if setting == "false":
        return ()
    bare = tokenizer("x", add_special_tokens=False, verbose=False)["input_ids"]
    whole = tokenizer("x", add_special_tokens=True, verbose=False)["input_ids"]
    own: list[int] = next((whole[:n] for n in range(len(whole)) if whole[n : n + len(bare)] == bare), [])
    if own or setting == "auto":
        return tuple(own)
    if tokenizer.bos_token_id is None:
        expected, remedy = "a tokenizer with a begin-of-text token", "set bos_token in tokenizer_config.json"
        raise InputError("setting begin_of_text true", expected=expected, got="one that names none", remedy=remedy)
    return (tokenizer.bos_token_id,)


def tokens_with_rows(tokenizer: Any, rows: int) -> dict[str, int]:
    """Return the token → id map of a tokenizer without special tokens that were added past the ``rows`` of a head.

    Gemma 3 has one for pictures, which its models of texts alone have no row for; a text that spells it is refused.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    past = {str(token) for index, token in added.items() if index >= rows and getattr(token, "special", False)}
    return {token: index for token, index in tokenizer.get_vocab().items() if token not in past}


def put_before(begin: Sequence[int], ids: Sequence[int]) -> list[int]:
    """Return ``ids`` after ``begin``, which is not put twice where a text spells it."""
    begun = list(ids[: len(begin)]) == list(begin)
    return list(ids) if begun else [*begin, *ids]


def file_begin(metadata: Mapping[str, Any]) -> int | None:
    """Return the id that a GGUF wants before every text, by its key or by llama.cpp's default; None for none."""
    kind, split = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    by_default = (kind, None if kind == "llama" else split) in _BEGINS_WITHOUT_SAYING
    adds = metadata.get("tokenizer.ggml.add_bos_token", by_default)
    index = metadata.get("tokenizer.ggml.bos_token_id")
    return index if adds is True and type(index) is int and index >= 0 else None


def describe_begin(tokenizer: Any, begin: Sequence[int], setting: str, metadata: Mapping[str, Any] | None) -> str:
    """Return what begins every text, and whether a teacher's file wants another; empty where nobody wants any.

    Args:
        tokenizer: the student's tokenizer.
        begin: ids that are put there.
        setting: ``begin_of_text`` of the run.
        metadata: metadata of the teacher's GGUF; None where there is none to ask.
    """
    wanted = None if metadata is None or "tokenizer.ggml.model" not in metadata else file_begin(metadata)
    names = " ".join(f"{tokenizer.convert_ids_to_tokens(index)} ({index})" for index in begin)
    why = "as the tokenizer puts it" if setting == "auto" else f"begin_of_text {setting}"
    said = f"begin of text: {names or 'none'}, before every text and prompt ({why})"
    if metadata is not None and "tokenizer.ggml.model" in metadata and wanted != (begin[0] if begin else None):
        token = "none" if wanted is None else f"{tokenizer.convert_ids_to_tokens(wanted)} ({wanted})"
        return f"{said}; the teacher's file wants {token}: begin_of_text true or false changes it"
    return said if begin or setting != "auto" else ""


def continuing(tokenizer: Any, encode: Encode) -> Encode:
    """Return a function from texts to the tokens with which they go on after another text.

    It is ``encode`` itself unless the tokenizer puts something before every text. The tokens are then those that
    follow a text whose own are taken off again.

    Raises:
        InputError: from that function, for a tokenizer that merges a text with each of those tried before it.
    """

    def said(pieces: Sequence[int]) -> str:
        return str(tokenizer.decode(list(pieces)))

    # A vocabulary without some character, or a decoder that gives back another text, says nothing of what goes before.
    base = next((probe for probe in _PROBES if said(encode([probe])[0]).lstrip(" ") == probe), "")
    probes = [probe for probe in _PROBES if base and said(encode([base + probe])[0]).lstrip(" ") == base + probe]

    def follows(pieces: Sequence[int], text: str) -> bool:
        return said([*encode([base])[0], *pieces]) == f"{base}{text}"

    if all(follows(encode([probe])[0], probe) for probe in probes):
        return encode
    leads = [lead for lead in _LEADS if all(follows(_after(encode, lead, p) or (), p) for p in probes)]

    def encode_continuations(texts: list[str]) -> list[list[int]]:
        return [_continue(encode, leads, text) for text in texts]

    return encode_continuations


def _after(encode: Encode, lead: str, text: str) -> list[int] | None:
    before, (both,) = encode([lead])[0], encode([lead + text])
    return both[len(before) :] if both[: len(before)] == before else None


def _continue(encode: Encode, leads: Sequence[str], text: str) -> list[int]:
    for lead in leads:
        if (found := _after(encode, lead, text)) is not None:
            return found
    expected, got = "a tokenizer that can go on in a text", f"one that puts something before {text[:20]!r}"
    raise InputError("completion", expected=expected, got=got, remedy="give prompt and completion as one text")
