"""Ctrl-C, SIGTERM and SIGHUP: the run finishes its step, writes a checkpoint and ends; a second ends it at once."""

import contextlib
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

_HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequest:
    """Remembers the first signal while it is entered; a context manager.

    Handlers belong to the main thread. Entered in another thread, it remembers nothing and leaves signals as they are.

    Args:
        announce: whether this process says that it heard; one of several is enough.
    """

    def __init__(self, announce: bool = True) -> None:
        self.signal_number = 0
        self._announce = announce
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in _HANDLED:
                if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                    continue  # nohup: a terminal that closes is not to end the run
                self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *_error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        if self.signal_number:
            if number == signal.SIGHUP:
                return  # a terminal that closes sends it, and its shell does so again
            # No exception is raised: the program may be deep in a library that catches everything.
            _say("stopped at once; the newest checkpoint is whole")
            os._exit(128 + number)
        self.signal_number = number
        if self._announce:
            name = signal.Signals(number).name
            _say(f"{name}: finishing this step, then a checkpoint; once more stops at once")

    def agreed(self, accelerator: Any) -> int:
        """Return the signal that any process of the run has heard, 0 for none; all processes must call it.

        One process alone costs nothing. Several add two numbers over all of them, so that all stop at the same step.
        """
        if accelerator.num_processes == 1:
            return self.signal_number
        import torch

        heard = torch.tensor([self.signal_number == number for number in _HANDLED], dtype=torch.int32)
        counts = accelerator.reduce(heard.to(accelerator.device), reduction="sum").tolist()
        return next((int(number) for number, count in zip(_HANDLED, counts, strict=True) if count), 0)


def _say(line: str) -> None:
    # os.write, because print is not safe in a handler that interrupted another print. Who read may be gone by now.
    with contextlib.suppress(OSError):
        os.write(sys.__stderr__.fileno() if sys.__stderr__ is not None else 2, f"q4kd: {line}\n".encode())
