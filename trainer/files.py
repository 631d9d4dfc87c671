"""Files are read within bounds and written whole: nobody sees half a file, and a hostile one gets bounded memory."""

import contextlib
import hashlib
import json
import math
import os
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, BinaryIO

from q4kd.trainer.errors import InputError, unreadable

FieldKind = type | UnionType | int
# A tokenizer of 262,144 tokens and twice as many merges has 2 million. Python holds an empty list in 56 bytes.
MAX_ITEMS = 8_000_000
# A thread beside one that imports waits up to 5 ms for the interpreter between any two pieces.
_DIGEST_BYTES = 32 << 20


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that after a crash the old or the new content is there, never a mixture.

    Raises:
        OSError: when the folder cannot be written; the old file is then untouched.
    """
    with replacing(path) as file:
        file.write(data)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a file to write; it takes the place of ``path`` when the body ends without an error, whole and synced.

    Raises:
        OSError: as ``write_atomic``.
    """
    with replacing_path(path) as temporary, temporary.open("wb") as file:
        yield file


@contextlib.contextmanager
def replacing_path(path: Path) -> Iterator[Path]:
    """Yield the path of an empty file beside ``path``, which takes its place as the file of ``replacing`` does.

    Raises:
        OSError: as ``write_atomic``.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    handle = _create(temporary)
    try:
        yield temporary
        os.fsync(handle)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(handle)
    sync_folder(path.parent)


def _create(path: Path) -> int:
    """Create a file and return its descriptor. The kernel applies the umask to its mode, as to every other file's."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def apply_umask(folder: Path) -> None:
    """Give every file in a folder the mode of a new one: safetensors' own writer keeps its files to their owner.

    The umask is read off a new file, because asking for it would change it for a moment, for other threads too.

    Raises:
        OSError: when the folder cannot be written.
    """
    probe = folder / f".umask.{secrets.token_hex(4)}.tmp"
    handle = _create(probe)
    try:
        mode = stat.S_IMODE(os.fstat(handle).st_mode)
    finally:
        os.close(handle)
        probe.unlink()
    for path in folder.iterdir():
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as sorted, indented JSON, atomically. NaN and infinities are refused (ValueError)."""
    write_atomic(path, (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode())


def usable_cores() -> int:
    """Return how many cores this process may use by its affinity."""
    # Linux alone knows a process's own.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def sha256_file(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file, read piece by piece."""
    with path.open("rb") as file:
        return file_digest(file, "sha256")


def file_digest(file: BinaryIO, name: str) -> str:
    """Return the hexadecimal digest of what is left of a file, read in pieces that leave the interpreter to others.

    ``hashlib.file_digest`` asks for the interpreter twice for every 256 KiB, and a thread that keeps it busy hands it
    over every 5 ms.

    Args:
        file: opened for reading bytes.
        name: of the algorithm, as hashlib knows it.
    """
    digest = hashlib.new(name)
    buffer = memoryview(bytearray(min(_DIGEST_BYTES, os.fstat(file.fileno()).st_size + 1)))
    while count := file.readinto(buffer):  # type: ignore[attr-defined]
        digest.update(buffer[:count])
    return digest.hexdigest()


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """Read a file of at most ``max_bytes``.

    Raises:
        InputError: when the file is missing, unreadable or larger.
    """
    try:
        with path.open("rb") as file:
            # A read makes room for all that it is asked for, so it is asked for no more than the file has.
            step, parts, left = max(1 << 20, os.fstat(file.fileno()).st_size + 1), [], max_bytes + 1
            while left and (part := file.read(min(step, left))):
                parts.append(part)
                left -= len(part)
        data = b"".join(parts)
    except OSError as error:
        raise unreadable(path, error) from error
    if len(data) > max_bytes:
        expected, remedy = f"at most {max_bytes} bytes", "name the file that is meant; no such file is so large"
        raise InputError(str(path), expected=expected, got="a larger file", remedy=remedy)
    return data


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def _unique_keys(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"duplicate key {key!r}")
        result[key] = value
    return result


def count_items(data: bytes) -> int:
    """Return no less than the values in JSON or JSON lines, at memory speed: brackets, commas and ends of lines."""
    return sum(data.count(mark) for mark in (b"[", b"{", b",", b"\n"))


def parse_json(data: bytes, origin: str, max_bytes: int = 64 << 20, max_items: int = MAX_ITEMS) -> Any:
    """Parse strict JSON: bounded size, no more items (``count_items``), no duplicate keys, no NaN or Infinity.

    Raises:
        InputError: naming ``origin`` and what is wrong.
    """
    try:
        if len(data) > max_bytes:
            raise ValueError(f"{len(data)} bytes, more than {max_bytes}")
        if (items := count_items(data)) > max_items:
            raise ValueError(f"{items} brackets, commas and lines, more than {max_items}")
        return json.loads(data, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        remedy = "regenerate the file; do not edit it by hand"
        raise InputError(origin, expected="strict JSON", got=str(error)[:200], remedy=remedy) from error


def read_json(path: Path, max_bytes: int = 64 << 20) -> Any:
    """Read and parse a strict JSON file (see ``parse_json``)."""
    return parse_json(read_bounded(path, max_bytes), str(path), max_bytes)


def check_fields(document: object, kinds: Mapping[str, FieldKind]) -> dict[str, Any]:
    """Return a JSON object that has exactly the named fields, each of its type; nothing is converted.

    Args:
        document: a value that was read from JSON.
        kinds: each field's type, or the one number that it must be, such as a format's version. True is no number, 1 is
            no float, and a float is finite.

    Raises:
        ValueError: naming the first field that is absent, unknown or of another type.
    """
    if not isinstance(document, dict):
        raise ValueError(f"{type(document).__name__} in place of an object")
    for name, kind in kinds.items():
        if isinstance(kind, int) and document.get(name) != kind:
            raise ValueError(f"{name} {document.get(name)!r:.60}")
    for name in sorted(document.keys() ^ kinds.keys()):
        raise ValueError(f"no {name}" if name in kinds else f"an unknown field {name[:60]!r}")
    for name, kind in kinds.items():
        value, wanted = document[name], int if isinstance(kind, int) else kind
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            raise ValueError(f"{name} {value!r:.60}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} {value!r}")
    return document
