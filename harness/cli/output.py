"""Standard output and standard error that may go away while a command works, and signals that come too early.

A reader such as ``head`` has seen enough, a terminal is closed, a disk is full: what a command does and the code it
ends with do not depend on who reads along.
"""

import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any, NoReturn

# The reader or the terminal is gone; nothing is lost that anybody would read.
_GONE = (errno.EPIPE, errno.EIO)


class GuardedStream:
    """A text stream whose errors end nothing: the first one is kept in ``error``, and later text is dropped.

    Args:
        stream: what is guarded.
        notice: what to say of a loss on standard error, where that is worth a line.
    """

    def __init__(self, stream: Any, notice: str = "") -> None:
        self._stream, self._notice = stream, notice
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        """Write, unless an earlier write has failed; return the number of characters."""
        if self.error is None:
            try:
                self._stream.write(text)
            except OSError as error:
                self._lose(error)
        return len(text)

    def flush(self) -> None:
        """Flush, unless an earlier write has failed."""
        if self.error is None:
            try:
                self._stream.flush()
            except OSError as error:
                self._lose(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @property
    def lost(self) -> OSError | None:
        """The error by which text was lost that somebody would have read, such as that of a full disk; else None."""
        return None if self.error is None or self.error.errno in _GONE else self.error

    def _lose(self, error: OSError) -> None:
        self.error = error
        # What is still buffered would fail again when Python flushes it at its end, with a code of its own.
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
        if self._notice:
            print(f"q4kd: standard output cannot be written ({error.strerror}): {self._notice}", file=sys.stderr)


@contextlib.contextmanager
def guarded_streams(notice: str = "") -> Iterator[GuardedStream]:
    """Guard standard output, which is yielded, and standard error; letters that their encoding lacks are escaped."""
    _open_missing()
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as null:  # noqa: PTH123 - a device
        # A stream that was closed before the start is None, for which libraries are not prepared.
        present = [null if stream is None else stream for stream in before]
        yield from _guarded(present, before, notice)


def _guarded(present: Sequence[Any], before: tuple[Any, Any], notice: str) -> Iterator[GuardedStream]:
    for stream in present:
        if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    streams = out, err = GuardedStream(present[0], notice), GuardedStream(present[1])
    sys.stdout, sys.stderr = out, err
    try:
        yield out
    finally:
        for guard in streams:
            guard.flush()
        if (sys.stdout, sys.stderr) == streams:
            sys.stdout, sys.stderr = before


def _open_missing() -> None:
    """Open descriptors 0 to 2 where they are closed, so that no file of the run gets one and is written to as such."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


class Interrupt:
    """Remembers that Ctrl-C was pressed, a context manager: an import that it cuts off may fail in many other ways."""

    def __init__(self) -> None:
        self.came = False
        self._handles = False

    def __enter__(self) -> "Interrupt":
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._hear)
            self._handles = True
        return self

    def __exit__(self, *_error: object) -> None:
        if self._handles:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _hear(self, _number: int, _frame: FrameType | None) -> NoReturn:
        self.came = True
        raise KeyboardInterrupt
