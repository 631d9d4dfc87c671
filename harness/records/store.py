"""Files of a bundle, read with bounds: from a folder, from a tar archive in memory, or from a part of either.

A bundle comes from someone else. Nothing here follows a link, leaves its root or unpacks to disk.
"""

import io
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from q4kd.harness.records.json_types import JsonRecord
from q4kd.harness.records.tar_archive import REMEDY, read_members, safe_name, too_large
from q4kd.trainer.errors import InputError
from q4kd.trainer.files import count_items, parse_json

# The gate's bundle has 32 MB, 900 files and 138,000 items, 13,000 of them in one file.
MAX_FILE = 64 << 20
MAX_TOTAL = 256 << 20
MAX_FILES = 20_000
MAX_DEPTH = 64
# Items (``count_items``) of one JSON file, and of all of a bundle: parsing them takes some 4 microseconds each.
MAX_ITEMS = 1_000_000
MAX_ALL_ITEMS = 2_000_000


class Store(Protocol):
    """Files by name. Names are relative, with ``/``, and never hold ``..``."""

    def names(self, below: str = "") -> list[str]:
        """Return the names of all files, sorted; with ``below``, of those under that folder (``runs/load-teacher/``).

        Nothing outside that folder is looked at: a run that has ended is read while its neighbours still write.
        """
        ...

    def read(self, name: str, max_bytes: int = MAX_FILE) -> bytes:
        """Return the bytes of one file.

        Raises:
            InputError: when there is no such file or it is larger than ``max_bytes``.
        """
        ...


def _missing(origin: str, name: str) -> InputError:
    return InputError(origin, expected=f"the file {name}", got="none", remedy="the evidence is incomplete")


class DirectoryStore:
    """The files below a folder (InputError when it is none). Links and anything else not a plain file are refused."""

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise InputError(str(root), expected="a folder", got="none", remedy="name the folder of a bundle")
        self.root = root
        self._items = _Items(str(root))

    def names(self, below: str = "") -> list[str]:
        """Return the names of all files, sorted (see ``Store``)."""
        found: list[str] = []
        start = safe_name(below.rstrip("/"), str(self.root)) if below else ""
        if any(folder.is_symlink() or not folder.is_dir() for folder in self._folders(start)):
            return []
        pending = [start]
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

    def _folders(self, start: str) -> list[Path]:
        """Return the folders on the way from the root down to a folder, itself included."""
        parts = start.split("/") if start else []
        return [self.root.joinpath(*parts[: number + 1]) for number in range(len(parts))]

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
            raise too_large(str(self.root), name, max_bytes)
        self._items.take(name, data)
        return data


class _Items:
    """Counts the items of the JSON files of one bundle before any is parsed: few bytes can stand for many objects."""

    def __init__(self, origin: str) -> None:
        self._origin = origin
        self._counts: dict[str, int] = {}

    def take(self, name: str, data: bytes) -> None:
        """Count those of a file (InputError when there are too many in it, or in all)."""
        if not name.endswith((".json", ".jsonl")):
            return
        self._counts[name] = count = count_items(data)
        if count > MAX_ITEMS:
            raise InputError(
                f"{self._origin}: {name}", expected=f"at most {MAX_ITEMS} items", got=str(count), remedy=REMEDY
            )
        if (total := sum(self._counts.values())) > MAX_ALL_ITEMS:
            expected = f"at most {MAX_ALL_ITEMS} items in all JSON files"
            raise InputError(self._origin, expected=expected, got=str(total), remedy=REMEDY)


class MemoryStore:
    """Files held in memory, by name: the same bytes whenever they are read. ``origin`` names them in errors."""

    def __init__(self, files: Mapping[str, bytes], origin: str) -> None:
        self.files, self.origin = dict(sorted(files.items())), origin

    def names(self, below: str = "") -> list[str]:
        """Return the names of all files, sorted (see ``Store``)."""
        return [name for name in self.files if name.startswith(below)]

    def read(self, name: str, max_bytes: int = MAX_FILE) -> bytes:
        """Return the bytes of one file (see ``Store``)."""
        data = self.files.get(name)
        if data is None:
            raise _missing(self.origin, name)
        if len(data) > max_bytes:
            raise too_large(self.origin, name, max_bytes)
        return data


class TarStore(MemoryStore):
    """The files of a ``.tar``, ``.tar.gz`` or ``.tar.xz``, read once into memory; ``unpacked`` is their size in bytes.

    Links, devices, repeated names, names outside the archive and anything beyond the bounds refuse the whole archive.
    A single folder that holds everything is taken as the root, so ``tar czf b.tar.gz bundle/`` works.
    """

    def __init__(self, source: Path | bytes, origin: str | None = None, max_total: int = MAX_TOTAL) -> None:
        """Read an archive of at most ``max_total`` bytes unpacked (InputError when it is refused)."""
        origin = origin or (str(source) if isinstance(source, Path) else "archive")
        try:
            with source.open("rb") if isinstance(source, Path) else io.BytesIO(source) as file:
                members, self.unpacked = read_members(
                    file, origin, max_file=MAX_FILE, max_total=max_total, max_files=MAX_FILES
                )
        except OSError as error:
            raise InputError(origin, expected="an archive of a bundle", got=str(error)[:200], remedy=REMEDY) from error
        items = _Items(origin)
        for name, data in members.items():
            items.take(name, data)
        super().__init__(_strip_root(members), origin)


def snapshot(store: Store, origin: str) -> MemoryStore:
    """Return all files of a store as they are now (InputError for more than 256 MB together, or unreadable ones).

    What is checked is then what was hashed, even when somebody writes to the folder meanwhile.
    """
    files: dict[str, bytes] = {}
    left = MAX_TOTAL
    for name in store.names():
        files[name] = store.read(name)
        left -= len(files[name])
        if left < 0:
            raise InputError(origin, expected=f"at most {MAX_TOTAL} bytes", got="more", remedy=REMEDY)
    return MemoryStore(files, origin)


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
        self.store, self.prefix = store, prefix.rstrip("/") + "/"

    def names(self, below: str = "") -> list[str]:
        """Return the names of all files, sorted (see ``Store``)."""
        return [name[len(self.prefix) :] for name in self.store.names(self.prefix + below)]

    def read(self, name: str, max_bytes: int = MAX_FILE) -> bytes:
        """Return the bytes of one file (see ``Store``)."""
        return self.store.read(self.prefix + name, max_bytes)


def parse_shallow(data: bytes, origin: str, max_bytes: int = MAX_FILE) -> Any:
    """Parse strict JSON (see ``parse_json``) of at most 64 levels, which nothing that walks it can overflow on."""
    value = parse_json(data, origin, max_bytes, MAX_ITEMS)
    if data.count(b"{") + data.count(b"[") > MAX_DEPTH and depth(value) > MAX_DEPTH:
        raise InputError(origin, expected=f"at most {MAX_DEPTH} levels", got="deeper nesting", remedy=REMEDY)
    return value


def depth(value: object) -> int:
    """Return how deep a JSON value is nested, without recursion."""
    deepest, pending = 0, [(value, 1)]
    while pending:
        item, level = pending.pop()
        deepest = max(deepest, level)
        if isinstance(item, (dict, list)):
            pending += [(below, level + 1) for below in (item.values() if isinstance(item, dict) else item)]
    return deepest


def read_object(store: Store, name: str, origin: str = "") -> JsonRecord:
    """Return a JSON file whose top is an object (InputError, by ``origin`` or else ``name``, for anything else)."""
    value = parse_shallow(store.read(name), origin or name)
    if not isinstance(value, dict):
        raise InputError(origin or name, expected="a JSON object", got=type(value).__name__, remedy=REMEDY)
    return value


def open_store(path: Path) -> Store:
    """Return the store of a bundle: a folder, or a ``.tar.xz`` or ``.tar.gz`` file (InputError when it is neither)."""
    if path.is_dir():
        return DirectoryStore(path)
    if path.is_file():
        return TarStore(path)
    remedy = "name what `q4kd falsify` wrote: its line `evidence:` says where"
    raise InputError(str(path), expected="a bundle folder, .tar.xz or .tar.gz", got="no such file", remedy=remedy)
