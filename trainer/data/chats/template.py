"""Turns chats into tokens by the student's chat template, and finds which tokens are learnt.

Where the template marks generation (``{% generation %}``), what it marks is what the assistant said. Otherwise two
texts are rendered for a message: all up to its opened turn, and all up to its end; what the second adds is the message.
A chat whose template writes earlier turns anew is several examples (see ``turns.py``).
"""

import datetime
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from q4kd.trainer.data.chats.renderer import ChatRenderer, RenderError, RewritingError, checked
from q4kd.trainer.data.documents import Document
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

# So many chats, or so many bytes of them, are rendered at once.
_BATCH, _BATCH_BYTES = 64, 1 << 20


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
        # Replies that were asked for together, by the identity of a document's messages.
        self._ready: dict[int, dict[str, Any]] = {}

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        where: str,
        context: Mapping[str, Any] | None = None,
        learns: Sequence[bool | None] | None = None,
    ) -> list[Encoded]:
        """Return the examples of a chat: tokens and which are learnt.

        Every message is learnt in one example at most; one is enough unless the template rewrites earlier turns.

        Args:
            messages: messages with ``role`` and ``content``.
            where: name of the record.
            context: ``tools``, ``documents`` and ``variables`` that the template is given.
            learns: of each message whether it is learnt, where the record says so.

        Raises:
            InputError: naming ``where`` when there is no template, it refuses the chat, does not write what the chat
                brings, opens an answer so that this one does not go on from there, or takes too much time or memory.
        """
        template = getattr(self._tokenizer, "chat_template", None)
        if not isinstance(template, str):
            expected, got = "one chat template in the student's tokenizer", "several" if template else "none"
            raise _refuse(where, expected, got, "add chat_template.jinja to the student's folder")
        _check_written(template, messages, context or {}, where)
        asked = [index for index, flag in enumerate(learns or ()) if flag is not None]
        request = self._request(template, messages, context, learns)
        examples = self._render(template, request, where, self._ready.pop(id(messages), None))["examples"]
        if not self._completion_only and not asked and len(examples) == 1:
            text = examples[0]["text"]
            return [Encoded.make(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])]
        if not self._tokenizer.is_fast:
            expected = "a fast tokenizer, for labels on a part of a chat"
            raise _refuse(where, expected, type(self._tokenizer).__name__, "save the tokenizer as tokenizer.json")
        if asked and request.get("marked"):
            marked = [index for example in examples for index in example["turns"] or ()]
            if None in [example["turns"] for example in examples] or not set(asked) <= set(marked):
                expected, got = "a marked turn for each message that has a weight", "other marked turns"
                raise _refuse(where, expected, got, "give weights to the assistant's messages alone")
        return [
            self._with_labels(example, learns if asked else None, (n, len(examples)))
            for n, example in enumerate(examples)
        ]

    def _request(
        self,
        template: str,
        messages: Sequence[Mapping[str, Any]],
        context: Mapping[str, Any] | None,
        learns: Sequence[bool | None] | None,
    ) -> dict[str, Any]:
        """Return what the renderer is asked for a chat, with the messages whose characters are to be found."""
        request: dict[str, Any] = {**(context or {}), "messages": [dict(message) for message in messages]}
        asked = {index for index, flag in enumerate(learns or ()) if flag is not None}
        if (self._completion_only or asked) and _MARKED.search(template):
            return {**request, "marked": True}
        if self._completion_only:
            asked |= {index for index, message in enumerate(messages) if message["role"] == "assistant"}
        return {**request, "turns": sorted(asked), "whole": not self._completion_only}

    def prepare(self, documents: Iterable[Document]) -> None:
        """Render several chats at once; each is refused when it is encoded."""
        template = getattr(self._tokenizer, "chat_template", None)
        self._ready = {}
        if not isinstance(template, str):
            return
        group: list[tuple[int, dict[str, Any]]] = []
        size = 0
        for document in documents:
            if document.messages is None or document.num_bytes > _BATCH_BYTES:
                continue
            request = self._request(template, document.messages, document.context, document.learns)
            group.append((id(document.messages), request))
            size += document.num_bytes
            if len(group) == _BATCH or size > _BATCH_BYTES:
                self._render_all(template, group)
                group, size = [], 0
        self._render_all(template, group)

    def _render_all(self, template: str, group: Sequence[tuple[int, dict[str, Any]]]) -> None:
        if len(group) > 1:
            replies = self._renderer(template).render_all([request for _, request in group])
            self._ready.update(zip([key for key, _ in group], replies, strict=False))

    def _with_labels(
        self, example: Mapping[str, Any], learns: Sequence[bool | None] | None, part: tuple[int, int]
    ) -> Encoded:
        """Return the tokens of an example.

        Those that reach into a span are learnt unless ``learns`` says otherwise of its message, and what is before
        ``fresh`` was learnt in an earlier example.
        """
        found = self._tokenizer(example["text"], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = np.array(found["offset_mapping"], np.int64).reshape(-1, 2)
        learnt = (offsets[:, 0] >= example["fresh"]) & (not self._completion_only)
        for number, (begin, end) in enumerate(example["spans"]):
            learnt[_reaching(offsets, begin, end)] = learns is None or learns[example["turns"][number]] is not False
        return Encoded.make(found["input_ids"], learnt, part)

    def _renderer(self, template: str) -> ChatRenderer:
        if template not in self._renderers:
            self.close()
            special = getattr(self._tokenizer, "special_tokens_map", {})
            self._renderers = {template: ChatRenderer(template, special, self._date)}
        return self._renderers[template]

    def _render(
        self, template: str, request: Mapping[str, Any], where: str, ready: dict[str, Any] | None
    ) -> dict[str, Any]:
        try:
            reply = self._renderer(template).render(request) if ready is None else checked(ready)
            for example in reply["examples"]:
                example["text"].encode()
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
        self._renderers, self._ready = {}, {}


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
