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
    """One tensor of the index: its name as stored, raw dtype code, shape, and place in the file in bytes."""

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
        if count > self.end - self.offset:
            raise InputError(
                f"{self.path} at byte {self.offset}",
                expected=f"{count} bytes of {what}",
                got=f"{self.end - self.offset} left in the tensor index",
                remedy=_DAMAGED,
            )
        self.offset += count
        return bytes(self.data[self.offset - count : self.offset])


def read_header(path: Path, data: memoryview) -> AprHeader:
    """Read everything before the data of an .apr file.

    Args:
        path: of the file, for error lines.
        data: the whole file, uint8; only header, metadata and index are touched.

    Raises:
        InputError: for another version, a wrong header checksum, a layout that is not implemented, metadata that are
            not JSON or exceed 16 MiB, or an index that does not fit the file.
    """
    check_magic(path, bytes(data[:4]))
    if len(data) < HEADER_BYTES + FOOTER_BYTES:
        raise InputError(
            str(path),
            expected=f"at least {HEADER_BYTES + FOOTER_BYTES} bytes of header and footer",
            got=f"{len(data)} bytes",
            remedy=_DAMAGED,
        )
    (_, major, minor, flags, count, metadata_offset, metadata_bytes, index_offset, data_offset, stored) = (
        _HEADER.unpack_from(data)
    )
    if (major, minor) != (2, 0):
        raise InputError(f"{path}: version", expected="2.0", got=f"{major}.{minor}", remedy=_EXPORT)
    computed = zlib.crc32(data[44:64], zlib.crc32(data[:40]))
    if stored != computed:
        raise InputError(f"{path}: header checksum", expected=f"{computed:08x}", got=f"{stored:08x}", remedy=_DAMAGED)
    _check_flags(path, flags)
    if metadata_bytes > MAX_METADATA_BYTES:
        raise InputError(f"{path}: metadata", expected="at most 16 MiB", got=f"{metadata_bytes} bytes", remedy=_EXPORT)
    metadata_end = metadata_offset + metadata_bytes
    data_end = len(data) - FOOTER_BYTES
    if not HEADER_BYTES <= metadata_offset <= metadata_end <= index_offset <= data_offset <= data_end:
        raise InputError(
            f"{path}: sections",
            expected=f"header, metadata, index and data in this order between bytes {HEADER_BYTES} and {data_end}",
            got=f"metadata {metadata_offset}-{metadata_end}, index from {index_offset}, data from {data_offset}",
            remedy=_DAMAGED,
        )
    metadata = _parse_metadata(path, bytes(data[metadata_offset:metadata_end]))
    entries = _walk_index(_Cursor(data, path, index_offset, data_offset), count, data_offset, data_end)
    return AprHeader(metadata, entries)


def check_magic(path: Path, magic: bytes) -> None:
    """Check the first four bytes.

    Raises:
        InputError: naming version 1 files, and anything that is not .apr.
    """
    if magic in (b"APR2", b"APRN", b"APR1"):
        raise InputError(
            str(path), expected="an .apr file of version 2", got=f"a version 1 file ({magic!r})", remedy=_EXPORT
        )
    if magic != b"APR\0":
        raise InputError(
            str(path), expected="an .apr file (magic 'APR\\0')", got=repr(magic), remedy="pass an .apr model"
        )


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
        raise InputError(f"{path}: footer CRC-32", expected=f"{computed:08x}", got=f"{stored:08x}", remedy=_DAMAGED)


def _check_flags(path: Path, flags: int) -> None:
    for bit, (expected, got, remedy) in _REFUSED_FLAGS.items():
        if flags & bit:
            raise InputError(f"{path}: flags", expected=expected, got=got, remedy=remedy)
    if flags & ~_KNOWN_FLAGS:
        raise InputError(
            f"{path}: flags",
            expected=f"only the flags {_KNOWN_FLAGS:#06x} of version 2.0",
            got=f"{flags:#06x}",
            remedy="update this program, or export the model again without the new feature",
        )


def _parse_metadata(path: Path, raw: bytes) -> dict[str, Any]:
    items = sum(raw.count(mark) for mark in (b",", b":", b"[", b"{"))
    if items > MAX_METADATA_ITEMS:
        raise InputError(
            f"{path}: metadata", expected=f"at most {MAX_METADATA_ITEMS} items", got=str(items), remedy=_EXPORT
        )
    metadata = parse_json(raw, f"{path}: metadata", MAX_METADATA_BYTES)
    if not isinstance(metadata, dict):
        raise InputError(f"{path}: metadata", expected="a JSON object", got=type(metadata).__name__, remedy=_EXPORT)
    return metadata


def _walk_index(cursor: _Cursor, count: int, data_offset: int, data_end: int) -> tuple[AprEntry, ...]:
    room = cursor.end - cursor.offset
    if count > min(MAX_TENSORS, room // _SMALLEST_ENTRY):
        raise InputError(
            f"{cursor.path}: tensor count",
            expected=f"at most {MAX_TENSORS}, in an index of {room} bytes",
            got=str(count),
            remedy=_DAMAGED,
        )
    entries: list[AprEntry] = []
    for _ in range(count):
        entry = _take_entry(cursor, data_offset, data_end)
        if entries:
            _check_order(cursor.path, entries[-1].name, entry.name)
        entries.append(entry)
    by_place = sorted(entries, key=lambda entry: entry.start)
    for first, second in itertools.pairwise(by_place):
        if first.start + first.size > second.start:
            raise InputError(
                f"{cursor.path}: tensor {second.name}",
                expected=f"bytes of its own after {first.start + first.size}",
                got=f"a start at {second.start}, inside {first.name}",
                remedy=_DAMAGED,
            )
    return tuple(entries)


def _check_order(path: Path, before: str, name: str) -> None:
    if name == before:
        raise InputError(f"{path}: tensor {name}", expected="each name once", got="it twice", remedy=_EXPORT)
    if name.encode() < before.encode():
        raise InputError(
            f"{path}: tensor {name}", expected="an index sorted by name", got=f"it after {before}", remedy=_EXPORT
        )


def _take_entry(cursor: _Cursor, data_offset: int, data_end: int) -> AprEntry:
    name = _take_name(cursor)
    subject = f"{cursor.path}: tensor {name}"
    dtype = cursor.take("<B", "a dtype")
    ndim = cursor.take("<B", "a dimension count")
    if not 1 <= ndim <= MAX_DIMENSIONS:
        raise InputError(subject, expected=f"1 to {MAX_DIMENSIONS} dimensions", got=str(ndim), remedy=_DAMAGED)
    shape = struct.unpack(f"<{ndim}Q", cursor.take_bytes(8 * ndim, "a shape"))
    if 0 in shape:
        raise InputError(subject, expected="positive dimensions", got=str(shape), remedy=_DAMAGED)
    offset = cursor.take("<Q", "an offset")
    size = cursor.take("<Q", "a size")
    if offset + size >= 1 << 64:
        raise InputError(subject, expected="an end below 2**64", got=f"offset {offset} + {size} bytes", remedy=_DAMAGED)
    start = data_offset + offset
    if start + size > data_end:
        raise InputError(
            subject, expected=f"an end at byte {data_end} at most", got=f"byte {start + size}", remedy=_DAMAGED
        )
    if start % ALIGNMENT:
        raise InputError(subject, expected=f"a start at a multiple of {ALIGNMENT}", got=f"byte {start}", remedy=_EXPORT)
    return AprEntry(name, dtype, shape, start, size)


def _take_name(cursor: _Cursor) -> str:
    place = f"{cursor.path} at byte {cursor.offset}"
    length = cursor.take("<H", "a name's length")
    if not 1 <= length <= MAX_NAME_BYTES:
        raise InputError(
            place, expected=f"a tensor name of 1 to {MAX_NAME_BYTES} bytes", got=str(length), remedy=_DAMAGED
        )
    raw = cursor.take_bytes(length, "a tensor name")
    try:
        name = raw.decode()
    except UnicodeDecodeError as error:
        raise InputError(place, expected="a UTF-8 tensor name", got=str(error.reason), remedy=_DAMAGED) from error
    if not name.isprintable():
        raise InputError(place, expected="a printable tensor name", got=repr(name)[:80], remedy=_DAMAGED)
    return name
