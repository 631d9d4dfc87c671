"""Text files, JSON, JSONL, parquet, token shards, and folders of any of them, read one document at a time.

Files are read with json, pyarrow, numpy and safetensors directly, not through ``datasets.load_dataset``: a bad record
is named by file and line, nothing is copied to a cache, and no script runs.
"""

import codecs
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from q4kd.trainer.data.documents import MAX_DOCUMENT_BYTES, Document, SourceSettings, bad_record, make_document
from q4kd.trainer.data.shards import read_parquet, read_shard
from q4kd.trainer.data.sources.account import SourceAccount
from q4kd.trainer.data.sources.json_records import first_record, has_record_a_line, parse_records
from q4kd.trainer.data.sources.listing import COMPRESSED, list_data_files
from q4kd.trainer.errors import InputError

MAX_TEXT_BYTES = 16 * MAX_DOCUMENT_BYTES
_SHARDS = (".npy", ".safetensors")
_JSONL = (".jsonl", ".ndjson", ".jsonlines")
_POINTER, _MAX_POINTER = b"version https://git-lfs.github.com/spec/", 1024
# Tables and JSON that hold no records may be meant as texts, but hardly are.
_STRUCTURED = (".json", ".csv", ".tsv")
_PEEK_BYTES = 1 << 20  # of a file in a folder, to tell whether it is text


def _read_text(path: Path, name: str) -> Document:
    size = path.stat().st_size
    if path.suffix.lower() in COMPRESSED:
        raise InputError(str(path), expected="data that is not compressed", got=path.suffix, remedy="unpack it")
    if size > MAX_TEXT_BYTES:
        expected, remedy = f"text files of at most {MAX_TEXT_BYTES} bytes", "cut it into several files or JSONL"
        raise InputError(str(path), expected=expected, got=str(size), remedy=remedy)
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        got = f"byte {data[error.start]:#04x} at {error.start}"
        remedy = "convert it: iconv -f latin1 -t utf-8 converts Latin-1"
        raise InputError(str(path), expected="UTF-8 text", got=got, remedy=remedy) from error
    if "\0" in text:
        got, remedy = f"a zero byte at {data.index(0)}", "name text; UTF-16 becomes UTF-8 by iconv -f utf-16 -t utf-8"
        raise InputError(str(path), expected="UTF-8 text", got=got, remedy=remedy)
    return Document(name, text)


def _read_jsonl(path: Path, name: str, settings: SourceSettings, account: SourceAccount) -> Iterator[Document]:
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_DOCUMENT_BYTES), b""), start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise bad_record(where, "a JSON object", line[:60].decode(errors="replace").strip()) from error
            yield make_document(record, f"{name}:{number}", where, settings, account)


def _holds_records(path: Path, settings: SourceSettings) -> bool:
    """Return whether the first object of a .json file has a field that is read."""
    first = first_record(path, MAX_TEXT_BYTES) or {}
    return any(first.get(key) is not None for key in settings.columns)


def _read_json(path: Path, name: str, settings: SourceSettings, account: SourceAccount) -> Iterator[Document]:
    """Yield the records of a list of objects, or of objects one after another.

    Raises:
        InputError: for other JSON: nobody means to train on its brackets.
    """
    if not _holds_records(path, settings):
        fields = ", ".join(sorted(first_record(path, MAX_TEXT_BYTES) or {}))[:80]
        got = f"fields {fields}" if fields else "other JSON"
        expected = f"records with {' or '.join(settings.columns)}, in a list or one a line"
        remedy = "rename the fields, or pass --data-format text to train on the file as it is"
        raise InputError(str(path), expected=expected, got=got, remedy=remedy)
    if has_record_a_line(path, MAX_DOCUMENT_BYTES):
        yield from _read_jsonl(path, name, settings, account)
        return
    try:
        records = parse_records(_read_text(path, name).text)
    except (ValueError, RecursionError) as error:
        raise bad_record(str(path), "a list of JSON objects", error) from error
    for number, record in enumerate(records, start=1):
        yield make_document(record, f"{name}:{number}", f"{path}:{number}", settings, account)


def _refuse_pointer(path: Path) -> None:
    """Refuse what a clone without Git LFS has in place of a file: its address."""
    if path.is_file() and path.stat().st_size < _MAX_POINTER:
        with path.open("rb") as file:
            if file.read(len(_POINTER)) == _POINTER:
                remedy = "fetch it: git lfs pull, or hf download"
                raise InputError(str(path), expected="the file itself", got="a pointer of Git LFS", remedy=remedy)


def _read_file(path: Path, name: str, settings: SourceSettings, account: SourceAccount) -> Iterator[Document]:
    """Yield the documents of one file, told by the format asked for and by its name."""
    wanted, suffix = settings.data_format, path.suffix.lower()
    if suffix in _SHARDS and wanted in ("auto", "tokens"):
        for row, record in read_shard(path, settings.read_columns, account):
            yield make_document(record, f"{name}:{row}", f"{path}:{row}", settings, account)
    elif wanted == "parquet" or (suffix == ".parquet" and wanted in ("auto", "chat", "tokens", "text")):
        for row, record in read_parquet(path, settings.columns, settings.read_columns, account):
            yield make_document(record, f"{name}:{row}", f"{path}:{row}", settings, account)
    elif wanted in ("jsonl", "chat", "tokens") or (suffix in _JSONL and wanted == "auto"):
        yield from _read_jsonl(path, name, settings, account)
    elif suffix == ".json" and wanted == "auto":
        yield from _read_json(path, name, settings, account)
    elif suffix == ".arrow" and wanted == "auto":
        got = "an Arrow file, such as Dataset.save_to_disk writes"
        remedy = "datasets.load_from_disk(FOLDER).to_parquet('data.parquet') converts a split"
        raise InputError(str(path), expected="text, JSONL, parquet or token shards", got=got, remedy=remedy)
    else:
        if suffix in _STRUCTURED and name not in account.as_text:
            account.as_text.append(name)
        yield _read_text(path, name)


def list_files(path: Path, settings: SourceSettings, account: SourceAccount | None = None) -> list[tuple[Path, str]]:
    """Return the files of a source and their names: the path below the folder, sorted by it.

    What is left out of a folder, and told to ``account``, is said by ``list_data_files``.
    """
    if not path.is_dir():
        return [(path, path.name)]
    return list_data_files(path, settings.pattern, lambda file: _holds_records(file, settings), account)


def _is_text(path: Path, settings: SourceSettings) -> bool:
    """Return whether a file of a folder would be read as one text; such files are skipped where they are none."""
    if settings.data_format not in ("auto", "text"):
        return False
    suffix = path.suffix.lower()
    if suffix == ".json" and settings.data_format == "auto":
        return not _holds_records(path, settings)
    return suffix not in (*_JSONL, ".parquet", ".arrow", *_SHARDS)


def read_documents(
    path: Path,
    pattern: str = "**/*",
    settings: SourceSettings | None = None,
    order: list[int] | None = None,
    account: SourceAccount | None = None,
) -> Iterator[Document]:
    """Yield the documents of a file or a folder (sorted by name), one at a time.

    Args:
        path: file or folder.
        pattern: glob for a folder, where ``settings`` are not given.
        settings: settings by which files are read.
        order: indices into ``list_files``, in the order in which the files are read.
        account: is told what is read and what is not.

    Raises:
        InputError: when the path is missing, a file cannot be read as what it claims to be, or a record is bad.
    """
    settings, account = settings or SourceSettings(pattern=pattern), account or SourceAccount()
    try:
        files = list_files(path, settings, account)
        for index in range(len(files)) if order is None else order:
            file, name = files[index]
            _refuse_pointer(file)
            if not path.is_dir() or not _is_text(file, settings):
                yield from _read_file(file, name, settings, account)
            elif (text := _text_of_folder(file, name, account)) is not None:
                yield text
            else:
                continue
            account.read += 1
    except (OSError, zlib.error) as error:
        reason, remedy = getattr(error, "strerror", None) or str(error), "name a file or folder that you may read"
        named = getattr(error, "filename", None)
        subject = str(path) if named is None or str(named) == str(path) else f"{path}: {named}"
        raise InputError(subject, expected="a readable file or folder", got=str(reason), remedy=remedy) from error


def _text_of_folder(path: Path, name: str, account: SourceAccount) -> Document | None:
    """Return a file of a folder as one text, or note that it is none: a folder may hold pictures beside its texts."""
    with path.open("rb") as file:
        head = file.read(_PEEK_BYTES)
    try:
        # A letter may be cut at the end of what is looked at.
        codecs.getincrementaldecoder("utf-8")().decode(head)
        is_text = b"\0" not in head
        # Beyond the limit a text is refused by name: it is no picture.
        document = _read_text(path, name) if is_text else None
    except UnicodeDecodeError:
        document = None
    except InputError:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise
        document = None
    if document is None:
        account.leave_out(name, "not UTF-8 text (convert or remove them)")
    elif path.suffix.lower() in _STRUCTURED and name not in account.as_text:
        account.as_text.append(name)
    return document
