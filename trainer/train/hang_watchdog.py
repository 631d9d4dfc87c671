"""Ends a run that hangs, after writing where every thread is.

A thread of its own looks at a counter that each step raises, so a step pays for one addition. It needs the interpreter:
code that hangs while it holds the GIL hangs the watchdog too (torch, NCCL, files and sockets release it). The timer of
faulthandler does not need it, but exits with 1 and without an event, and counts the time for which a process was
stopped (SIGSTOP), so that it would end a run that is continued.
"""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from q4kd.trainer.events import EventLog

EXIT_CODE = 124  # timeout(1) has the same.
_CHECKS = 20
_LONGEST_INTERVAL_S = 5.0


class HangWatchdog:
    """Ends the process when nothing is reported for ``seconds``; a context manager.

    Time in which this process could not run at all (a suspended machine, SIGSTOP) does not count.

    Args:
        seconds: seconds that a step may take; 0 never ends anything.
        folder: folder in which ``hang-step-N.txt`` is written.
        events: log that receives a ``hang`` event.
        rank: rank of this process among several, for the file's name.
        stop: function called at the end; by default it exits with ``EXIT_CODE``.
    """

    def __init__(
        self, seconds: float, folder: Path, events: EventLog, *, rank: int = 0, stop: Callable[[], object] | None = None
    ) -> None:
        self._seconds, self._folder, self._events, self._rank = seconds, folder, events, rank
        self._stop = stop or (lambda: os._exit(EXIT_CODE))
        self._beats = self._step = 0
        self._doing, self._allowed = "", seconds
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hang-watchdog", daemon=True)

    def __enter__(self) -> "HangWatchdog":
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def beat(self, step: int) -> None:
        """Say that ``step`` steps are done and the next one begins."""
        self._step = step
        self._beats += 1

    @contextlib.contextmanager
    def allowing(self, doing: str, times: int) -> Iterator[None]:
        """Allow what is not a step ``times`` the seconds of one, such as an evaluation of so many batches."""
        before = self._doing, self._allowed
        self._doing, self._allowed = doing, self._seconds * times
        self._beats += 1
        try:
            yield
        finally:
            self._doing, self._allowed = before
            self._beats += 1

    def _watch(self) -> None:
        interval = min(_LONGEST_INTERVAL_S, self._seconds / _CHECKS)
        beats, quiet, last = self._beats, 0.0, time.monotonic()
        while not self._over.wait(interval):
            now = time.monotonic()
            quiet += min(now - last, 2 * interval)
            last = now
            if self._beats != beats:
                beats, quiet = self._beats, 0.0
            elif quiet > self._allowed:
                self._report(quiet)
                self._stop()
                return

    def _report(self, quiet: float) -> None:
        doing = self._doing or f"step {self._step + 1}"
        suffix = f"-rank-{self._rank}" if self._rank else ""
        path = self._folder / f"hang-step-{self._step + 1:06d}{suffix}.txt"
        line = f"{doing}: expected an end within {self._allowed:g} s, got none after {quiet:.0f} s"
        where, remedy = f"stacks of all threads in {path}", "if steps are just slow, raise hang_s"
        try:
            with path.open("w", encoding="utf-8") as file:
                file.write(line + "\n")
                _dump(file)
        except OSError as error:
            where = f"stacks not saved ({error.strerror})"
        with contextlib.suppress(OSError, ValueError):
            self._events.emit("hang", step=self._step + 1, doing=doing, seconds=quiet, path=path.name)
        said = f"q4kd: {line}; {where}; {remedy}; --resume continues from the last checkpoint"
        print(said, file=sys.stderr, flush=True)
        with contextlib.suppress(OSError, ValueError, AttributeError):
            _dump(sys.stderr)


def _dump(file: "IO[Any]") -> None:
    file.flush()
    faulthandler.dump_traceback(file, all_threads=True)
