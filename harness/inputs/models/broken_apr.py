"""Broken twins of an .apr file: each has one thing wrong, and every checksum right unless that is the thing."""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

_FLAGS_AT, _METADATA_AT, _CHECKSUM_AT, _INDEX_OFFSET_AT = 6, 12, 40, 24


def _seal(data: bytearray) -> bytes:
    """Make both checksums right."""
    struct.pack_into("<I", data, _CHECKSUM_AT, zlib.crc32(data[:40] + data[44:64]))
    return bytes(data[:-4]) + struct.pack("<I", zlib.crc32(data[:-4]))


def _flag(bit: int) -> Callable[[bytearray], bytes]:
    def change(data: bytearray) -> bytes:
        flags = struct.unpack_from("<H", data, _FLAGS_AT)[0]
        struct.pack_into("<H", data, _FLAGS_AT, flags | bit)
        return _seal(data)

    return change


def _magic(data: bytearray) -> bytes:
    data[:4] = b"APRN"
    return _seal(data)


def _header_checksum(data: bytearray) -> bytes:
    data[_CHECKSUM_AT] ^= 1
    return bytes(data[:-4]) + struct.pack("<I", zlib.crc32(data[:-4]))


def _footer(data: bytearray) -> bytes:
    data[-1] ^= 1
    return bytes(data)


def _flipped_weight(data: bytearray) -> bytes:
    data[-100] ^= 1
    return bytes(data)


def _first_entry(data: bytearray) -> int:
    """Return where the first index entry's dtype lies."""
    start: int = struct.unpack_from("<Q", data, _INDEX_OFFSET_AT)[0]
    return start + 2 + int(struct.unpack_from("<H", data, start)[0])


def _dtype(code: int) -> Callable[[bytearray], bytes]:
    def change(data: bytearray) -> bytes:
        data[_first_entry(data)] = code
        return _seal(data)

    return change


def _overflowing_offset(data: bytearray) -> bytes:
    at = _first_entry(data)
    struct.pack_into("<Q", data, at + 2 + 8 * data[at + 1], (1 << 64) - 64)
    return _seal(data)


def _giant_metadata(data: bytearray) -> bytes:
    struct.pack_into("<I", data, _METADATA_AT + 8, (16 << 20) + 1)
    return _seal(data)


def _metadata_not_json(data: bytearray) -> bytes:
    data[64] = ord("[")
    return _seal(data)


BROKEN_APR: dict[str, Callable[[bytearray], bytes]] = {
    "column-major": _flag(2048),
    "encrypted": _flag(4),
    "sharded": _flag(16),
    "LZ4": _flag(1),
    "zstd": _flag(2),
    "version 1": _magic,
    "header checksum": _header_checksum,
    "footer": _footer,
    "flipped weight": _flipped_weight,
    "apr-q4": _dtype(128),
    "legacy apr-q4": _dtype(8),
    "apr-q8": _dtype(129),
    "unknown dtype": _dtype(77),
    "offset overflow": _overflowing_offset,
    "giant metadata": _giant_metadata,
    "metadata not JSON": _metadata_not_json,
}


def write_broken_apr(path: Path, source: Path, case: str) -> None:
    """Write the twin of ``source`` named ``case``."""
    path.write_bytes(BROKEN_APR[case](bytearray(source.read_bytes())))
