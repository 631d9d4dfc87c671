"""Text files, JSON, JSONL, parquet, token shards, and folders of any of them, read one document at a time.

Files are read with json, pyarrow, numpy and safetensors directly, not through ``datasets.load_dataset``: a bad record
is named by file and line, nothing is copied to a cache, and no script runs.
"""

import contextlib
import fnmatch
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from q4kd.trainer.data.documents import MAX_DOCUMENT_BYTES, Document, SourceSettings, bad_record, make_document
from q4kd.trainer.data.shards import read_parquet, read_shard
from q4kd.trainer.errors import InputError

MAX_TEXT_BYTES = 16 * MAX_DOCUMENT_BYTES
_NOT_DATA = ("__pycache__", "site-packages")
_SHARDS = (".npy", ".safetensors")
_PEEK_BYTES = 1 << 20  # within which the first record of a .json file must end


def _read_text(path: Path, name: str) -> Document:
    size = path.stat().st_size
    if size > MAX_TEXT_BYTES:
        expected, remedy = f"text files of at most {MAX_TEXT_BYTES} bytes", "cut it into several files or JSONL"
        raise InputError(str(path), expected=expected, got=str(size), remedy=remedy)
    data = path.read_bytes()
    try:
        return Document(name, data.decode())
    except UnicodeDecodeError as error:
        got = f"byte {data[error.start]:#04x} at {error.start}"
        remedy = "convert it: iconv -f latin1 -t utf-8 converts Latin-1"
        raise InputError(str(path), expected="UTF-8 text", got=got, remedy=remedy) from error


def _read_jsonl(path: Path, name: str, settings: SourceSettings) -> Iterator[Document]:
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_DOCUMENT_BYTES), b""), start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise bad_record(where, "a JSON object", line[:60].decode(errors="replace").strip()) from error
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
    """Return whether the first object of a .json file has a field that is read."""
    first = _first_record(path) or {}
    return any(first.get(key) is not None for key in settings.columns)


def _read_json(path: Path, name: str, settings: SourceSettings) -> Iterator[Document]:
    """Yield the records of a list of objects, or of an object a line.

    Raises:
        InputError: for other JSON: nobody means to train on its brackets.
    """
    if not _holds_records(path, settings):
        fields = ", ".join(sorted(_first_record(path) or {}))[:80]
        got = f"fields {fields}" if fields else "other JSON"
        expected = f"records with {' or '.join(settings.columns)}, in a list or one a line"
        remedy = "rename the fields, or pass --data-format text to train on the file as it is"
        raise InputError(str(path), expected=expected, got=got, remedy=remedy)
    text = _read_text(path, name).text.lstrip()
    if not text.startswith("["):
        yield from _read_jsonl(path, name, settings)
        return
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise bad_record(str(path), "a list of JSON objects", error) from error
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
        got = "an Arrow file, such as Dataset.save_to_disk writes"
        remedy = "datasets.load_from_disk(FOLDER).to_parquet('data.parquet') converts a split"
        raise InputError(str(path), expected="text, JSONL, parquet or token shards", got=got, remedy=remedy)
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
    for file in _matching(root, settings.pattern):
        relative = file.relative_to(root)
        if not any(part in _NOT_DATA for part in relative.parts) and file.is_file():
            found.append((file, relative))
    return [(file, relative.as_posix()) for file, relative in sorted(found)]


def _matching(root: Path, pattern: str) -> Iterator[Path]:
    """Yield what a glob matches below a resolved folder, without links that leave it.

    A name at any depth (``**/NAME``) is looked for here: pathlib would walk through every installed package too.
    """
    at_any_depth, _, name = pattern.rpartition("/")
    if at_any_depth != "**" or name == "**":
        yield from (file for file in root.glob(pattern) if file.resolve().is_relative_to(root))
        return
    for folder, folders, files in os.walk(root):  # which follows no link to a folder, as ** does not
        folders[:] = [below for below in folders if below not in _NOT_DATA]
        for file in (Path(folder, file) for file in fnmatch.filter(files, name)):
            if not file.is_symlink() or file.resolve().is_relative_to(root):
                yield file


def _is_text(path: Path, settings: SourceSettings) -> bool:
    """Return whether a file of a folder would be read as one text; such files are skipped where they are none."""
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
        settings: settings by which files are read.
        order: indices into ``list_files``, in the order in which the files are read.

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
            elif file.stat().st_size <= MAX_DOCUMENT_BYTES:
                # A folder may hold pictures and archives beside its texts.
                with contextlib.suppress(UnicodeDecodeError):
                    yield Document(name, file.read_bytes().decode())
    except (OSError, zlib.error) as error:
        reason, remedy = getattr(error, "strerror", None) or str(error), "name a file or folder that you may read"
        raise InputError(str(path), expected="a readable file or folder", got=str(reason), remedy=remedy) from error
