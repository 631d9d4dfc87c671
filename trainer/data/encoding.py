"""Documents to tokens, and which of them are learnt."""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from q4kd.trainer.data.documents import Document
from q4kd.trainer.data.tokenizing import Encode, put_before
from q4kd.trainer.errors import InputError

# At most this many documents, and this many bytes of them, are tokenised at one time.
_GROUP, _GROUP_BYTES = 512, 8 << 20


class EncodingStoppedError(Exception):
    """Somebody no longer wants the tokens; it is raised to whoever asked for them."""


@dataclass(frozen=True)
class Encoded:
    """A document's tokens.

    Attributes:
        ids: int32 ``[n]``.
        learnt: bool ``[n]``, whether a token is a label where it is the next one; None where all are.
        part: which example of its document this is, counted from 0, and how many there are.
    """

    ids: npt.NDArray[np.int32]
    learnt: npt.NDArray[np.bool_] | None = None
    part: tuple[int, int] = (0, 1)

    @classmethod
    def make(
        cls, ids: Sequence[int], learnt: npt.NDArray[np.bool_] | None = None, part: tuple[int, int] = (0, 1)
    ) -> "Encoded":
        """Return the tokens of a document from plain integers."""
        return cls(np.asarray(ids, np.int32), learnt, part)


class ChatEncoder(Protocol):
    """An encoder of chats: ``chats.template.ChatTemplate``."""

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        where: str,
        context: Mapping[str, Any] | None = None,
        learns: Sequence[bool | None] | None = None,
    ) -> Sequence[Encoded]:
        """Return the examples of a chat: tokens and which are learnt."""

    def prepare(self, documents: Iterable[Document]) -> None:
        """Begin with several chats that will be encoded next."""

    def close(self) -> None:
        """Let go of what encoding took; more chats may follow."""


class DocumentEncoder:
    """Turns documents into tokens.

    A text is ended by the end-of-text token, which is learnt. A prompt and a completion are tokenised apart, so that
    the border is a border of tokens. What begins a text is put before texts and prompts. Chats begin and end as their
    template writes them, and pre-tokenised documents are kept as they are.

    Args:
        encode: function from texts to token ids.
        end_of_text: id that is appended to every text.
        chat: encoder of chats.
        completion_only: whether prompts are not learnt; a plain text has none, so it is refused.
        vocab_size: number that every id must be below.
        begin: ids that are put before every text and prompt, once.
        continue_text: function from completions to token ids; ``encode`` by default.
    """

    def __init__(
        self,
        encode: Encode,
        end_of_text: int,
        *,
        chat: ChatEncoder | None = None,
        completion_only: bool = False,
        vocab_size: int = 1 << 31,
        begin: Sequence[int] = (),
        continue_text: Encode | None = None,
    ) -> None:
        self._encode, self._end, self._chat = encode, end_of_text, chat
        self.begin, self._continue = tuple(begin), continue_text or encode
        self._completion_only, self._vocab_size = completion_only, vocab_size
        self._is_stopped = threading.Event()

    def encode(self, documents: Iterable[Document]) -> Iterator[Encoded]:
        """Yield the tokens of each document, in order, tokenising a bounded group of them at a time.

        A chat may be several examples, one after another (``Encoded.part``).

        Raises:
            InputError: for a document that cannot be encoded, or an id outside the vocabulary.
            EncodingStoppedError: after ``stop``.
        """
        group: list[Document] = []
        size = 0
        for document in documents:
            self._check_stopped()
            group.append(document)
            size += document.num_bytes
            if len(group) >= _GROUP or size >= _GROUP_BYTES:
                yield from self._encode_group(group)
                group, size = [], 0
        yield from self._encode_group(group)

    def stop(self) -> None:
        """Have ``encode`` end with an error at the next document, in whatever thread it runs."""
        self._is_stopped.set()

    def _check_stopped(self) -> None:
        if self._is_stopped.is_set():
            raise EncodingStoppedError

    def close(self) -> None:
        """Let go of what encoding chats took; more documents may follow."""
        if self._chat is not None:
            self._chat.close()

    def _encode_group(self, group: list[Document]) -> Iterator[Encoded]:
        texts = [document.text for document in group if document.ids is None and document.messages is None]
        completions = [document.completion for document in group if document.completion is not None and document.text]
        ids = iter(self._encode(texts) if texts else [])
        after = iter(self._continue(completions) if completions else [])
        if self._chat is not None:
            self._chat.prepare(document for document in group if document.messages is not None)
        for document in group:
            self._check_stopped()
            for found in self._encode_chat(document) or [self._encode_one(document, ids, after)]:
                self._check_range(document, found.ids)
                yield found

    def _encode_chat(self, document: Document) -> Sequence[Encoded]:
        """Return the examples of a chat; none of another document."""
        if document.messages is None:
            return ()
        if self._chat is None:
            raise InputError(document.name, expected="texts", got="a chat", remedy="use a tokenizer for chats")
        return self._chat.encode(document.messages, document.name, document.context, document.learns)

    def _encode_one(self, document: Document, texts: Iterator[list[int]], completions: Iterator[list[int]]) -> Encoded:
        if document.ids is not None:
            self._check_range(document, document.ids)  # before they become int32
            learnt = None if document.labels is None else document.labels == document.ids
            if learnt is None and self._completion_only:
                raise self._all_learnt(document, "token ids without labels")
            return Encoded(document.ids.astype(np.int32), learnt)
        prompt = put_before(self.begin, next(texts))
        if document.completion is None:
            if self._completion_only:
                raise self._all_learnt(document, "plain text")
            return Encoded.make([*prompt, self._end])
        # Without a prompt there is nothing to go on from.
        completion = next(completions) if document.text else self._encode([document.completion])[0]
        ids = np.array([*prompt, *completion, self._end], np.int32)
        return Encoded(ids, np.arange(len(ids)) >= len(prompt) if self._completion_only else None)

    @staticmethod
    def _all_learnt(document: Document, got: str) -> InputError:
        expected = "messages, a prompt and a completion, or token ids with labels, for completion_only"
        remedy = "set completion_only to false, or give chats"
        return InputError(f"document {document.name}", expected=expected, got=got, remedy=remedy)

    def _check_range(self, document: Document, ids: npt.NDArray[np.integer[Any]]) -> None:
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self._vocab_size:
            expected, got = f"token ids from 0 to {self._vocab_size - 1}", f"ids {ids.min()}..{ids.max()}"
            remedy = "tokenise it with the student's tokenizer"
            raise InputError(f"document {document.name}", expected=expected, got=got, remedy=remedy)
