"""The members of a tar archive, read in one pass, within bounds and to the last byte.

Python's ``tarfile`` is not made for hostile input: it follows chains of long-name headers by recursion until the
interpreter's limit, matches some extended headers in time that grows with the square of their length (one second for
40 kB on Python 3.11.7), and stops at the end marker, so that a checksum after it is never looked at.
"""

import gzip
import io
import re
import zlib
from typing import IO, Protocol

from q4kd.trainer.errors import InputError

BLOCK = 512
MAX_HEADER_DATA = 64 << 10
# What decompressing may take, above all the dictionary whose size an archive announces: `xz -9` asks for 65 MB.
MAX_XZ_MEMORY = 96 << 20
# An archive may be this much larger than what it is packed in, beyond the first bytes. Bundles are 1 to 6 times so.
MAX_RATIO, FREE_BYTES = 64, 64 << 20
XZ_MAGIC = b"\xfd7zXZ\0"
REMEDY = "ask for the bundle again; this one cannot be trusted"
_OCTAL = re.compile(rb" {0,11}([0-7]{0,12})[ \0]*")
_REGULAR, _FOLDER, _LONG_NAME, _EXTENDED, _GLOBAL = (b"0", b"\0"), b"5", b"L", b"x", b"g"


def safe_name(name: str, origin: str) -> str:
    """Return ``name`` when it stays inside its root.

    Raises:
        InputError: absolute, ``..``, empty parts, backslashes, control characters, or longer than 400 characters.
    """
    bad = not name.isprintable() or "\\" in name or len(name) > 400
    if bad or any(part in ("", ".", "..") for part in name.split("/")):
        raise InputError(origin, expected="names inside the bundle", got=repr(name)[:120], remedy=REMEDY)
    return name


def too_large(origin: str, name: str, max_bytes: int) -> InputError:
    """Return the error for a file over its bound."""
    return InputError(f"{origin}: {name}", expected=f"at most {max_bytes} bytes", got="more", remedy=REMEDY)


def read_members(
    file: IO[bytes], origin: str, *, max_file: int, max_total: int, max_files: int
) -> tuple[dict[str, bytes], int]:
    """Read every file of a ``.tar``, ``.tar.gz`` or ``.tar.xz``, seekable and at its start.

    Args:
        file: the archive.
        origin: how to name it in errors.
        max_file: bytes that one file may hold.
        max_total: bytes that the whole archive may hold when decompressed, headers and padding included; no more than
            64 MB and 64 times its packed bytes, in any case.
        max_files: entries that it may have.

    Returns:
        Name → content, and the decompressed bytes that were read.

    Raises:
        InputError: it is damaged, or holds a link, a device, a sparse file, a repeated name, or one outside its root.
    """
    stream = _Stream(file, origin, max_total)
    try:
        members = _read(stream, origin, max_file, max_files)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise InputError(origin, expected="an archive of a bundle", got=str(error)[:200], remedy=REMEDY) from error
    return members, stream.taken


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _XzFile:
    """The content of one xz stream. Unlike ``lzma.LZMAFile`` it bounds its memory and takes nothing after the end."""

    def __init__(self, file: IO[bytes]) -> None:
        try:
            import lzma
        except ImportError as error:
            raise ValueError("packed by xz, which this Python cannot read: it has no module lzma") from error
        self._decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, MAX_XZ_MEMORY)
        self._file, self._error = file, lzma.LZMAError

    def read(self, size: int, /) -> bytes:
        """Return up to ``size`` bytes, none only at the end (ValueError for a damaged stream, or one too large)."""
        while not self._decoder.eof:
            data = self._file.read(1 << 16) if self._decoder.needs_input else b""
            if self._decoder.needs_input and not data:
                raise EOFError("a cut xz stream")
            try:
                piece = self._decoder.decompress(data, size)
            except self._error as error:
                raise ValueError(str(error)) from error
            if piece:
                return piece
        if self._decoder.unused_data or self._file.read(1):
            raise ValueError("bytes after the end of the xz stream")
        return b""


class _Stream:
    """The decompressed bytes of an archive; more than ``limit`` of them end with an error, not with memory."""

    def __init__(self, file: IO[bytes], origin: str, limit: int) -> None:
        magic = file.read(len(XZ_MAGIC))
        limit = min(limit, FREE_BYTES + MAX_RATIO * file.seek(0, io.SEEK_END))
        file.seek(0)
        self.source: _Readable = file
        if magic.startswith(b"\x1f\x8b"):
            self.source = gzip.GzipFile(fileobj=file)
        elif magic == XZ_MAGIC:
            self.source = _XzFile(file)
        self.origin, self.limit, self.taken = origin, limit, 0

    def take(self, size: int) -> bytes:
        """Return ``size`` bytes, fewer only at the end."""
        pieces: list[bytes] = []
        while size > 0 and (piece := self.source.read(min(size, 1 << 20))):
            pieces.append(piece)
            size -= len(piece)
            self.taken += len(piece)
            if self.taken > self.limit:
                raise InputError(self.origin, expected="a bounded archive", got="more bytes than that", remedy=REMEDY)
        return b"".join(pieces)

    def content(self, size: int) -> bytes:
        """Return the ``size`` bytes of a member and pass over its padding."""
        data = self.take(size)
        padding = self.take(-size % BLOCK)
        if len(data) != size or len(padding) != -size % BLOCK:
            raise InputError(self.origin, expected="a whole archive", got="a cut one", remedy=REMEDY)
        if padding.strip(b"\0"):
            raise ValueError("bytes hidden in the padding")
        return data


def _read(stream: _Stream, origin: str, max_file: int, max_files: int) -> dict[str, bytes]:
    members: dict[str, bytes] = {}
    longer: str | None = None
    entries = 0
    while (header := stream.take(BLOCK)).strip(b"\0"):
        entries += 1
        if entries > 3 * max_files or len(members) >= max_files:
            raise InputError(origin, expected=f"at most {max_files} files", got="more", remedy=REMEDY)
        name, size, kind = _fields(header)
        if kind in (_LONG_NAME, _EXTENDED, _GLOBAL):
            if size > MAX_HEADER_DATA or (kind != _GLOBAL and longer is not None):
                raise ValueError("an extended header too long, or two for one member")
            data = stream.content(size)
            if kind == _LONG_NAME:
                longer = data.split(b"\0", 1)[0].decode()
            else:
                given = _path_of(data)
                if kind == _GLOBAL and given is not None:
                    raise ValueError("one name for all members")
                longer = longer if given is None else given
            continue
        name, longer = (name if longer is None else longer).removeprefix("./"), None
        if kind == _FOLDER:
            if name.rstrip("/") not in ("", "."):
                safe_name(name.removesuffix("/"), origin)
            if size:
                raise ValueError("a folder with contents")
            continue
        safe_name(name, origin)
        if kind not in _REGULAR:
            raise InputError(origin, expected="plain files", got=f"{name!r}, not one", remedy=REMEDY)
        if name in members:
            raise InputError(origin, expected="each name once", got=f"{name!r} twice", remedy=REMEDY)
        if size > max_file:
            raise too_large(origin, name, max_file)
        members[name] = stream.content(size)
    if len(header) != BLOCK or longer is not None:
        raise ValueError("no end marker")
    # To the very end: the compressed stream's own checksum comes last, and nothing may hide behind the marker.
    while rest := stream.take(1 << 20):
        if rest.strip(b"\0"):
            raise ValueError("bytes after the end of the archive")
    return members


def _fields(header: bytes) -> tuple[str, int, bytes]:
    """Return name, size and kind of a header block (POSIX.1-1988 ustar, and GNU's variant of it)."""
    if len(header) != BLOCK:
        raise ValueError("cut inside a header")
    if sum(header[:148]) + sum(header[156:]) + 8 * 32 != _number(header[148:156]):
        raise ValueError("a header's checksum is wrong")
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode(), _number(header[124:136]), header[156:157]


def _number(field: bytes) -> int:
    match = _OCTAL.fullmatch(field)
    if match is None:
        raise ValueError("a number that is not octal")
    return int(match.group(1) or b"0", 8)


def _path_of(data: bytes) -> str | None:
    """Return the ``path`` of a pax header's records ``<length> <key>=<value>\\n``, None without one."""
    path: str | None = None
    start = 0
    while start < len(data):
        digits, space, _ = data[start : start + 8].partition(b" ")
        if not space or not digits.isdigit():
            raise ValueError("a malformed pax header")
        record = data[start : start + int(digits)]
        key, equals, value = record[len(digits) + 1 : -1].partition(b"=")
        if len(record) != int(digits) or not equals or record[-1:] != b"\n":
            raise ValueError("a malformed pax header")
        if key == b"path":
            path = value.decode()
        elif key in (b"size", b"hdrcharset") or key.startswith(b"GNU.sparse"):
            raise ValueError(f"a pax header with {key.decode()}")
        start += int(digits)
    return path
