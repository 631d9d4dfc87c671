"""Progress as JSON lines: the one channel through which the trainer tells others what it does.

Every line is ``{"v": 1, "event": NAME, "t": CLOCK_MONOTONIC seconds, "unix": seconds, ...}``. The monotonic clock is
the same in every process of a machine, so an observer's samples can be laid beside these times.
"""

import json
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

from q4kd.trainer.errors import unwritable

EVENT_VERSION = 1


class EventLog:
    """Append-only event file; without a path, events are dropped.

    Raises:
        InputError: when the file cannot be opened for appending.
    """

    def __init__(self, path: Path | None) -> None:
        self._file: IO[str] | None = None
        self._lock = threading.Lock()
        self._listeners: list[Callable[[str, Mapping[str, object]], None]] = []
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = path.open("a", encoding="utf-8", buffering=1)
            except OSError as error:
                raise unwritable(str(path), error, "a writable file") from error

    def emit(self, event: str, **fields: object) -> None:
        """Write one event. A number that is not finite is written as its name, since JSON has no NaN."""
        for listener in self._listeners:
            listener(event, fields)
        if self._file is None:
            return
        clean = {key: _finite(value) for key, value in fields.items()}
        line = {"v": EVENT_VERSION, "event": event, "t": time.monotonic(), "unix": time.time(), **clean}
        with self._lock:  # The thread that writes checkpoints has events of its own.
            self._file.write(json.dumps(line, allow_nan=False) + "\n")

    def listen(self, listener: Callable[[str, Mapping[str, object]], None]) -> None:
        """Call ``listener`` with the name and the fields of every event from now on, before it is written."""
        self._listeners.append(listener)

    def start(self) -> None:
        """Emit ``process_start`` with this process's id."""
        self.emit("process_start", pid=os.getpid())

    def close(self) -> None:
        """Close the file; later events are dropped."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _finite(value: object) -> object:
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value
