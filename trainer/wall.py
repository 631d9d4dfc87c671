"""Where a run's wall time goes: at every moment exactly one phase runs, so that the phases add up to the wall.

A process has one clock, because a process has one wall. ``start`` sets it going; ``with phase("load"):`` gives what
happens inside to that phase, without what an inner phase takes. Threads beside the one that trains take no wall time of
their own and enter no phase.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

PHASES = ("open", "load", "compile", "train", "evaluate", "save", "other")
# Called with the phase, what it did, and its seconds.
Listener = Callable[[str, str, float], None]


class WallClock:
    """Adds up seconds by phase since ``begun`` (of ``time.monotonic``); what is in no phase is ``other``."""

    def __init__(self, begun: float, listener: Listener | None = None) -> None:
        self._begun = self._last = begun
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._running = ["other"]
        self._entered = dict.fromkeys(PHASES, 0)
        self.listener = listener
        self._lock = threading.Lock()

    def _count(self) -> None:
        now = time.monotonic()
        self._seconds[self._running[-1]] += now - self._last
        self._last = now

    def enter(self, name: str) -> None:
        """Begin a phase inside the one that runs.

        Raises:
            KeyError: for a name that is not one of ``PHASES``.
        """
        with self._lock:
            self._count()
            if name not in self._seconds:
                raise KeyError(name)
            self._running.append(name)
            self._entered[name] += 1

    def leave(self) -> None:
        """End the phase that was begun last."""
        with self._lock:
            self._count()
            self._running.pop()

    @contextmanager
    def phase(self, name: str, what: str = "") -> Iterator[None]:
        """Give the body's time to a phase; ``what`` it did is told to the listener at its end, when it is given."""
        begun = time.monotonic()
        self.enter(name)
        try:
            yield
        finally:
            self.leave()
        if what and self.listener is not None:
            self.listener(name, what, time.monotonic() - begun)

    @property
    def current(self) -> str:
        """The phase that runs now."""
        return self._running[-1]

    @property
    def entered(self) -> dict[str, int]:
        """How often each phase was begun."""
        return dict(self._entered)

    def seconds(self) -> dict[str, float]:
        """Return the seconds of every phase until now; their sum is the wall time."""
        with self._lock:
            self._count()
            return dict(self._seconds)


_clock = WallClock(time.monotonic())


def start(begun: float | None = None, listener: Listener | None = None) -> WallClock:
    """Set this process's clock going, from ``begun`` (of ``time.monotonic``) or from now on; return it."""
    global _clock
    _clock = WallClock(time.monotonic() if begun is None else begun, listener)
    return _clock


def clock() -> WallClock:
    """Return this process's clock."""
    return _clock


def phase(name: str, what: str = "") -> AbstractContextManager[None]:
    """Give the body's time to a phase of this process's clock; see ``WallClock.phase``."""
    return _clock.phase(name, what)


def process_began() -> float:
    """Return when this process began, by ``time.monotonic``; now, where the system does not say."""
    now = time.monotonic()
    try:
        # The name of the program, in brackets, may hold anything; field 22 counts clock ticks since boot.
        fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
        ticks = int(fields[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return now
    return now - max(0.0, age)


def describe(seconds: dict[str, float]) -> str:
    """Return the phases in words, such as ``wall 163.2 s: open 1.2, load 4.0``."""
    parts = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    return f"wall {sum(seconds.values()):.1f} s: {parts}"
