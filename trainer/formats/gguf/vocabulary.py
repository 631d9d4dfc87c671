"""Writes the tokenizer of a tokenizer.json into a GGUF; one that a GGUF cannot describe truthfully is refused.

llama.cpp has names for three kinds of tokenizer, and for how each cuts text before it merges pieces:

    "gpt2"   byte-level BPE; ``tokenizer.ggml.pre`` names the split, one of ``pre_tokenizers.py``
    "llama"  SentencePiece BPE with byte fallback (Llama 2, Mistral 0.1 to 0.3, TinyLlama). llama.cpp joins the two
             neighbours whose union has the highest score, SentencePiece's score is minus the rank of the merge, and
             tokenizer.json keeps the ranks, so the scores come back from them
    "gemma4" pieces with byte fallback as in "llama", and merges of their own as in "gpt2" (Gemma 4); llama.cpp takes
             runs of line ends apart from all other text, and begins every text with the begin token
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import gguf

from q4kd.trainer.errors import InputError
from q4kd.trainer.formats.gguf.added_tokens import check_added
from q4kd.trainer.formats.gguf.pre_tokenizers import (
    GEMMA4,
    PIECES,
    PRE_TOKENIZERS,
    SENTENCEPIECE,
    find_pre_tokenizers,
    merges_reach,
    scores_join_alike,
    steps,
)

SPACE = "\u2581"  # SentencePiece writes a space as this character.
SPECIAL_ROLES = ("bos", "eos", "pad", "unk")
_AT_SPACES = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
_BYTE = re.compile("<0x..>", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """A tokenizer as transformers has it.

    Attributes:
        content: content of tokenizer.json.
        special_ids: ids by role, a name of ``SPECIAL_ROLES``.
        chat_templates: Jinja templates by name; the one that chat uses is "default".
    """

    content: Mapping[str, Any]
    special_ids: Mapping[str, int] = field(default_factory=dict)
    chat_templates: Mapping[str, str] = field(default_factory=dict)


def config_special_ids(settings: Mapping[str, Any]) -> dict[str, int]:
    """Return the begin and end ids that config.json names; of several end ids, the first."""
    found: dict[str, int] = {}
    for role in ("bos", "eos"):
        value = settings.get(f"{role}_token_id")
        if isinstance(value, list):
            value = value[0] if value else None
        if value is not None:
            found[role] = value
    return found


def pre_tokenizer_name(tokenizer: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for how tokenizer.json splits text, or one of ``PIECES``, by what its steps do.

    Raises:
        InputError: for any other, since a wrong name tokenises wrongly without an error.
    """
    model, normalizer = tokenizer.get("model", {}), tokenizer.get("normalizer")
    kinds = [step.get("type") for step in steps(tokenizer.get("pre_tokenizer"), "pretokenizers")]
    whole_words = bool(model.get("ignore_merges", False))
    added = {token["content"] for token in tokenizer.get("added_tokens", ())}
    if model.get("type") == "BPE" and model.get("byte_fallback"):
        if (prefix := _space_prefix(tokenizer)) is not None and not whole_words:
            if scores_join_alike(model["vocab"], merge_pairs(tokenizer), added):
                return SENTENCEPIECE
            if not prefix and adds_special(tokenizer, 0) and _keeps_line_ends_apart(tokenizer):
                return GEMMA4
            kinds.append("merges that no scores make")
    elif model.get("type") == "BPE" and (found := find_pre_tokenizers(tokenizer)):
        # llama.cpp takes a word that is a token before it looks at any merge, or it does not, as the name says.
        if found[0].whole_words == whole_words:
            return found[0].name
        if merges_reach(model["vocab"], merge_pairs(tokenizer), added):
            return found[0].name
        kinds.append("ignore_merges" if whole_words else "no ignore_merges")
    names = ", ".join(one.name for one in PRE_TOKENIZERS)
    raise InputError(
        "tokenizer.json",
        expected=f"a byte-level BPE that splits as {names}, or a SentencePiece BPE, or one like Gemma 4's",
        got=f"model {model.get('type')}, normalizer {(normalizer or {}).get('type')}, pre-tokenizer {kinds}",
        remedy="export this model with llama.cpp's convert_hf_to_gguf.py",
    )


def _space_prefix(tokenizer: Mapping[str, Any]) -> bool | None:
    """Return whether a SentencePiece BPE puts a space before a text; None where it treats spaces in another way.

    Older files say it with normalisers (prepend, then replace every space), newer ones with a Metaspace step.
    """
    cuts = list(steps(tokenizer.get("pre_tokenizer"), "pretokenizers"))
    normalizers = list(steps(tokenizer.get("normalizer"), "normalizers"))
    # Gemma cuts at spaces when its normaliser has left none.
    if not cuts or (normalizers and cuts == [_AT_SPACES]):
        replaced = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
        prepended = {"type": "Prepend", "prepend": SPACE}
        known = {1: ([replaced], False), 2: ([prepended, replaced], True)}
        expected, prefix = known.get(len(normalizers), (None, None))
        return prefix if normalizers == expected else None
    (cut, *more) = cuts
    if more or normalizers or cut.get("type") != "Metaspace" or cut.get("replacement") != SPACE or cut.get("split"):
        return None
    return bool(cut.get("prepend_scheme", "always") != "never")


def _keeps_line_ends_apart(tokenizer: Mapping[str, Any]) -> bool:
    """Return whether merges join line ends with nothing else, and make every run of them that is a token."""
    merges = merge_pairs(tokenizer)
    if any("\n" in left + right and (left + right).strip("\n") for left, right in merges):
        return False
    runs = {token: index for token, index in tokenizer["model"]["vocab"].items() if not token.strip("\n")}
    return merges_reach(runs, [pair for pair in merges if {*pair, "".join(pair)} <= runs.keys()], set())


def adds_special(tokenizer: Mapping[str, Any], end: int) -> bool:
    """Return whether tokenizer.json puts a special token before (``end`` 0) or after (``end`` -1) every text."""
    return any(
        "SpecialToken" in (step.get("single") or [{}])[end]
        for step in steps(tokenizer.get("post_processor"), "processors")
        if step.get("type") == "TemplateProcessing"
    )


def merge_pairs(tokenizer: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the merges of tokenizer.json, first to last; older files write a pair as one string."""
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in tokenizer["model"]["merges"])
    return [(str(left), str(right)) for left, right in pairs]


def add_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary, rows: int) -> None:
    """Write tokens, types, merges or scores, special ids and chat templates to a GGUF without a header yet.

    Of the embedding's ``rows``, those without a token are written as unused ``[PADn]``.

    Raises:
        InputError: for a tokenizer that llama.cpp would read differently, or one with more tokens than rows.
    """
    tokenizer = vocabulary.content
    pre = pre_tokenizer_name(tokenizer)
    by_id = {index: token for token, index in tokenizer["model"]["vocab"].items()}
    kinds = dict.fromkeys(by_id, gguf.TokenType.NORMAL)
    if pre in PIECES:
        kinds |= {index: gguf.TokenType.BYTE for index, token in by_id.items() if _BYTE.fullmatch(token)}
    chosen = added_tokens(tokenizer, rows)
    check_added(tokenizer, chosen)
    for added in chosen:
        by_id[added["id"]] = added["content"]
        kinds[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    if pre in PIECES and "unk" in vocabulary.special_ids:
        kinds[vocabulary.special_ids["unk"]] = gguf.TokenType.UNKNOWN
    highest = max([*by_id, *vocabulary.special_ids.values()], default=-1)
    if highest >= rows:
        expected, remedy = f"ids below vocab_size {rows}", "set vocab_size of config.json to the embedding's rows"
        raise InputError("tokenizer.json", expected=expected, got=str(highest), remedy=remedy)
    tokens = [by_id.get(index, f"[PAD{index}]") for index in range(rows)]
    writer.add_tokenizer_model(pre if pre in PIECES else "gpt2")
    writer.add_tokenizer_pre("default" if pre == SENTENCEPIECE else pre)
    writer.add_token_list(tokens)
    writer.add_token_types([int(kinds.get(index, gguf.TokenType.UNUSED)) for index in range(rows)])
    if pre in PIECES:
        writer.add_add_space_prefix(bool(_space_prefix(tokenizer)))
    if pre == SENTENCEPIECE:
        writer.add_token_scores(_scores(tokenizer, tokens))
    else:
        writer.add_token_merges([" ".join(pair) for pair in merge_pairs(tokenizer)])
    writer.add_add_bos_token(adds_special(tokenizer, 0))
    if adds_special(tokenizer, -1):
        writer.add_add_eos_token(True)
    for role, index in vocabulary.special_ids.items():
        getattr(writer, f"add_{role}_token_id")(index)
    if vocabulary.chat_templates:
        templates = vocabulary.chat_templates.items()
        writer.add_chat_template([{"name": name, "template": template} for name, template in templates])


def is_same_token(written: str, token: str) -> bool:
    """Return whether a GGUF's string is a token: llama.cpp's converter writes user-defined pieces with plain spaces."""
    return token in (written, written.replace(" ", SPACE))


def added_tokens(tokenizer: Mapping[str, Any], rows: int) -> list[Mapping[str, Any]]:
    """Return the added tokens of tokenizer.json, without special ones past the embedding's ``rows``.

    Gemma 3 has one for pictures, which its models of texts alone have no row for.
    """
    return [added for added in tokenizer.get("added_tokens", ()) if not added["special"] or added["id"] < rows]


def _scores(tokenizer: Mapping[str, Any], tokens: list[str]) -> list[float]:
    """Return minus the rank of the first merge that makes each token; 0 for what no merge makes."""
    rank: dict[str, int] = {}
    for number, (left, right) in enumerate(merge_pairs(tokenizer), start=1):
        rank.setdefault(left + right, number)
    return [-float(rank.get(token, 0)) for token in tokens]
