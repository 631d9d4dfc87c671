"""Faults in single formats of training data: rows, labels, fields and the order of files."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from q4kd.harness.runs.faults import Call, declare, patch, replace

if TYPE_CHECKING:
    from pathlib import Path

    from q4kd.trainer.data.documents import SourceSettings

_PARQUET = "q4kd.trainer.data.shards:read_parquet"
_SHARD = "q4kd.trainer.data.shards:read_shard"
_FILES = "q4kd.trainer.data.readers:list_files"
_LISTED = "q4kd.trainer.data.sources.listing:list_data_files"
_DOCUMENT = "q4kd.trainer.data.documents:make_document"
_KIND = "q4kd.trainer.data.documents:_kind"
_SETTINGS = "q4kd.trainer.config.settings:make_config"
_Rows = Iterator[tuple[int, Mapping[str, Any]]]


@patch("loop", "parquet-row-lost", "the first row of a parquet file is taken for its header", _PARQUET)
def _parquet_row_lost(original: Callable[..., _Rows], *arguments: object) -> _Rows:
    return (row for row in original(*arguments) if row[0] > 1)


@patch("loop", "shard-labels-ignored", "every token of a shard has a label", _SHARD)
def _shard_labels_ignored(original: Callable[..., _Rows], *arguments: object) -> _Rows:
    return ((row, {"input_ids": record["input_ids"]}) for row, record in original(*arguments))


@patch("loop", "everything-read", "every file below a folder is read, hidden ones and cards too", _LISTED)
def _everything_read(
    _original: Callable[..., list[Any]], folder: "Path", *_arguments: object
) -> list[tuple["Path", str]]:
    files = [(file, file.relative_to(folder).as_posix()) for file in folder.rglob("*") if file.is_file()]
    return sorted(files, key=lambda found: found[1])


@patch("loop", "links-skipped", "links are left out, wherever they lead", _LISTED)
def _links_skipped(original: Callable[..., list[Any]], *arguments: object) -> list[Any]:
    return [found for found in original(*arguments) if not found[0].is_symlink()]


@patch("loop", "files-backwards", "the files of a folder are read from the last to the first", _FILES)
def _files_backwards(original: Callable[..., list[Any]], *arguments: object) -> list[Any]:
    return original(*arguments)[::-1]


@patch(
    "loop", "title-read-as-text", "a record's title is read where it has one, whatever field was asked for", _DOCUMENT
)
def _title_read_as_text(
    original: Call, record: Mapping[str, object], name: str, where: str, settings: "SourceSettings", *more: object
) -> object:
    asked = "title" if "title" in record else settings.text_field
    return original(record, name, where, dataclasses.replace(settings, text_field=asked), *more)


@patch("loop", "chat-before-named-field", "messages are trained on where a field of texts was asked for by name", _KIND)
def _chat_before_named_field(original: Call, given: Mapping[str, object], *more: object) -> object:
    return "chat" if "messages" in given else original(given, *more)


def _ignore(setting: str) -> None:
    def make(original: Call) -> Call:
        return lambda values: original({key: value for key, value in values.items() if key != setting})

    replace(_SETTINGS, make)


for _setting in (
    "data_glob", "data_format", "data_max_bytes", "messages_field", "ignore_fields", "chat_date", "begin_of_text",
    "shuffle_buffer",
):  # fmt: skip
    _title = f"the setting {_setting} is read and not used"
    declare("loop", f"{_setting}-ignored", _title, functools.partial(_ignore, _setting), _SETTINGS)
