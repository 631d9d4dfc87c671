"""Documents, made from records and checked; the rule that says which of them are held out.

A record's kind is told by its fields: ``messages`` (a chat), ``text``, ``prompt`` and ``completion``, or ``input_ids``
with or without ``labels``.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from q4kd.trainer.data.sources.account import SourceAccount
from q4kd.trainer.data.sources.fields import (
    MEANINGFUL,
    Kind,
    check_message,
    check_record,
    read_context,
    read_masks,
    read_weight,
    without_weights,
)
from q4kd.trainer.errors import InputError

MAX_DOCUMENT_BYTES = 64 << 20
MAX_MESSAGES = 10_000
Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Document:
    """A text, chat or token sequence, and the name by which it is assigned to training or held-out data.

    Exactly one of these is given: ``text`` alone, ``text`` and ``completion``, ``messages``, or ``ids``.

    Attributes:
        name: relative path, with the line or row of a record.
        text: the text, or the prompt of a prompt and completion.
        completion: text that follows the prompt.
        messages: messages of a chat, mappings with ``role`` and ``content``.
        ids: token ids of a pre-tokenised document.
        labels: the same ids, or -100 where none is learnt; None where all are.
        context: what a chat's template is given beside the messages: tools, documents, variables.
        learns: of each message whether it is learnt, None where it does not say; empty where none says.
    """

    name: str
    text: str = ""
    completion: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    ids: Tokens | None = None
    labels: Tokens | None = None
    context: Mapping[str, Any] = field(default_factory=dict)
    learns: tuple[bool | None, ...] = ()

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of its texts, or bytes of its ids: its size, for limits on how much is read."""
        if self.ids is not None:
            return self.ids.nbytes
        texts = [self.text, self.completion or ""]
        texts += [str(message.get("content") or "") for message in self.messages or ()]
        return sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)


@dataclass(frozen=True)
class SourceSettings:
    """Settings by which files are read; the fields are those of ``DistillConfig``."""

    data_format: str = "auto"
    pattern: str = "**/*"
    text_field: str = "text"
    messages_field: str = "messages"
    ignored: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """Fields of a record that hold a document."""
        return (self.messages_field, self.text_field, "prompt", "completion", "input_ids")

    @property
    def read_columns(self) -> tuple[str, ...]:
        """Fields of a record that are looked at."""
        return tuple(name for name in (*self.columns, *MEANINGFUL) if name not in self.ignored)


def bad_record(where: str, expected: str, got: object) -> InputError:
    """Return the error of a record at ``where``: a file and its line or row."""
    return InputError(where, expected=expected, got=str(got)[:80], remedy="mend or remove this record")


def _text(value: object, where: str, name: str) -> str:
    if not isinstance(value, str):
        raise bad_record(where, f'text in "{name}"', type(value).__name__)
    if len(value) > MAX_DOCUMENT_BYTES:
        raise bad_record(where, f"at most {MAX_DOCUMENT_BYTES} characters", len(value))
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise bad_record(where, "Unicode text", f"half a surrogate pair at {error.start}") from error
    return value


_CALLS = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")


def _messages(value: object, where: str, settings: SourceSettings) -> tuple[list[dict[str, Any]], list[bool | None]]:
    """Return the messages of a chat as its template gets them, and of each whether it is learnt."""
    if not isinstance(value, list) or not 0 < len(value) <= MAX_MESSAGES:
        size = len(value) if isinstance(value, list) else type(value).__name__
        raise bad_record(where, f"a list of 1 to {MAX_MESSAGES} messages", size)
    found, learns = [], []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise bad_record(where, 'messages with a "role" and a "content"', f"message {number}: {message!r}")
        place = f"{where}: message {number}"
        message = {key: part for key, part in message.items() if key not in settings.ignored}
        # A turn that only calls a tool has no content; Parquet fills the fields that a message lacks with null.
        if message.get("content") is not None or not any(message.get(name) for name in _CALLS):
            _text(message.get("content"), place, "content")
        check_message(message, place)
        learns.append(read_weight(message, place))
        found.append(without_weights(message))
    return found, learns


def _ids(value: object, where: str, name: str) -> Tokens:
    try:
        ids = np.asarray(value)
    except (ValueError, OverflowError) as error:
        raise bad_record(where, f'integers in "{name}"', error) from error
    if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu" or ids.nbytes > MAX_DOCUMENT_BYTES:
        got = f"{ids.dtype} {ids.shape}, {ids.nbytes} bytes"
        expected = f'a list of integers of at most {MAX_DOCUMENT_BYTES} bytes in "{name}"'
        raise bad_record(where, expected, got)
    # An unsigned id past int64 becomes negative, and is refused as out of range.
    return ids.astype(np.int64)


def make_document(
    record: object, name: str, where: str, settings: SourceSettings, account: SourceAccount | None = None
) -> Document:
    """Return the document of a record; ``account`` is told of the fields that are passed over.

    Raises:
        InputError: naming ``where`` (file and line) when it is no document, not of the format asked for, or says
            something about what is learnt that is not followed.
    """
    if not isinstance(record, Mapping):
        raise bad_record(where, "an object", type(record).__name__)
    given = {key: part for key, part in record.items() if part is not None and key not in settings.ignored}
    kind = _kind(given, record, where, settings)
    own = {
        "chat": (settings.messages_field,), "text": (settings.text_field,), "pair": ("prompt", "completion"),
        "tokens": ("input_ids",),
    }[kind]  # fmt: skip
    passed_over = check_record(given, kind, where, own)
    if account is not None and passed_over:
        account.pass_over(passed_over)
    if kind == "chat":
        messages, learns = _messages(given[settings.messages_field], where, settings)
        learns = learns if any(flag is not None for flag in learns) else []
        context = read_context(given, where)
        return Document(name, messages=tuple(messages), context=context, learns=tuple(learns))
    if kind == "tokens":
        return _tokens(given, name, where)
    texts = [_text(given[part], where, part) for part in own]
    return Document(name, texts[0], completion=texts[1] if kind == "pair" else None)


def _kind(given: Mapping[str, Any], record: Mapping[Any, Any], where: str, settings: SourceSettings) -> Kind:
    """Return which document a record is, by its fields and the format asked for."""
    wanted = settings.data_format
    allowed: tuple[Kind, ...] = {"text": ("text",), "tokens": ("tokens",), "chat": ("chat", "pair")}.get(
        wanted, ("chat", "text", "pair", "tokens")
    )  # type: ignore[assignment]
    own: Mapping[Kind, tuple[str, ...]] = {
        "chat": (settings.messages_field,),
        "text": (settings.text_field,),
        "pair": ("prompt", "completion"),
        "tokens": ("input_ids",),
    }
    found = [kind for kind in allowed if all(part in given for part in own[kind])]
    # A field that somebody asked for by name comes before one that is looked for by itself.
    if settings.text_field != "text" and settings.messages_field == "messages" and "text" in found:
        return "text"
    if "tokens" in found and len(found) > 1:
        got = f"input_ids beside {' and '.join(own[found[0]])}"
        remedy = "say which is meant with --data-format tokens or --ignore-fields input_ids,labels"
        raise InputError(where, expected="a record of one kind", got=got, remedy=remedy)
    if found:
        return found[0]
    fields = {"chat": f'"{settings.messages_field}"', "tokens": '"input_ids"', "text": f'"{settings.text_field}"'}
    expected = fields.get(wanted, f'"{settings.text_field}", "{settings.messages_field}", "prompt" and "completion"')
    empty = [f"{key}: null" if record[key] is None else str(key) for key in sorted(record, key=str)]
    raise bad_record(where, f"a record with {expected}", ", ".join(empty)[:80] or "no field")


def _tokens(given: Mapping[str, Any], name: str, where: str) -> Document:
    ids = _ids(given["input_ids"], where, "input_ids")
    labels = _labels(given.get("labels"), ids, where)
    seen, learnt = read_masks(given, len(ids), where)
    if learnt is not None:
        labels = np.where(learnt, ids if labels is None else labels, -100)
    return Document(name, ids=ids[seen], labels=None if labels is None else labels[seen])


def _labels(value: object, ids: Tokens, where: str) -> Tokens | None:
    if value is None:
        return None
    labels = _ids(value, where, "labels")
    if labels.shape != ids.shape or not bool(((labels == ids) | (labels == -100)).all()):
        expected = "labels as long as input_ids, each the same id or -100"
        raise bad_record(where, expected, f"{len(labels)} for {len(ids)}")
    return labels


def is_held_out(relative_path: str) -> bool:
    """Return whether a file is evaluation data: the first byte of SHA-256 of its path, modulo 10, is zero (26 of 256).

    The rule depends on the path alone, so every program agrees on it.

    Args:
        relative_path: the path below the corpus folder, with forward slashes (``Path.as_posix()``).
    """
    return hashlib.sha256(relative_path.encode("utf-8", "surrogateescape")).digest()[0] % 10 == 0
