"""Documents: text files, JSON, JSONL, parquet, pre-tokenised shards, and folders of any of them, read one at a time.

A record's kind is told by its fields: ``messages`` (a chat), ``text``, ``prompt`` and ``completion``, or ``input_ids``
with or without ``labels``. Files are read with json, pyarrow, numpy and safetensors directly, not through
``datasets.load_dataset``: a bad record is named by file and line, nothing is copied to a cache, and no script runs.
"""

import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from q4kd.trainer.errors import InputError
from q4kd.trainer.shards import read_parquet, read_shard

MAX_DOCUMENT_BYTES = 64 << 20
MAX_MESSAGES = 10_000
Tokens = npt.NDArray[np.int64]
_NOT_DATA = ("__pycache__", "site-packages")
_SHARDS = (".npy", ".safetensors")
# Of a .json file, within which its first record must end.
_PEEK_BYTES = 1 << 20


@dataclass(frozen=True)
class Document:
    """What is trained on as one piece, and the name by which it is assigned to training or held-out.

    Exactly one of these is given: ``text`` alone, ``text`` and ``completion``, ``messages``, or ``ids``.

    Attributes:
        name: relative path, with the line or row of a record.
        text: of a text, or the prompt of a prompt and completion.
        completion: what follows the prompt.
        messages: of a chat: mappings with ``role`` and ``content``.
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
        """Size, for limits on how much is read: UTF-8 bytes of its texts, or bytes of its ids."""
        if self.ids is not None:
            return self.ids.nbytes
        texts = [self.text, self.completion or ""]
        texts += [str(message.get("content") or "") for message in self.messages or ()]
        return sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)


@dataclass(frozen=True)
class SourceSettings:
    """How files are read; the fields are those of ``DistillConfig``."""

    data_format: str = "auto"
    pattern: str = "**/*"
    text_field: str = "text"
    messages_field: str = "messages"

    @property
    def columns(self) -> tuple[str, ...]:
        """Fields of a record that are read."""
        return (self.messages_field, self.text_field, "prompt", "completion", "input_ids", "labels")


def _bad(where: str, expected: str, got: object) -> InputError:
    return InputError(where, expected=expected, got=str(got)[:80], remedy="correct or remove the record")


def _text(value: object, where: str, field: str) -> str:
    if not isinstance(value, str):
        raise _bad(where, f'text in "{field}"', type(value).__name__)
    if len(value) > MAX_DOCUMENT_BYTES:
        raise _bad(where, f"at most {MAX_DOCUMENT_BYTES} characters", len(value))
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _bad(where, "Unicode text", f"half a surrogate pair at {error.start}") from error
    return value


def _messages(value: object, where: str) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(value, list) or not 0 < len(value) <= MAX_MESSAGES:
        size = len(value) if isinstance(value, list) else type(value).__name__
        raise _bad(where, f"a list of 1 to {MAX_MESSAGES} messages", size)
    found = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise _bad(where, 'messages with a "role" and a "content"', f"message {number}: {message!r}")
        _text(message.get("content"), f"{where}: message {number}", "content")
        # Parquet fills the fields that a message lacks with null.
        found.append({str(key): part for key, part in message.items() if part is not None})
    return tuple(found)


def _ids(value: object, where: str, field: str) -> Tokens:
    try:
        ids = np.asarray(value)
    except (ValueError, OverflowError) as error:
        raise _bad(where, f'integers in "{field}"', error) from error
    if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu" or ids.nbytes > MAX_DOCUMENT_BYTES:
        raise _bad(where, f'a list of integers in "{field}"', f"{ids.dtype} {ids.shape}")
    # An unsigned id past int64 becomes negative, and is refused as out of range.
    return ids.astype(np.int64)


def make_document(record: object, name: str, where: str, settings: SourceSettings) -> Document:
    """Return the document of a record.

    Raises:
        InputError: naming ``where`` (file and line) when it is no document, or not of the format asked for.
    """
    if not isinstance(record, Mapping):
        raise _bad(where, "an object", type(record).__name__)
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
    raise _bad(where, f"a record with {expected}", ", ".join(sorted(map(str, record)))[:80] or "no field")


def _labels(value: object, ids: Tokens, where: str) -> Tokens | None:
    if value is None:
        return None
    labels = _ids(value, where, "labels")
    if labels.shape != ids.shape or not bool(((labels == ids) | (labels == -100)).all()):
        raise _bad(where, "labels as long as input_ids, each the same id or -100", f"{len(labels)} for {len(ids)}")
    return labels


def _read_text(path: Path, name: str) -> Document:
    size = path.stat().st_size
    if size > MAX_DOCUMENT_BYTES * 16:
        raise InputError(
            str(path),
            expected=f"text files of at most {MAX_DOCUMENT_BYTES * 16} bytes",
            got=str(size),
            remedy="cut it into several files or JSONL",
        )
    data = path.read_bytes()
    try:
        return Document(name, data.decode())
    except UnicodeDecodeError as error:
        got = f"byte {data[error.start]:#04x} at {error.start}"
        raise InputError(str(path), expected="UTF-8 text", got=got, remedy="convert it") from error


def _read_jsonl(path: Path, name: str, settings: SourceSettings) -> Iterator[Document]:
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_DOCUMENT_BYTES), b""), start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise _bad(where, "a JSON object", line[:60].decode(errors="replace").strip()) from error
            yield make_document(record, f"{name}:{number}", where, settings)


def _first_record(path: Path) -> Mapping[str, Any] | None:
    """Return the first object of a .json file that is a list of them or has one a line; None of other JSON."""
    with path.open("rb") as file:
        head = file.read(_PEEK_BYTES).decode(errors="replace").lstrip()
    try:
        if head.startswith("["):
            first, _ = json.JSONDecoder().raw_decode(head[1:].lstrip())
        else:
            first = json.loads(head.partition("\n")[0])
    except (ValueError, RecursionError):
        return None
    return first if isinstance(first, dict) else None


def _holds_records(path: Path, settings: SourceSettings) -> bool:
    """Whether the first object of a .json file has a field that is read."""
    first = _first_record(path) or {}
    return any(first.get(key) is not None for key in settings.columns)


def _read_json(path: Path, name: str, settings: SourceSettings) -> Iterator[Document]:
    """Yield the records of a list of objects, or of an object a line.

    Raises:
        InputError: for other JSON: nobody means to train on its brackets.
    """
    if not _holds_records(path, settings):
        fields = ", ".join(sorted(_first_record(path) or {}))[:80]
        raise InputError(
            str(path),
            expected=f"records with {' or '.join(settings.columns)}, in a list or one a line",
            got=f"fields {fields}" if fields else "other JSON",
            remedy="rename the fields, or pass --data-format text to train on the file as it is",
        )
    text = _read_text(path, name).text.lstrip()
    if not text.startswith("["):
        yield from _read_jsonl(path, name, settings)
        return
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _bad(str(path), "a list of JSON objects", error) from error
    for number, record in enumerate(records, start=1):
        yield make_document(record, f"{name}:{number}", f"{path}:{number}", settings)


def _read_file(path: Path, name: str, settings: SourceSettings) -> Iterator[Document]:
    """Yield the documents of one file, told by the format asked for and by its name."""
    wanted, suffix = settings.data_format, path.suffix.lower()
    if suffix in _SHARDS and wanted in ("auto", "tokens"):
        for row, record in read_shard(path):
            yield make_document(record, f"{name}:{row}", f"{path}:{row}", settings)
    elif wanted == "parquet" or (suffix == ".parquet" and wanted in ("auto", "chat", "tokens", "text")):
        for row, record in read_parquet(path, settings.columns):
            yield make_document(record, f"{name}:{row}", f"{path}:{row}", settings)
    elif wanted in ("jsonl", "chat", "tokens") or (suffix == ".jsonl" and wanted == "auto"):
        yield from _read_jsonl(path, name, settings)
    elif suffix == ".json" and wanted == "auto":
        yield from _read_json(path, name, settings)
    elif suffix == ".arrow" and wanted == "auto":
        raise InputError(
            str(path),
            expected="text, JSONL, parquet or token shards",
            got="an Arrow file, such as Dataset.save_to_disk writes",
            remedy="datasets.load_from_disk(FOLDER).to_parquet('data.parquet') converts a split",
        )
    else:
        yield _read_text(path, name)


def list_files(path: Path, settings: SourceSettings) -> list[tuple[Path, str]]:
    """Return the files of a source and their names: the path below the folder, sorted by it.

    Links that leave the folder, and the caches of programs, are left out.
    """
    if not path.is_dir():
        return [(path, path.name)]
    root = path.resolve()
    found = []
    for file in root.glob(settings.pattern):
        relative = file.relative_to(root)
        is_inside = file.is_file() and file.resolve().is_relative_to(root)
        if is_inside and not any(part in _NOT_DATA for part in relative.parts):
            found.append((file, relative))
    return [(file, relative.as_posix()) for file, relative in sorted(found)]


def _is_text(path: Path, settings: SourceSettings) -> bool:
    """Whether a file of a folder would be read as one text: those are skipped where they are none."""
    if settings.data_format not in ("auto", "text"):
        return False
    suffix = path.suffix.lower()
    if suffix == ".json" and settings.data_format == "auto":
        return not _holds_records(path, settings)
    return suffix not in (".jsonl", ".parquet", ".arrow", *_SHARDS)


def read_documents(
    path: Path, pattern: str = "**/*", settings: SourceSettings | None = None, order: list[int] | None = None
) -> Iterator[Document]:
    """Yield the documents of a file or a folder (sorted by name), one at a time.

    Args:
        path: file or folder.
        pattern: glob for a folder, where ``settings`` are not given.
        settings: how files are read.
        order: in which the files are read, as indices into ``list_files``.

    Raises:
        InputError: when the path is missing, a file cannot be read as what it claims to be, or a record is bad.
    """
    settings = settings or SourceSettings(pattern=pattern)
    try:
        files = list_files(path, settings)
        for index in range(len(files)) if order is None else order:
            file, name = files[index]
            if not path.is_dir() or not _is_text(file, settings):
                yield from _read_file(file, name, settings)
            elif file.stat().st_size <= MAX_DOCUMENT_BYTES and (text := _decoded(file)) is not None:
                yield Document(name, text)
    except (OSError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            str(path), expected="a readable file or folder", got=str(reason), remedy="check --data"
        ) from error


def _decoded(path: Path) -> str | None:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError:
        return None  # a folder may hold pictures and archives beside its texts
