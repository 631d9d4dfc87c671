"""Added tokens and the spaces beside them: what tokenizer.json says, and what llama.cpp does.

A GGUF has no place for the flags of an added token. llama.cpp goes by the name of the model instead (``general.name``;
src/llama-vocab.cpp, the end of ``llama_vocab::impl::load``). It finds added tokens in a text as it came, also within a
word. Those of a model that is named Phi-3 take the spaces after them, all but three; those of any other take none.
What is a space differs: llama.cpp takes those of ASCII, and the tokenizers library all that Unicode has.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from q4kd.trainer.errors import InputError

_PHI3 = re.compile("phi-?3", re.IGNORECASE)
# In a model of this name llama.cpp gives "[MASK]" the spaces before it.
_MODERN_BERT = re.compile("modern-bert", re.IGNORECASE)
# These keep the spaces after them in Phi-3. llama.cpp does not load a file of that name without them, or without </s>.
KEEP_SPACES = frozenset({"<unk>", "<s>", "<|endoftext|>"})
_OF_PHI3 = KEEP_SPACES | {"</s>"}
_ONLY_PHI3 = _OF_PHI3 | {"<|placeholder1|>", "<|assistant|>"}


def takes_spaces_after(metadata: Mapping[str, Any], tokens: Sequence[str]) -> bool:
    """Return whether added tokens of a GGUF take the spaces after them, all but ``KEEP_SPACES``.

    They do in files of Phi-3. llama.cpp's converter writes "Phi 3" into the name, by which llama.cpp does not know it:
    the vocabulary tells.
    """
    if _PHI3.search(str(metadata.get("general.name"))):
        return True
    return metadata.get("general.architecture") == "phi3" and {*tokens} >= _ONLY_PHI3


def name_for(title: str, tokenizer: Mapping[str, Any]) -> str:
    """Return the name for a file, the title if it can be: one by which llama.cpp reads added tokens as they are meant.

    Args:
        title: what the model is called.
        tokenizer: content of tokenizer.json, which ``check_added`` has passed.
    """
    if any(added.get("rstrip") for added in tokenizer.get("added_tokens", ())):
        return title if _PHI3.search(title) else f"{title} (Phi-3)"
    return _MODERN_BERT.sub("ModernBERT", _PHI3.sub("Phi 3", title))


def check_added(tokenizer: Mapping[str, Any], added: Sequence[Mapping[str, Any]]) -> None:
    """Refuse added tokens that llama.cpp would find elsewhere in a text than the tokenizer does.

    Args:
        tokenizer: content of tokenizer.json.
        added: those of its added tokens that the file has.

    Raises:
        InputError: naming the token and its flag.
    """
    texts = {one["content"] for one in added}
    taking = {one["content"] for one in added if one.get("rstrip")}
    is_phi3 = texts >= _OF_PHI3 and taking == texts - KEEP_SPACES
    for one in added:
        for flag in ("lstrip", "single_word", *(() if is_phi3 else ("rstrip",))):
            if one.get(flag):
                raise _refuse(one, flag)
        if one.get("normalized") and _normalized(tokenizer, one["content"]) != one["content"]:
            raise _refuse(one, "normalized")


def _normalized(tokenizer: Mapping[str, Any], text: str) -> str:
    """Return what the normalizer of a tokenizer.json makes of a text."""
    from tokenizers import Tokenizer

    if not (normalizer := tokenizer.get("normalizer")):
        return text
    model = {"type": "BPE", "vocab": {}, "merges": []}
    found = Tokenizer.from_str(json.dumps({"version": "1.0", "normalizer": normalizer, "model": model})).normalizer
    return str(found.normalize_str(text)) if found else text


def _refuse(added: Mapping[str, Any], flag: str) -> InputError:
    expected, got = f"added tokens without {flag}", f"added token {added['content'][:40]!r} with {flag}"
    if flag == "rstrip":
        expected += ", or with it all but <unk>, <s> and <|endoftext|>, as Phi-3 has them"
    remedy = f"set {flag} to false if the model does without: llama.cpp would find this token in other places"
    return InputError("tokenizer.json", expected=expected, got=got, remedy=remedy)
