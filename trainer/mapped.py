"""Files that are read through a memory map for as long as they are in use, and what to say when one is changed then.

The kernel answers a read of a page that a file has lost with SIGBUS. Python's own signal handlers come too late for it,
because the faulting instruction is repeated before they run, so a C handler is set that calls back.
"""

import contextlib
import ctypes
import errno
import hashlib
import os
import signal
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from q4kd.trainer.errors import (
    FileChangedError,
    InputError,
    OutOfMemoryError,
    for_terminal,
    is_out_of_memory,
    unreadable,
)
from q4kd.trainer.files import file_digest


class WatchedFile:
    """A file that must stay as it is while this object lives. A file that is renamed, removed or replaced does.

    A file that was merely touched, or written with what it held, is the same: where its digest is known, this decides.

    Args:
        path: the file.
        sha256: hexadecimal digest of its content, where it is known already; see ``sha256``.

    Raises:
        InputError: for a file that cannot be read.
        OutOfMemoryError: for one that cannot be mapped.
    """

    def __init__(self, path: Path, sha256: str | None = None) -> None:
        self.path = path.absolute()
        self._shown, self._sha256 = path, sha256
        try:
            with path.open("rb") as file:
                self._found = os.fstat(file.fileno())
                self._opened(file)
        except OSError as error:
            if is_out_of_memory(error):
                raise OutOfMemoryError(f"{path}: no room to map it; raise this shell's limit (ulimit -v)") from error
            raise unreadable(path, error, "a readable model file") from error
        _watched.add(self)
        _explain_bus_errors()

    def _opened(self, file: BinaryIO) -> None:
        """Do what a kind of file needs while it is open."""

    def sha256(self) -> str:
        """Return the hexadecimal SHA-256 of the content, read piece by piece the first time.

        Raises:
            OSError: when it cannot be read any more.
        """
        if self._sha256 is None:
            found = self._digest()
            if self.change():  # Some of it may have been read before the change and some after.
                return found
            self._sha256 = found
        return self._sha256

    def _digest(self) -> str:
        with self.path.open("rb") as file:
            if not self._is_same(os.fstat(file.fileno())):
                raise FileNotFoundError(errno.ENOENT, "another file has its name")
            return file_digest(file, "sha256")

    def _is_same(self, status: os.stat_result) -> bool:
        """Return whether a status is that of this very file, whatever it holds by now."""
        return (status.st_dev, status.st_ino) == (self._found.st_dev, self._found.st_ino)

    def _other_status(self) -> os.stat_result | None:
        """Return the file's status when its size, or the time at which it was written, is another than at first."""
        was = self._found
        try:
            now = self.path.stat()
        except OSError:
            return None  # It has no name any more, or one that cannot be reached; what is mapped of it stays.
        if not self._is_same(now) or (now.st_size, now.st_mtime_ns) == (was.st_size, was.st_mtime_ns):
            return None  # Another file has its name, or nothing was changed.
        return now

    def change(self) -> FileChangedError | None:
        """Return what to raise when the file's size, or the time at which it was written, is another than at first.

        Its content is not read, so that a handler of signals may ask.
        """
        now = self._other_status()
        return None if now is None else self._error(now)

    def _error(self, now: os.stat_result) -> FileChangedError:
        got = f"{now.st_size:,}" if now.st_size != self._found.st_size else "the same number, written since"
        return FileChangedError(self._shown, self._found.st_size, got)

    def check_unchanged(self) -> None:
        """Refuse to go on with a file that was changed. It costs one call of the system.

        Once a file of the same size has another time, its content is read again (1.8 GB/s here), if its digest is
        known: what was read of it so far, and what is mapped, are then what they were.

        Raises:
            FileChangedError: naming the file.
        """
        if (now := self._other_status()) is None:
            return
        with contextlib.suppress(OSError):
            if now.st_size == self._found.st_size and self._sha256 is not None and self._digest() == self._sha256:
                # The status is from before the content was read, so a write since then is seen the next time.
                self._found = now
                return
        raise self._error(now)


class MappedFile(WatchedFile):
    """A private, copy-on-write map of a whole file: torch gets a writable buffer, and the file is never written.

    Attributes:
        data: uint8 ``[bytes]``, the map. What others write to the file shows in it.

    Raises:
        InputError: for a file that is empty or cannot be read.
    """

    data: npt.NDArray[np.uint8]

    def _opened(self, file: BinaryIO) -> None:
        if not self._found.st_size:
            remedy = "download the file again"
            raise InputError(str(self._shown), expected="a model file", got="an empty one", remedy=remedy)
        self.data = np.asarray(np.memmap(file, np.uint8, "c"))

    def _digest(self) -> str:
        with contextlib.suppress(FileNotFoundError):
            return super()._digest()
        # It was removed or replaced; the map still shows it.
        return hashlib.sha256(self.data.data).hexdigest()

    @contextlib.contextmanager
    def reopened(self) -> Iterator[BinaryIO]:
        """Give the same file, opened once more to be read without the map.

        Raises:
            FileChangedError: when another file has its name by now.
            OSError: when it cannot be opened.
        """
        with self.path.open("rb", buffering=0) as file:
            if not self._is_same(os.fstat(file.fileno())):
                raise FileChangedError(self._shown, self._found.st_size, "another file")
            yield file


_watched: "weakref.WeakSet[WatchedFile]" = weakref.WeakSet()
# The address of the handler that was there before ours; 0 is the system's own.
_before: int | None = None
_is_ending = False


def _explain_bus_errors() -> None:
    """From now on, end the process with one line and exit code 66 when a watched file loses pages that are in use."""
    global _before
    if _before is None and sys.platform == "linux":
        _before = _set_handler(ctypes.cast(_handler, ctypes.c_void_p).value or 0)


def _set_handler(address: int) -> int:
    """Make the C function at ``address`` the handler of SIGBUS; return the address of the one before."""
    function = ctypes.CDLL(None).signal
    function.restype, function.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    return int(function(signal.SIGBUS, address) or 0)


def _on_bus_error(_number: int) -> None:
    global _is_ending
    for file in list(_watched):
        if error := file.change():
            # Threads meet it together. The others come back here until the first, which is writing, has ended us all.
            if _is_ending:
                return
            _is_ending = True
            _say(str(error))
            os._exit(FileChangedError.exit_code)
    _say("bus error: a file that is read through a memory map was cut, or its disk failed; look at the kernel's log")
    # The instruction is repeated when this returns, and meets the handler that was there before.
    _set_handler(_before or 0)


_handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(_on_bus_error)


def _say(line: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"q4kd: {for_terminal(line)}\n".encode(errors="replace"))
