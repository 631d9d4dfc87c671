"""Turns chats into tokens by the student's chat template, and finds which tokens the assistant said.

Where the template marks generation (``{% generation %}``), transformers returns the mask. Otherwise two texts are
rendered for an assistant message: all up to its opened turn, and all up to its end; what the second adds is the
message. Both must be prefixes of the whole text, which is checked for each chat: some templates rewrite earlier turns.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from q4kd.trainer.data.encoding import Encoded
from q4kd.trainer.errors import InputError

_MARKED = re.compile(r"\{%-?\s{0,8}generation\s{0,8}-?%\}")


class ChatTemplate:
    """Renders chats with a tokenizer's template. Nothing is added after what the template writes.

    Args:
        tokenizer: a fast Hugging Face tokenizer with a chat template.
        completion_only: whether only what the assistant says (with the end of its turn) is learnt.
    """

    def __init__(self, tokenizer: Any, completion_only: bool) -> None:
        self._tokenizer, self._completion_only = tokenizer, completion_only

    def encode(self, messages: Sequence[Mapping[str, Any]], where: str) -> Encoded:
        """Return a chat's tokens and which are learnt.

        Raises:
            InputError: naming ``where`` when there is no template, it refuses the chat, or it rewrites earlier turns.
        """
        template = getattr(self._tokenizer, "chat_template", None)
        if not isinstance(template, str):
            expected, got = "one chat template in the student's tokenizer", "several" if template else "none"
            raise _refuse(where, expected, got, "add chat_template.jinja to the student's folder")
        if self._completion_only and _MARKED.search(template):
            found = self._render(messages, where, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
            return Encoded.make(found["input_ids"], np.array(found["assistant_masks"], bool))
        text = self._render(messages, where, tokenize=False)
        if not self._completion_only:
            return Encoded.make(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if not self._tokenizer.is_fast:
            expected = "a fast tokenizer, or {% generation %} in its template, for completion_only"
            raise _refuse(where, expected, type(self._tokenizer).__name__, "save the tokenizer as tokenizer.json")
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        firsts = np.array([first for first, _ in found["offset_mapping"]], np.int64)
        learnt = np.zeros(len(firsts), bool)
        for begin, end in self._assistant_spans(messages, text, where):
            learnt |= (firsts >= begin) & (firsts < end)
        return Encoded.make(found["input_ids"], learnt)

    def _assistant_spans(self, messages: Sequence[Mapping[str, Any]], text: str, where: str) -> list[tuple[int, int]]:
        """Return the characters ``[begin, end)`` of each assistant turn in the whole text."""
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:index], where, tokenize=False, add_generation_prompt=True) if index else ""
            upto = self._render(messages[: index + 1], where, tokenize=False)
            if not upto.startswith(before) or not text.startswith(upto):
                expected = "a chat template that only appends, or that marks {% generation %}, for completion_only"
                remedy = "mark what the assistant says with {% generation %} in the template"
                raise _refuse(where, expected, f"one that writes message {index + 1} in two ways", remedy)
            spans.append((len(before), len(upto)))
        return spans

    def _render(self, messages: Sequence[Mapping[str, Any]], where: str, **options: Any) -> Any:
        from jinja2 import TemplateError

        try:
            return self._tokenizer.apply_chat_template([dict(message) for message in messages], **options)
        except (TemplateError, ValueError, TypeError, KeyError, IndexError) as error:
            reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
            expected, remedy = "messages that the student's chat template accepts", "mend or remove the record"
            raise _refuse(where, expected, reason, remedy) from error


def _refuse(where: str, expected: str, got: str, remedy: str) -> InputError:
    return InputError(f"chat {where}", expected=expected, got=got, remedy=remedy)
