"""Walk a GGUF header within bounds, before the ``gguf`` package reads it.

``gguf.GGUFReader`` trusts counts and lengths: an array said to hold 2**40 entries keeps it busy for hours. This walk
follows the same layout (little-endian, versions 2 and 3; https://github.com/ggml-org/ggml/blob/master/docs/gguf.md),
touches only the header and refuses whatever does not fit into the file.
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

from q4kd.trainer.errors import InputError, unreadable

MAX_KEY_VALUES = 65_536
MAX_TENSORS = 65_536
MAX_ARRAY_ENTRIES = 4_000_000
MAX_HEADER_BYTES = 256 << 20
MAX_DIMENSIONS = 4
MAX_KEY_CHARACTERS, MAX_NAME_CHARACTERS = 1024, 256

_STRING, _ARRAY = 8, 9
_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_REMEDY = "download or convert the file again"


@dataclass
class _Cursor:
    data: mmap.mmap
    path: Path
    offset: int = 0

    def refuse(self, expected: str, got: str) -> InputError:
        return InputError(f"{self.path} at byte {self.offset}", expected=expected, got=got, remedy=_REMEDY)

    def skip(self, count: int, what: str) -> None:
        if count > len(self.data) - self.offset or self.offset + count > MAX_HEADER_BYTES:
            raise self.refuse(f"{count} bytes of {what}", f"{len(self.data) - self.offset} bytes left in the header")
        self.offset += count

    def number(self, form: str, what: str) -> int:
        start = self.offset
        self.skip(struct.calcsize(form), what)
        return int(struct.unpack_from(form, self.data, start)[0])

    def string(self, what: str) -> str:
        length = self.number("<Q", f"the length of {what}")
        start = self.offset
        self.skip(length, what)
        try:
            return self.data[start : start + length].decode()
        except UnicodeDecodeError as error:
            raise self.refuse(f"UTF-8 in {what}", str(error.reason)) from error


def _skip_value(cursor: _Cursor, key: str) -> None:
    kind, count = cursor.number("<I", key), 1
    if kind == _ARRAY:
        kind, count = cursor.number("<I", key), cursor.number("<Q", key)
        if count > MAX_ARRAY_ENTRIES:
            raise cursor.refuse(f"at most {MAX_ARRAY_ENTRIES} entries in {key!r}", str(count))
    if kind in _SCALAR_BYTES:
        cursor.skip(count * _SCALAR_BYTES[kind], key)
    elif kind == _STRING:
        for _ in range(count):
            cursor.string(key)
    elif count:  # Arrays of arrays are refused here too.
        raise cursor.refuse("a known metadata type", f"type {kind} for {key!r}")


def _walk_metadata(cursor: _Cursor, count: int) -> None:
    seen: set[str] = set()
    for _ in range(count):
        key = cursor.string("a metadata key")
        if len(key) > MAX_KEY_CHARACTERS or not key.isprintable():
            raise cursor.refuse(f"a printable key of at most {MAX_KEY_CHARACTERS} characters", repr(key[:40]))
        if key in seen:
            raise cursor.refuse("each metadata key once", f"{key!r} twice")
        seen.add(key)
        _skip_value(cursor, key)


def _walk_tensors(cursor: _Cursor, count: int) -> None:
    seen: set[str] = set()
    for _ in range(count):
        name = cursor.string("a tensor name")
        if len(name) > MAX_NAME_CHARACTERS or not name.isprintable():
            raise cursor.refuse(f"a printable name of at most {MAX_NAME_CHARACTERS} characters", repr(name[:40]))
        if name in seen:
            raise cursor.refuse("each tensor once", f"{name!r} twice")
        seen.add(name)
        dimensions = cursor.number("<I", name)
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise cursor.refuse(f"1 to {MAX_DIMENSIONS} dimensions for {name!r}", str(dimensions))
        elements = 1
        for _ in range(dimensions):
            elements *= cursor.number("<Q", name)
        if not 0 < elements < 1 << 48:
            raise cursor.refuse(f"a plausible element count for {name!r}", str(elements))
        cursor.skip(4 + 8, name)  # ``gguf/reader.py`` checks type and offset against the file.


def check_header(path: Path) -> None:
    """Check that the GGUF header of ``path`` fits its file and our bounds.

    Raises:
        InputError: naming the byte at which the header stops making sense.
    """
    try:
        with path.open("rb") as file:
            head = file.read(4)
            if head != b"GGUF":
                expected = "a GGUF file (magic 'GGUF')"
                raise InputError(str(path), expected=expected, got=f"{head!r}", remedy="name a .gguf model")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise unreadable(path, error) from error
    with data:
        cursor = _Cursor(data, path, offset=4)
        version = cursor.number("<I", "the version")
        if version not in (2, 3):
            raise cursor.refuse("GGUF version 2 or 3, little-endian", f"version {version}")
        tensors = cursor.number("<Q", "the tensor count")
        key_values = cursor.number("<Q", "the metadata count")
        if tensors > MAX_TENSORS or key_values > MAX_KEY_VALUES:
            expected = f"at most {MAX_TENSORS} tensors and {MAX_KEY_VALUES} keys"
            raise cursor.refuse(expected, f"{tensors} and {key_values}")
        _walk_metadata(cursor, key_values)
        _walk_tensors(cursor, tensors)
