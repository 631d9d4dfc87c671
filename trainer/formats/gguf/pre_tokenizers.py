"""How byte-level tokenizers cut text before they merge pieces: llama.cpp's names, and the steps of tokenizer.json.

llama.cpp knows each by a name in ``tokenizer.ggml.pre`` (src/llama-vocab.cpp, llm_tokenizer_bpe), a file of the hub by
the steps of its tokenizer.json. The expressions are those of the models' own tokenizers: Qwen2 and 2.5 and 3; Qwen3.5;
Llama 3; cl100k (OLMo 2, Phi-4, GLM-4); o200k (gpt-oss, Phi-4-mini, Llama 4); Mistral NeMo; DeepSeek-V3. A name that is
not here is refused: under a wrong one the same text has other tokens, without an error.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from q4kd.trainer.errors import InputError

OTHERWISE = "name a Hugging Face folder with the same tokenizer: --tokenizer DIR"
SENTENCEPIECE, GEMMA4 = "llama", "gemma4"
PIECES = (SENTENCEPIECE, GEMMA4)  # Their spaces are "▁", and characters without a token are bytes.
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2_SPLIT = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
LLAMA3_SPLIT = QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
# Marks belong to words.
QWEN35_SPLIT = QWEN2_SPLIT.replace(r"]?\p{L}+", r"]?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_PATHS = _REST.replace(r"[\r\n]*", r"[\r\n/]*")
TEKKEN_SPLIT = rf"{_LEAD}{_UPPER}*{_LOWER}+|{_LEAD}{_UPPER}+{_LOWER}*|\p{{N}}|{_PATHS}"
O200K_SPLIT = (
    rf"{_LEAD}{_UPPER}*{_LOWER}+{_CONTRACTION}?|{_LEAD}{_UPPER}+{_LOWER}*{_CONTRACTION}?|\p{{N}}{{1,3}}|{_PATHS}"
)
DEEPSEEK_SPLITS = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+".replace(r"\"", '"'),
)


@dataclass(frozen=True)
class PreTokenizer:
    """A way of cutting text.

    Attributes:
        name: llama.cpp's name, which is written into files.
        splits: expressions whose matches are cut out, one after another.
        digits: whether every digit is cut out first.
        gpt2: whether the byte-level step cuts as GPT-2 does.
        composes: whether the models' own tokenizers compose characters (NFC); llama.cpp does not.
        whole_words: whether a piece that is a token is one, whatever its merges.
        also: other names of files that are cut so.
    """

    name: str
    splits: tuple[str, ...] = ()
    digits: bool = False
    gpt2: bool = False
    composes: bool = False
    whole_words: bool = False
    also: tuple[str, ...] = ()


PRE_TOKENIZERS = (
    PreTokenizer("gpt-2", gpt2=True, also=("phi-2", "olmo")),
    PreTokenizer("smollm", digits=True, gpt2=True, also=("refact", "starcoder")),
    PreTokenizer("qwen2", (QWEN2_SPLIT,), composes=True, also=("deepseek-r1-qwen",)),
    PreTokenizer("qwen35", (QWEN35_SPLIT,), composes=True),
    PreTokenizer("llama-bpe", (LLAMA3_SPLIT,), whole_words=True, also=("llama3", "llama-v3")),
    PreTokenizer("dbrx", (LLAMA3_SPLIT,), also=("glm4", "chatglm-bpe")),
    PreTokenizer("gpt-4o", (O200K_SPLIT,), also=("llama4",)),
    PreTokenizer("tekken", (TEKKEN_SPLIT,), whole_words=True),
    PreTokenizer("deepseek-v3", DEEPSEEK_SPLITS),
)
BY_NAME: Mapping[str, PreTokenizer] = {name: one for one in PRE_TOKENIZERS for name in (one.name, *one.also)}


def check_kind(subject: str, metadata: Mapping[str, Any]) -> None:
    """Refuse a tokenizer of a kind, or with a pre-tokenizer, that is not known here, and a file without one.

    Raises:
        InputError: naming both.
    """
    kind, pre, tokens = (metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre", "tokens"))
    if not ((kind in PIECES and tokens) or (kind == "gpt2" and str(pre) in BY_NAME)):
        expected = f"gpt2 with pre-tokenizer {', '.join(one.name for one in PRE_TOKENIZERS)}, or {' or '.join(PIECES)}"
        got = f"{repr(kind)[:40]} with {repr(pre)[:40]}"
        raise InputError(subject, expected=expected, got=got, remedy=OTHERWISE)


def steps(part: Mapping[str, Any] | None, inner: str) -> Iterator[Mapping[str, Any]]:
    """Yield the steps of a part of tokenizer.json, sequences (whose members are under ``inner``) flattened."""
    if part and part.get("type") == "Sequence":
        for step in part[inner]:
            yield from steps(step, inner)
    elif part:
        yield part


def find_pre_tokenizers(tokenizer: Mapping[str, Any]) -> list[PreTokenizer]:
    """Return the ways of cutting that the steps of a byte-level tokenizer.json are; none where llama.cpp has none.

    Those that take words as it does come first. Names of classes and models play no part.
    """
    cuts = list(steps(tokenizer.get("pre_tokenizer"), "pretokenizers"))
    normalizers = [step.get("type") for step in steps(tokenizer.get("normalizer"), "normalizers")]
    if not cuts or cuts[-1].get("type") != "ByteLevel" or any(cut.get("add_prefix_space") for cut in cuts):
        return []
    gpt2, digits, before = cuts[-1].get("use_regex", True), False, cuts[:-1]
    if before and before[0].get("type") == "Digits":
        digits, before = bool(before[0].get("individual_digits")), before[1:]
        if not digits:
            return []
    splits = [_expression(cut) for cut in before]
    whole_words = bool(tokenizer.get("model", {}).get("ignore_merges", False))
    found = [
        one
        for one in PRE_TOKENIZERS
        if (list(one.splits), one.digits, one.gpt2) == (splits, digits, gpt2)
        # What composes characters is read without it: for composed text it changes nothing.
        and normalizers in ([], *([["NFC"]] if one.composes else []))
    ]
    return sorted(found, key=lambda one: one.whole_words != whole_words)


def _expression(cut: Mapping[str, Any]) -> str | None:
    """Return the expression of a step that cuts its matches out; None for another step. Line ends are spelt out."""
    pattern = cut.get("pattern")
    if cut.get("type") != "Split" or cut.get("behavior") != "Isolated" or cut.get("invert"):
        return None
    expression = pattern.get("Regex") if isinstance(pattern, Mapping) else None
    return expression.replace("\r", r"\r").replace("\n", r"\n") if isinstance(expression, str) else None


def merges_reach(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], but: set[str]) -> bool:
    """Return whether every token of a BPE is what its merges make of its text: taking whole words then changes nothing.

    Args:
        vocab: ids by token.
        merges: pairs, first to last.
        but: tokens that are looked for in a text before it is cut.
    """
    from tokenizers import models

    bpe = models.BPE(vocab=dict(vocab), merges=list(merges))
    return all(token in but or len(bpe.tokenize(token)) == 1 for token in vocab)


def scores_join_alike(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], but: set[str]) -> bool:
    """Return whether a BPE's merges join the text of every token as SentencePiece does with the scores of a GGUF.

    It joins the two neighbours whose union is a token, whichever two they are, the token first that the earliest merge
    makes; a token that no merge makes comes before all others.

    Args:
        vocab: ids by token.
        merges: pairs, first to last.
        but: tokens that are looked for in a text before it is cut.
    """
    from tokenizers import models

    rank = {left + right: number for number, (left, right) in reversed([*enumerate(merges, start=1)])}
    found = [
        (rank.get(token, 0), vocab[token[:cut]], vocab[token[cut:]], token[:cut], token[cut:])
        for token in vocab
        if token not in but
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    own = models.BPE(vocab=dict(vocab), merges=list(merges))
    scored = models.BPE(vocab=dict(vocab), merges=[(left, right) for *_key, left, right in sorted(found)])
    ids = [[[part.id for part in bpe.tokenize(token)] for token in vocab if token not in but] for bpe in (own, scored)]
    return ids[0] == ids[1]
