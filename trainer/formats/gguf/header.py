"""Reads the header of a GGUF in one pass over the mapped file, within bounds; no tensor's data is touched.

Little-endian files of versions 2 and 3 (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). A count or length
that does not fit into the file is refused before anything of its size is made.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from q4kd.trainer.errors import InputError
from q4kd.trainer.formats.gguf.metadata import ARRAY, SCALARS, STRING, MetadataArray, numbers, string_ends, strings

MAX_KEY_VALUES = 65_536
MAX_TENSORS = 65_536
MAX_ARRAY_ENTRIES = 4_000_000
# Strings of all arrays together. The largest vocabularies have 262,144 tokens, or 201,088 and 446,189 merges.
MAX_STRINGS = 2_000_000
MAX_TEXT_BYTES = 16 << 20
MAX_HEADER_BYTES = 128 << 20
MAX_DIMENSIONS = 4
MAX_KEY_CHARACTERS, MAX_NAME_CHARACTERS = 1024, 256
MAX_ALIGNMENT = 1 << 20

_DEFAULT_ALIGNMENT = 32
_UINT32 = 4
_REMEDY = "download or convert the file again"


@dataclass(frozen=True)
class TensorEntry:
    """What the header says of a tensor.

    Attributes:
        name: GGUF name.
        type_id: number of its GGML type.
        shape: outermost dimension first.
        offset: byte at which its data begins, counted from the header's ``data_start``.
    """

    name: str
    type_id: int
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Header:
    """A header.

    Attributes:
        metadata: values by key: numbers, truth values, strings, and a ``MetadataArray`` for every array.
        tensors: the tensors in the order of the header.
        alignment: bytes of which each tensor's offset is a multiple.
        data_start: byte of the file from which offsets are counted.
    """

    metadata: Mapping[str, Any]
    tensors: tuple[TensorEntry, ...]
    alignment: int
    data_start: int


class _Cursor:
    """A place in the header, and what was read up to there."""

    def __init__(self, path: Path, data: npt.NDArray[np.uint8], max_bytes: int) -> None:
        self.path, self.array = path, data[:max_bytes]
        self.data = self.array.data
        self.offset = self.strings = 0

    def refuse(self, expected: str, got: str) -> InputError:
        return InputError(f"{self.path} at byte {self.offset}", expected=expected, got=got, remedy=_REMEDY)

    def skip(self, count: int, what: str) -> int:
        """Return where the next ``count`` bytes begin, and stand behind them."""
        start, left = self.offset, len(self.data) - self.offset
        if count > left:
            raise self.refuse(f"{count} bytes of {what}", f"{left} bytes left in the header")
        self.offset += count
        return start

    def scalar(self, form: str, what: str) -> Any:
        start = self.skip(struct.calcsize(form), what)
        return struct.unpack_from(form, self.data, start)[0]

    def text(self, what: str, most: int) -> str:
        length = self.scalar("<Q", f"the length of {what}")
        if length > most:
            raise self.refuse(f"at most {most} bytes of {what}", str(length))
        start = self.skip(length, what)
        try:
            return bytes(self.data[start : start + length]).decode()
        except UnicodeDecodeError as error:
            raise self.refuse(f"UTF-8 in {what}", str(error.reason)) from error

    def name(self, what: str, most: int) -> str:
        """Return a printable text of at most ``most`` characters."""
        found = self.text(what, 4 * most)
        if len(found) > most or not found.isprintable():
            raise self.refuse(f"{what}, printable, of at most {most} characters", repr(found[:40]))
        return found


def read_header(path: Path, data: npt.NDArray[np.uint8], max_bytes: int = MAX_HEADER_BYTES) -> Header:
    """Read a header.

    Args:
        path: the file, for error lines.
        data: uint8 of the whole file.
        max_bytes: bytes that the header may have.

    Raises:
        InputError: naming the byte at which the header stops making sense.
    """
    cursor = _Cursor(path, data, max_bytes)
    magic = bytes(data[:4])
    if magic != b"GGUF":
        raise InputError(str(path), expected="a GGUF file (magic 'GGUF')", got=repr(magic), remedy="name a .gguf model")
    cursor.skip(4, "the magic")
    version = cursor.scalar("<I", "the version")
    if version not in (2, 3):
        got = f"version {version >> 24}, big-endian" if version and not version & 0xFFFFFF else f"version {version}"
        raise cursor.refuse("GGUF version 2 or 3, little-endian", got)
    tensors, key_values = cursor.scalar("<Q", "the tensor count"), cursor.scalar("<Q", "the metadata count")
    if tensors > MAX_TENSORS or key_values > MAX_KEY_VALUES:
        expected = f"at most {MAX_TENSORS} tensors and {MAX_KEY_VALUES} keys"
        raise cursor.refuse(expected, f"{tensors} and {key_values}")
    metadata, alignment = _read_metadata(cursor, key_values)
    entries = _read_tensors(cursor, tensors)
    return Header(metadata, entries, alignment, -(-cursor.offset // alignment) * alignment)


def _read_metadata(cursor: _Cursor, count: int) -> tuple[dict[str, Any], int]:
    """Return the values by key, and the alignment that they name."""
    found: dict[str, Any] = {}
    alignment = _DEFAULT_ALIGNMENT
    for _ in range(count):
        key = cursor.name("a metadata key", MAX_KEY_CHARACTERS)
        if key in found:
            raise cursor.refuse("each metadata key once", f"{key!r} twice")
        kind = cursor.scalar("<I", key)
        found[key] = value = _read_value(cursor, key, kind)
        if key == "general.alignment":
            alignment = value
            if kind != _UINT32 or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
                raise cursor.refuse(f"a power of two up to {MAX_ALIGNMENT} as {key}", repr(value)[:80])
    return found, alignment


def _read_value(cursor: _Cursor, key: str, kind: int) -> Any:
    if kind in SCALARS:
        return cursor.scalar(SCALARS[kind], key)
    if kind == STRING:
        return cursor.text(key, MAX_TEXT_BYTES)
    if kind == ARRAY:
        return _read_array(cursor, key)
    raise cursor.refuse("a known metadata type", f"type {kind} for {key!r}")


def _read_array(cursor: _Cursor, key: str) -> MetadataArray:
    kind, count = cursor.scalar("<I", key), cursor.scalar("<Q", key)
    if count > MAX_ARRAY_ENTRIES:
        raise cursor.refuse(f"at most {MAX_ARRAY_ENTRIES} entries in {key!r}", str(count))
    if kind in SCALARS:
        start = cursor.skip(count * struct.calcsize(SCALARS[kind]), key)
        return numbers(cursor.array, start, count, kind)
    if kind != STRING:  # Arrays of arrays are refused here too.
        raise cursor.refuse("an array of numbers, truth values or strings", f"entries of type {kind} for {key!r}")
    cursor.strings += count
    if cursor.strings > MAX_STRINGS:
        raise cursor.refuse(f"at most {MAX_STRINGS} strings in arrays", f"{cursor.strings} with those of {key!r}")
    start = cursor.offset
    try:
        ends = string_ends(cursor.data, start, count)
    except ValueError as error:
        raise cursor.refuse(f"{count} strings in {key!r}", str(error)) from error
    cursor.offset = int(ends[-1]) if count else start
    return strings(f"{cursor.path}: {key}", cursor.array, start, ends)


def _read_tensors(cursor: _Cursor, count: int) -> tuple[TensorEntry, ...]:
    found: dict[str, TensorEntry] = {}
    for _ in range(count):
        name = cursor.name("a tensor name", MAX_NAME_CHARACTERS)
        if name in found:
            raise cursor.refuse("each tensor once", f"{name!r} twice")
        dimensions = cursor.scalar("<I", name)
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise cursor.refuse(f"1 to {MAX_DIMENSIONS} dimensions for {name!r}", str(dimensions))
        shape = tuple(cursor.scalar("<Q", name) for _ in range(dimensions))
        elements = 1
        for size in shape:
            elements *= size
        if not 0 < elements < 1 << 48:
            raise cursor.refuse(f"a plausible element count for {name!r}", str(elements))
        type_id, offset = cursor.scalar("<I", name), cursor.scalar("<Q", name)
        found[name] = TensorEntry(name, type_id, shape[::-1], offset)
    return tuple(found.values())
