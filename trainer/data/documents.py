"""Documents, made from records and checked; the rule that says which of them are held out.

A record's kind is told by its fields: ``messages`` (a chat), ``text``, ``prompt`` and ``completion``, or ``input_ids``
with or without ``labels``.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

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
    """

    name: str
    text: str = ""
    completion: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    ids: Tokens | None = None
    labels: Tokens | None = None

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

    @property
    def columns(self) -> tuple[str, ...]:
        """Fields of a record that are read."""
        return (self.messages_field, self.text_field, "prompt", "completion", "input_ids", "labels")


def bad_record(where: str, expected: str, got: object) -> InputError:
    """Return the error of a record at ``where``: a file and its line or row."""
    return InputError(where, expected=expected, got=str(got)[:80], remedy="mend or remove this record")


def _text(value: object, where: str, field: str) -> str:
    if not isinstance(value, str):
        raise bad_record(where, f'text in "{field}"', type(value).__name__)
    if len(value) > MAX_DOCUMENT_BYTES:
        raise bad_record(where, f"at most {MAX_DOCUMENT_BYTES} characters", len(value))
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise bad_record(where, "Unicode text", f"half a surrogate pair at {error.start}") from error
    return value


def _messages(value: object, where: str) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(value, list) or not 0 < len(value) <= MAX_MESSAGES:
        size = len(value) if isinstance(value, list) else type(value).__name__
        raise bad_record(where, f"a list of 1 to {MAX_MESSAGES} messages", size)
    found = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise bad_record(where, 'messages with a "role" and a "content"', f"message {number}: {message!r}")
        _text(message.get("content"), f"{where}: message {number}", "content")
        # Parquet fills the fields that a message lacks with null.
        found.append({str(key): part for key, part in message.items() if part is not None})
    return tuple(found)


def _ids(value: object, where: str, field: str) -> Tokens:
    try:
        ids = np.asarray(value)
    except (ValueError, OverflowError) as error:
        raise bad_record(where, f'integers in "{field}"', error) from error
    if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu" or ids.nbytes > MAX_DOCUMENT_BYTES:
        raise bad_record(where, f'a list of integers in "{field}"', f"{ids.dtype} {ids.shape}")
    # An unsigned id past int64 becomes negative, and is refused as out of range.
    return ids.astype(np.int64)


def make_document(record: object, name: str, where: str, settings: SourceSettings) -> Document:
    """Return the document of a record.

    Raises:
        InputError: naming ``where`` (file and line) when it is no document, or not of the format asked for.
    """
    if not isinstance(record, Mapping):
        raise bad_record(where, "an object", type(record).__name__)
    has = {key for key in settings.columns if record.get(key) is not None}
    wanted = settings.data_format
    if wanted in ("auto", "jsonl", "parquet", "chat") and settings.messages_field in has:
        return Document(name, messages=_messages(record[settings.messages_field], where))
    if wanted in ("auto", "jsonl", "parquet", "text") and settings.text_field in has:
        return Document(name, _text(record[settings.text_field], where, settings.text_field))
    if wanted in ("auto", "jsonl", "parquet", "chat") and {"prompt", "completion"} <= has:
        texts = [_text(record[field], where, field) for field in ("prompt", "completion")]
        return Document(name, texts[0], completion=texts[1])
    if wanted in ("auto", "jsonl", "parquet", "tokens") and "input_ids" in has:
        ids = _ids(record["input_ids"], where, "input_ids")
        return Document(name, ids=ids, labels=_labels(record.get("labels"), ids, where))
    fields = {"chat": f'"{settings.messages_field}"', "tokens": '"input_ids"', "text": f'"{settings.text_field}"'}
    expected = fields.get(wanted, f'"{settings.text_field}", "{settings.messages_field}", "prompt" and "completion"')
    raise bad_record(where, f"a record with {expected}", ", ".join(sorted(map(str, record)))[:80] or "no field")


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
