"""Walk the header, metadata and tensor index of an .apr file within bounds: aprender's container, version 2.0.

Layout (little-endian; paiml/aprender, crates/apr-format/src/v2), in this order, which every writer follows and which
leaves no section room to overlap another:

    0   magic "APR\\0", u8 major, u8 minor, u16 flags, u32 tensor count, u64 metadata offset, u32 metadata bytes,
    24  u64 index offset, u64 data offset, u32 CRC-32 of bytes 0-39 and 44-63, 20 reserved bytes
    64  metadata (JSON), then the tensor index, then the data, then a u32 CRC-32 of every byte before it

An index entry is u16 name length, name, u8 dtype, u8 ndim, ndim x u64 (outermost first), u64 offset into the data, u64
bytes; entries are sorted by name. The header's checksum proves nothing about its maker: every number is checked.
"""

import io
import itertools
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from q4kd.trainer.errors import InputError
from q4kd.trainer.files import parse_json

HEADER_BYTES = 64
FOOTER_BYTES = 4
ALIGNMENT = 64
MAX_METADATA_BYTES = 16 << 20
# 16 MiB of nested brackets make Python objects of 700 MB; a real vocabulary with its merges is below 900,000 items.
MAX_METADATA_ITEMS = 2_000_000
MAX_TENSORS = 65_536
MAX_NAME_BYTES = 256
MAX_DIMENSIONS = 8

_HEADER = struct.Struct("<4sBBHIQIQQI20x")
_SMALLEST_ENTRY = 2 + 1 + 1 + 1 + 8 + 8 + 8
_CHUNK = 4 << 20
_DAMAGED = "download the file again: it is truncated or damaged"
_EXPORT = "export the model again with aprender"
# Flags that change how the bytes are read. Signed (8), quantised (32), filterbank (64), model card (128), streaming
# (256), vocabulary (512) and row-major (1024) do not; a signature is not verified.
_REFUSED_FLAGS = {
    2048: ("row-major tensors", "a column-major file", "import the model again: aprender forbids this layout too"),
    4: ("plain tensors", "an encrypted file", "decrypt it with aprender first"),
    16: ("one file", "one shard of several", "merge the shards into one .apr first"),
    1: ("uncompressed tensors", "an LZ4-compressed file", f"{_EXPORT}, uncompressed"),
    2: ("uncompressed tensors", "a zstd-compressed file", f"{_EXPORT}, uncompressed"),
}
_KNOWN_FLAGS = 0x0FFF


@dataclass(frozen=True)
class AprEntry:
    """One tensor of the index: its name as stored, raw dtype code, shape, and start and size in the file in bytes."""

    name: str
    dtype: int
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class AprHeader:
    """What precedes the data: the parsed metadata and the tensors, sorted by name."""

    metadata: dict[str, Any]
    entries: tuple[AprEntry, ...]


@dataclass
class _Cursor:
    data: memoryview
    path: Path
    offset: int
    end: int

    def take(self, form: str, what: str) -> int:
        value = self.take_bytes(struct.calcsize(form), what)
        return int(struct.unpack(form, value)[0])

    def take_bytes(self, count: int, what: str) -> bytes:
        left = self.end - self.offset
        if count > left:
            got = f"{left} left in the tensor index"
            raise _refusal(f"{self.path} at byte {self.offset}", f"{count} bytes of {what}", got)
        self.offset += count
        return bytes(self.data[self.offset - count : self.offset])


def _refusal(subject: str, expected: str, got: object, remedy: str = _DAMAGED) -> InputError:
    return InputError(subject, expected=expected, got=str(got), remedy=remedy)


def read_header(path: Path, data: memoryview) -> AprHeader:
    """Read everything before the data of an .apr file, whose bytes are ``data``; nothing else of it is touched.

    Raises:
        InputError: for another version, a wrong header checksum, a layout that is not implemented, metadata that are
            not JSON or exceed 16 MiB, or an index that does not fit the file.
    """
    check_magic(path, bytes(data[:4]))
    if len(data) < HEADER_BYTES + FOOTER_BYTES:
        least = f"at least {HEADER_BYTES + FOOTER_BYTES} bytes of header and footer"
        raise _refusal(str(path), least, f"{len(data)} bytes")
    (_, major, minor, flags, count, *sections, stored) = _HEADER.unpack_from(data)
    metadata_offset, metadata_bytes, index_offset, data_offset = sections
    if (major, minor) != (2, 0):
        raise _refusal(f"{path}: version", "2.0", f"{major}.{minor}", _EXPORT)
    computed = zlib.crc32(data[44:64], zlib.crc32(data[:40]))
    if stored != computed:
        raise _refusal(f"{path}: header checksum", f"{computed:08x}", f"{stored:08x}")
    _check_flags(path, flags)
    if metadata_bytes > MAX_METADATA_BYTES:
        raise _refusal(f"{path}: metadata", "at most 16 MiB", f"{metadata_bytes} bytes", _EXPORT)
    metadata_end = metadata_offset + metadata_bytes
    data_end = len(data) - FOOTER_BYTES
    if not HEADER_BYTES <= metadata_offset <= metadata_end <= index_offset <= data_offset <= data_end:
        expected = f"header, metadata, index and data in this order between bytes {HEADER_BYTES} and {data_end}"
        got = f"metadata {metadata_offset}-{metadata_end}, index from {index_offset}, data from {data_offset}"
        raise _refusal(f"{path}: sections", expected, got)
    metadata = _parse_metadata(path, bytes(data[metadata_offset:metadata_end]))
    entries = _walk_index(_Cursor(data, path, index_offset, data_offset), count, data_offset, data_end)
    return AprHeader(metadata, entries)


def check_magic(path: Path, magic: bytes) -> None:
    """Check the first four bytes.

    Raises:
        InputError: naming version 1 files, and anything that is not .apr.
    """
    if magic in (b"APR2", b"APRN", b"APR1"):
        raise _refusal(str(path), "an .apr file of version 2", f"a version 1 file ({magic!r})", _EXPORT)
    if magic != b"APR\0":
        raise _refusal(str(path), "an .apr file (magic 'APR\\0')", repr(magic), "name an .apr model")


def check_footer(path: Path, file: io.BufferedReader) -> None:
    """Check the CRC-32 (zlib's polynomial) of every byte before the last four, as both of aprender's writers store it.

    The file is read in pieces of 4 MiB, not through a map: nothing of it stays in this process.

    Raises:
        InputError: when it differs from the footer.
    """
    file.seek(0, 2)
    left = file.tell() - FOOTER_BYTES
    file.seek(0)
    piece = bytearray(_CHUNK)
    view = memoryview(piece)
    computed = 0
    while left > 0 and (got := file.readinto(view[: min(left, _CHUNK)])):
        computed = zlib.crc32(view[:got], computed)
        left -= got
    stored = int.from_bytes(file.read(FOOTER_BYTES), "little")
    if stored != computed or left:
        raise _refusal(f"{path}: footer CRC-32", f"{computed:08x}", f"{stored:08x}")


def _check_flags(path: Path, flags: int) -> None:
    for bit, (expected, got, remedy) in _REFUSED_FLAGS.items():
        if flags & bit:
            raise _refusal(f"{path}: flags", expected, got, remedy)
    if flags & ~_KNOWN_FLAGS:
        remedy = "update this program, or export the model again without the new feature"
        raise _refusal(f"{path}: flags", f"only the flags {_KNOWN_FLAGS:#06x} of version 2.0", f"{flags:#06x}", remedy)


def _parse_metadata(path: Path, raw: bytes) -> dict[str, Any]:
    items = sum(raw.count(mark) for mark in (b",", b":", b"[", b"{"))
    if items > MAX_METADATA_ITEMS:
        raise _refusal(f"{path}: metadata", f"at most {MAX_METADATA_ITEMS} items", items, _EXPORT)
    metadata = parse_json(raw, f"{path}: metadata", MAX_METADATA_BYTES)
    if not isinstance(metadata, dict):
        raise _refusal(f"{path}: metadata", "a JSON object", type(metadata).__name__, _EXPORT)
    return metadata


def _walk_index(cursor: _Cursor, count: int, data_offset: int, data_end: int) -> tuple[AprEntry, ...]:
    room = cursor.end - cursor.offset
    if count > min(MAX_TENSORS, room // _SMALLEST_ENTRY):
        raise _refusal(f"{cursor.path}: tensor count", f"at most {MAX_TENSORS}, in an index of {room} bytes", count)
    entries: list[AprEntry] = []
    for _ in range(count):
        entry = _take_entry(cursor, data_offset, data_end)
        before, subject = entries[-1].name if entries else "", f"{cursor.path}: tensor {entry.name}"
        if entry.name == before:
            raise _refusal(subject, "each name once", "it twice", _EXPORT)
        if entry.name.encode() < before.encode():
            raise _refusal(subject, "an index sorted by name", f"it after {before}", _EXPORT)
        entries.append(entry)
    by_place = sorted(entries, key=lambda entry: entry.start)
    for first, second in itertools.pairwise(by_place):
        if first.start + first.size > second.start:
            subject, got = f"{cursor.path}: tensor {second.name}", f"a start at {second.start}, inside {first.name}"
            raise _refusal(subject, f"bytes of its own after {first.start + first.size}", got)
    return tuple(entries)


def _take_entry(cursor: _Cursor, data_offset: int, data_end: int) -> AprEntry:
    name = _take_name(cursor)
    subject = f"{cursor.path}: tensor {name}"
    dtype = cursor.take("<B", "a dtype")
    ndim = cursor.take("<B", "a dimension count")
    if not 1 <= ndim <= MAX_DIMENSIONS:
        raise _refusal(subject, f"1 to {MAX_DIMENSIONS} dimensions", ndim)
    shape = struct.unpack(f"<{ndim}Q", cursor.take_bytes(8 * ndim, "a shape"))
    if 0 in shape:
        raise _refusal(subject, "positive dimensions", shape)
    offset = cursor.take("<Q", "an offset")
    size = cursor.take("<Q", "a size")
    if offset + size >= 1 << 64:
        raise _refusal(subject, "an end below 2**64", f"offset {offset} + {size} bytes")
    start = data_offset + offset
    if start + size > data_end:
        raise _refusal(subject, f"an end at byte {data_end} at most", f"byte {start + size}")
    if start % ALIGNMENT:
        raise _refusal(subject, f"a start at a multiple of {ALIGNMENT}", f"byte {start}", _EXPORT)
    return AprEntry(name, dtype, shape, start, size)


def _take_name(cursor: _Cursor) -> str:
    place = f"{cursor.path} at byte {cursor.offset}"
    length = cursor.take("<H", "a name's length")
    if not 1 <= length <= MAX_NAME_BYTES:
        raise _refusal(place, f"a tensor name of 1 to {MAX_NAME_BYTES} bytes", length)
    raw = cursor.take_bytes(length, "a tensor name")
    try:
        name = raw.decode()
    except UnicodeDecodeError as error:
        raise _refusal(place, "a UTF-8 tensor name", error.reason) from error
    if not name.isprintable():
        raise _refusal(place, "a printable tensor name", repr(name)[:80])
    return name
