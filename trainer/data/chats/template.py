"""Turns chats into tokens by the student's chat template, and finds which tokens are learnt.

Where the template marks generation (``{% generation %}``), what it marks is what the assistant said. Otherwise two
texts are rendered for a message: all up to its opened turn, and all up to its end; what the second adds is the message.
Both must be prefixes of the whole text, which is checked for each chat: some templates rewrite earlier turns.
"""

import datetime
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from q4kd.trainer.data.chats.renderer import ChatRenderer, RenderError, RewritingError
from q4kd.trainer.data.encoding import Encoded
from q4kd.trainer.errors import InputError

_MARKED = re.compile(r"\{%[-+]?\s{0,8}generation\s{0,8}[-+]?%\}")
# What a chat may bring that a template may not write. Of each row one name has to stand in the template.
_WRITTEN = (
    ("tools",),
    ("documents",),
    ("tool_calls",),
    ("function_call",),
    ("reasoning_content", "thinking", "reasoning"),
)


class ChatTemplate:
    """Renders chats with a tokenizer's template. Nothing is added after what the template writes.

    Args:
        tokenizer: a fast Hugging Face tokenizer with a chat template.
        completion_only: whether only what the assistant says (with the end of its turn) is learnt.
        date: the day on which the template is read, as ``2026-11-30``; today without it.
    """

    def __init__(self, tokenizer: Any, completion_only: bool, date: str | None = None) -> None:
        self._tokenizer, self._completion_only = tokenizer, completion_only
        self._date = date or datetime.date.today().isoformat()
        self._renderers: dict[str, ChatRenderer] = {}

    @property
    def writes_date(self) -> bool:
        """Return whether the template asks for the date."""
        return "strftime_now" in str(getattr(self._tokenizer, "chat_template", None) or "")

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        where: str,
        context: Mapping[str, Any] | None = None,
        learns: Sequence[bool | None] | None = None,
    ) -> Encoded:
        """Return a chat's tokens and which are learnt.

        Args:
            messages: messages with ``role`` and ``content``.
            where: name of the record.
            context: ``tools``, ``documents`` and ``variables`` that the template is given.
            learns: of each message whether it is learnt, where the record says so.

        Raises:
            InputError: naming ``where`` when there is no template, it refuses the chat, does not write what the chat
                brings, rewrites earlier turns, or takes too much time or memory.
        """
        template = getattr(self._tokenizer, "chat_template", None)
        if not isinstance(template, str):
            expected, got = "one chat template in the student's tokenizer", "several" if template else "none"
            raise _refuse(where, expected, got, "add chat_template.jinja to the student's folder")
        _check_written(template, messages, context or {}, where)
        request: dict[str, Any] = {**(context or {}), "messages": [dict(message) for message in messages]}
        chosen = [flag for flag in learns or () if flag is not None]
        if not self._completion_only and not chosen:
            text = self._render(template, request, where)["text"]
            return Encoded.make(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if not self._tokenizer.is_fast:
            expected = "a fast tokenizer, for labels on a part of a chat"
            raise _refuse(where, expected, type(self._tokenizer).__name__, "save the tokenizer as tokenizer.json")
        said = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        asked = [index for index, flag in enumerate(learns or ()) if flag is not None]
        if _MARKED.search(template):
            reply = self._render(template, {**request, "marked": True}, where)
            if asked and (len(reply["spans"]) != len(said) or not set(asked) <= set(said)):
                expected, got = (
                    "a marked turn for each message that has a weight",
                    f"{len(reply['spans'])} marked turns",
                )
                raise _refuse(where, expected, got, "give weights to the assistant's messages alone")
            turns = said if asked else list(range(len(reply["spans"])))
        else:
            turns = sorted({*asked, *(said if self._completion_only else ())})
            reply = self._render(template, {**request, "turns": turns}, where)
        flags = [None if not asked else (learns or ())[index] for index in turns]
        default = self._completion_only
        return self._with_labels(reply["text"], reply["spans"], [default if flag is None else flag for flag in flags])

    def _with_labels(self, text: str, spans: Sequence[tuple[int, int]], flags: Sequence[bool]) -> Encoded:
        """Return the tokens of a text; those that reach into a span are learnt or not as its flag says."""
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = np.array(found["offset_mapping"], np.int64).reshape(-1, 2)
        learnt = np.full(len(offsets), not self._completion_only)
        for (begin, end), flag in zip(spans, flags, strict=True):
            learnt[_reaching(offsets, begin, end)] = flag
        return Encoded.make(found["input_ids"], learnt)

    def _render(self, template: str, request: Mapping[str, Any], where: str) -> dict[str, Any]:
        if template not in self._renderers:
            self.close()
            special = getattr(self._tokenizer, "special_tokens_map", {})
            self._renderers = {template: ChatRenderer(template, special, self._date)}
        try:
            reply = self._renderers[template].render(request)
            reply["text"].encode()
        except UnicodeEncodeError as error:
            raise _refuse(where, "Unicode text", "half a surrogate pair", "mend or remove the record") from error
        except RewritingError as error:
            expected = "a chat template that only appends, or that marks {% generation %}, for labels on a part"
            remedy = "mark what the assistant says with {% generation %} in the template"
            raise _refuse(where, expected, str(error), remedy) from error
        except RenderError as error:
            expected, remedy = "messages that the student's chat template accepts", "mend or remove the record"
            raise _refuse(where, expected, str(error), remedy) from error
        return reply

    def close(self) -> None:
        """End the process that renders; the next chat starts another."""
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers = {}


def _reaching(offsets: npt.NDArray[np.int64], begin: int, end: int) -> npt.NDArray[np.bool_]:
    """Return which tokens hold a character of ``[begin, end)``; one without characters counts where it stands."""
    firsts, lasts = offsets[:, 0], offsets[:, 1]
    reaching: npt.NDArray[np.bool_] = (firsts < end) & ((firsts >= begin) | (lasts > begin))
    return reaching


def _check_written(
    template: str, messages: Sequence[Mapping[str, Any]], context: Mapping[str, Any], where: str
) -> None:
    """Refuse a chat that brings what the template does not write: it would be trained without it."""
    for names in _WRITTEN:
        brings = next((name for name in names if context.get(name) or any(part.get(name) for part in messages)), None)
        if brings is not None and not any(re.search(rf"\b{name}\b", template) for name in names):
            expected, got = f'a chat template that writes "{brings}"', "one that does not name it"
            remedy = f"use a template that does, or pass --ignore-fields {brings} to train without"
            raise _refuse(where, expected, got, remedy)


def _refuse(where: str, expected: str, got: str, remedy: str) -> InputError:
    return InputError(f"chat {where}", expected=expected, got=got, remedy=remedy)
