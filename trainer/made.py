"""What a command made in a folder that others write to as well: it deletes nothing else.

A ledger in the folder lists each thing that was made there, with the size and the time of change of its files. What is
not listed, is a link, or has been changed or added to since, is somebody's work: it is refused, never deleted.
"""

import shutil
import stat
from collections.abc import Mapping
from pathlib import Path

from q4kd.trainer.errors import InputError
from q4kd.trainer.files import check_fields, read_json, write_json

LEDGER = ".q4kd-made.json"
LEDGER_VERSION = 1
_MAX_LEDGER = 64 << 20
_REMEDY = "move it elsewhere, or choose another folder: only what q4kd made there is replaced"
# Size in bytes and time of the last change in nanoseconds, by the file's path below the thing that was made.
Listing = dict[str, list[int]]


class MadeThings:
    """The things that q4kd made in ``root``, as its ledger says.

    Raises:
        InputError: when the ledger is not one.
    """

    def __init__(self, root: Path) -> None:
        self._root, self._path = root, root / LEDGER
        self._made: dict[str, Listing | None] = {}
        if self._path.is_symlink():
            raise InputError(str(self._path), expected="a file", got="a link", remedy=_REMEDY)
        if self._path.exists():
            try:
                fields = check_fields(read_json(self._path, _MAX_LEDGER), {"version": LEDGER_VERSION, "made": dict})
                if not all(listing is None or isinstance(listing, dict) for listing in fields["made"].values()):
                    raise ValueError("a listing that is none")
            except ValueError as error:
                expected, remedy = f"a ledger of version {LEDGER_VERSION}", "move it away; nothing is replaced then"
                raise InputError(str(self._path), expected=expected, got=str(error), remedy=remedy) from error
            self._made = fields["made"]

    def check(self, *names: str) -> None:
        """Refuse things under these names, paths below the root, that are not as q4kd made them.

        Raises:
            InputError: naming the first file that is not q4kd's.
        """
        for name in names:
            foreign = self._foreign(name)
            if foreign is not None:
                path, got = foreign
                raise InputError(str(path), expected="nothing, or what q4kd made", got=got, remedy=_REMEDY)

    def remove(self, *names: str) -> None:
        """Delete what q4kd made under these names; what is not there is forgotten.

        Raises:
            InputError: as ``check``; nothing is deleted then.
        """
        self.check(*names)
        for name in names:
            path = self._root / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        if any(self._made.pop(name, self) is not self for name in names):
            self._write()

    def own(self, *names: str) -> None:
        """Say that whatever is and will be under these names is q4kd's, until ``keep`` lists it.

        Raises:
            InputError: as ``check``.
        """
        self.check(*names)
        self._made |= dict.fromkeys(names)
        self._write()

    def begin(self, name: str) -> Path:
        """Remove what q4kd made under ``name``, and return the path for something new that is all its own.

        Raises:
            InputError: as ``check``.
        """
        self.remove(name)
        self.own(name)
        return self._root / name

    def keep(self, *names: str) -> None:
        """List what is under these names now; what is changed in it or added later is no longer q4kd's."""
        self._made |= {name: _listing(self._root / name) for name in names}
        self._write()

    def publish(self, draft: str, name: str) -> Path:
        """Give what was begun as ``draft`` its final name, at which q4kd's own is replaced; return its path.

        Raises:
            InputError: when something else is there; the draft is left.
            OSError: when it cannot be renamed.
        """
        self.remove(name)
        self._made[name] = _listing(self._root / draft)  # before the rename: a crash leaves nothing unlisted
        self._write()
        (self._root / draft).rename(self._root / name)
        self._made.pop(draft, None)
        self._write()
        return self._root / name

    def names(self, below: str) -> list[str]:
        """Return the names of things directly in the folder ``below`` that are there and are as q4kd made them."""
        found = (name for name in self._made if Path(name).parent.as_posix() == below)
        return sorted(name for name in found if (self._root / name).exists() and self._foreign(name) is None)

    def _foreign(self, name: str) -> tuple[Path, str] | None:
        """Return the first path under ``name`` that q4kd did not make, and what it is; None where all is q4kd's."""
        path = self._root / name
        if path.is_symlink():
            return path, "a link"
        if not path.exists():
            return None
        if name not in self._made:
            return path, f"a {'folder' if path.is_dir() else 'file'} that q4kd did not make"
        listed = self._made[name]
        if listed is None:
            return None
        found = _listing(path)
        for below in sorted(found):
            if below not in listed:
                return path / below, "a file that q4kd did not make"
            if found[below] != listed[below]:
                return path / below, "a file that was changed since q4kd wrote it"
        return None

    def _write(self) -> None:
        made: Mapping[str, Listing | None] = self._made
        write_json(self._path, {"version": LEDGER_VERSION, "made": made})


def _listing(path: Path) -> Listing:
    """Return the files at or below a path, links among them, by their paths below it; ``.`` is the path itself."""
    found = {}
    for file in [path, *path.rglob("*")] if path.is_dir() else [path]:
        status = file.lstat()
        if not stat.S_ISDIR(status.st_mode):
            found[file.relative_to(path).as_posix()] = [status.st_size, status.st_mtime_ns]
    return found
