"""Files of a bundle, read with bounds: from a folder, from a tar archive in memory, or from a part of either.

A bundle comes from someone else. Nothing here follows a link, leaves its root or unpacks to disk.
"""

import gzip
import io
import os
import stat
import struct
import tarfile
import zlib
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol

from q4kd.trainer.errors import InputError
from q4kd.trainer.files import parse_json

MAX_FILE = 64 << 20
MAX_TOTAL = 512 << 20
MAX_FILES = 20_000
REMEDY = "ask for the bundle again; this one cannot be trusted"


class Store(Protocol):
    """Files by name. Names are relative, with ``/``, and never hold ``..``."""

    def names(self) -> list[str]:
        """Return the names of all files, sorted."""
        ...

    def read(self, name: str, max_bytes: int = MAX_FILE) -> bytes:
        """Return the bytes of one file.

        Raises:
            InputError: when there is no such file or it is larger than ``max_bytes``.
        """
        ...


def safe_name(name: str, origin: str) -> str:
    """Return ``name`` when it stays inside its root.

    Raises:
        InputError: absolute, ``..``, empty parts, backslashes, control characters, or longer than 400 characters.
    """
    parts = name.split("/")
    bad = not name.isprintable() or "\\" in name or len(name) > 400
    if bad or any(part in ("", ".", "..") for part in parts) or PurePosixPath(name).is_absolute():
        raise InputError(origin, expected="names inside the bundle", got=repr(name)[:120], remedy=REMEDY)
    return name


def _missing(origin: str, name: str) -> InputError:
    return InputError(origin, expected=f"the file {name}", got="none", remedy="the evidence is incomplete")


def _too_large(origin: str, name: str, max_bytes: int) -> InputError:
    return InputError(f"{origin}: {name}", expected=f"at most {max_bytes} bytes", got="more", remedy=REMEDY)


class DirectoryStore:
    """The files below a folder. A symbolic link anywhere below it is refused, as is anything not a plain file."""

    def __init__(self, root: Path) -> None:
        """Take the folder ``root`` (InputError when it is not one)."""
        if not root.is_dir():
            raise InputError(str(root), expected="a folder", got="none", remedy="check the path")
        self.root = root

    def names(self) -> list[str]:
        """Return the names of all files, sorted (see ``Store``)."""
        found: list[str] = []
        pending = [""]
        while pending:
            prefix = pending.pop()
            with os.scandir(self.root / prefix if prefix else self.root) as entries:
                for entry in entries:
                    name = safe_name(f"{prefix}/{entry.name}" if prefix else entry.name, str(self.root))
                    if entry.is_symlink():
                        raise InputError(str(self.root), expected="no links", got=f"a link {name}", remedy=REMEDY)
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(name)
                    elif entry.is_file(follow_symlinks=False):
                        found.append(name)
                    else:
                        raise InputError(str(self.root), expected="plain files", got=name, remedy=REMEDY)
            if len(found) + len(pending) > MAX_FILES:
                raise InputError(str(self.root), expected=f"at most {MAX_FILES} files", got="more", remedy=REMEDY)
        return sorted(found)

    def read(self, name: str, max_bytes: int = MAX_FILE) -> bytes:
        """Return the bytes of one file (see ``Store``). Each part of the path is opened without following links."""
        safe_name(name, str(self.root))
        folder = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            parts = name.split("/")
            for part in parts[:-1]:
                below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
                os.close(folder)
                folder = below
            # Without O_NONBLOCK, opening a pipe that nobody writes to would wait for ever.
            handle = os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
        except OSError as error:
            raise _missing(str(self.root), name) from error
        finally:
            os.close(folder)
        with os.fdopen(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise _missing(str(self.root), name)
            data = file.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise _too_large(str(self.root), name, max_bytes)
        return data


class TarStore:
    """The files of a ``.tar`` or ``.tar.gz``, read once into memory and never unpacked.

    Links, devices, repeated names, names outside the archive and anything beyond the bounds refuse the whole archive.
    A single folder that holds everything is taken as the root, so ``tar czf b.tar.gz bundle/`` works.
    """

    def __init__(self, source: Path | bytes, origin: str | None = None, max_total: int = MAX_TOTAL) -> None:
        """Read an archive of at most ``max_total`` bytes unpacked (InputError when it is refused)."""
        self.origin = origin or (str(source) if isinstance(source, Path) else "archive")
        try:
            with source.open("rb") if isinstance(source, Path) else io.BytesIO(source) as file:
                members = self._read_all(file, max_total)
        except (
            OSError,
            EOFError,
            tarfile.TarError,
            zlib.error,
            struct.error,
            ValueError,
            ArithmeticError,
            LookupError,
        ) as error:
            raise InputError(self.origin, expected="a .tar.gz archive", got=str(error)[:200], remedy=REMEDY) from error
        self._files = _strip_root(members)

    def _read_all(self, file: IO[bytes], max_total: int) -> dict[str, bytes]:
        compressed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        # The bound sits on the decompressed stream, so headers and padding count as well as contents.
        stream = _Bounded(gzip.GzipFile(fileobj=file) if compressed else file, max_total, self.origin)
        members: dict[str, bytes] = {}
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            for count, member in enumerate(archive):
                if count > MAX_FILES:
                    raise InputError(self.origin, expected=f"at most {MAX_FILES} members", got="more", remedy=REMEDY)
                name = member.name.removeprefix("./").rstrip("/")
                if member.isdir():
                    if name not in ("", "."):
                        safe_name(name, self.origin)
                    continue
                safe_name(name, self.origin)
                if not member.isreg() or member.issparse():
                    raise InputError(self.origin, expected="plain files", got=f"{name!r}, not one", remedy=REMEDY)
                if name in members:
                    raise InputError(self.origin, expected="each name once", got=f"{name!r} twice", remedy=REMEDY)
                if member.size > MAX_FILE:
                    raise _too_large(self.origin, name, MAX_FILE)
                content = archive.extractfile(member)
                data = content.read() if content is not None else b""
                if len(data) != member.size:
                    raise InputError(self.origin, expected="a whole archive", got="a cut one", remedy=REMEDY)
                members[name] = data
        return members

    def names(self) -> list[str]:
        """Return the names of all files, sorted (see ``Store``)."""
        return sorted(self._files)

    def read(self, name: str, max_bytes: int = MAX_FILE) -> bytes:
        """Return the bytes of one file (see ``Store``)."""
        if name not in self._files:
            raise _missing(self.origin, name)
        if len(self._files[name]) > max_bytes:
            raise _too_large(self.origin, name, max_bytes)
        return self._files[name]


class _Bounded(io.RawIOBase):
    """A stream that ends with an error, not with memory, after ``limit`` bytes."""

    def __init__(self, source: IO[bytes] | gzip.GzipFile, limit: int, origin: str) -> None:
        self.source, self.left, self.origin = source, limit, origin

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        wanted = self.left + 1 if size < 0 else min(size, self.left + 1)
        data = self.source.read(wanted)
        self.left -= len(data)
        if self.left < 0:
            raise InputError(self.origin, expected="a bounded archive", got="more bytes than that", remedy=REMEDY)
        return data


def _strip_root(members: dict[str, bytes]) -> dict[str, bytes]:
    roots = {name.partition("/")[0] for name in members}
    if len(roots) != 1 or any("/" not in name for name in members):
        return members
    root = roots.pop()
    # A lone run packed as `runs/…` keeps its prefix: `runs` is part of the layout, not a wrapper.
    return members if root == "runs" else {name[len(root) + 1 :]: data for name, data in members.items()}


class PrefixStore:
    """The files of another store below ``prefix``, such as ``runs/load-teacher/``."""

    def __init__(self, store: Store, prefix: str) -> None:
        """Take the files of ``store`` whose names start with ``prefix``."""
        self.store, self.prefix = store, prefix.rstrip("/") + "/"

    def names(self) -> list[str]:
        """Return the names of all files, sorted (see ``Store``)."""
        return [name[len(self.prefix) :] for name in self.store.names() if name.startswith(self.prefix)]

    def read(self, name: str, max_bytes: int = MAX_FILE) -> bytes:
        """Return the bytes of one file (see ``Store``)."""
        return self.store.read(self.prefix + name, max_bytes)


def read_object(store: Store, name: str) -> dict[str, Any]:
    """Return a JSON file whose top is an object (InputError when it is anything else)."""
    value = parse_json(store.read(name), name)
    if not isinstance(value, dict):
        raise InputError(name, expected="a JSON object", got=type(value).__name__, remedy=REMEDY)
    return value


def open_store(path: Path) -> Store:
    """Return the store of a bundle: a folder, or a ``.tar.gz`` file (InputError when it is neither)."""
    if path.is_dir():
        return DirectoryStore(path)
    if path.is_file():
        return TarStore(path)
    raise InputError(str(path), expected="a bundle folder or .tar.gz", got="no such file", remedy="check the path")
