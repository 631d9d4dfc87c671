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
        self._parts: dict[str, dict[str, float]] = {name: {} for name in PHASES}
        self._running = [("other", "")]
        self._entered = dict.fromkeys(PHASES, 0)
        self.listener = listener
        self._lock = threading.Lock()

    def _count(self) -> None:
        now, (name, what) = time.monotonic(), self._running[-1]
        self._seconds[name] += now - self._last
        if what:
            self._parts[name][what] = self._parts[name].get(what, 0.0) + now - self._last
        self._last = now

    def enter(self, name: str, what: str = "") -> None:
        """Begin a phase inside the one that runs, or what it does by name.

        Raises:
            KeyError: for a name that is not one of ``PHASES``.
        """
        with self._lock:
            self._count()
            if name not in self._seconds:
                raise KeyError(name)
            self._running.append((name, what))
            self._entered[name] += 1

    def leave(self) -> None:
        """End the phase that was begun last."""
        with self._lock:
            self._count()
            self._running.pop()

    def spend(self, name: str, what: str) -> None:
        """Give the time that nothing has got yet, until now, to what a phase did."""
        with self._lock:
            self._running.append((name, what))
            self._count()
            self._running.pop()

    @contextmanager
    def phase(self, name: str, what: str = "") -> Iterator[None]:
        """Give the body's time to a phase; ``what`` it did is told to the listener at its end, when it is given."""
        begun = time.monotonic()
        self.enter(name, what)
        try:
            yield
        finally:
            self.leave()
        if what and self.listener is not None:
            self.listener(name, what, time.monotonic() - begun)

    @property
    def current(self) -> str:
        """The phase that runs now."""
        return self._running[-1][0]

    @property
    def entered(self) -> dict[str, int]:
        """How often each phase was begun."""
        return dict(self._entered)

    def seconds(self) -> dict[str, float]:
        """Return the seconds of every phase until now; their sum is the wall time."""
        with self._lock:
            self._count()
            return dict(self._seconds)

    def parts(self) -> dict[str, dict[str, float]]:
        """Return the seconds until now of what each phase did by name, without those of phases inside it."""
        with self._lock:
            self._count()
            return {name: dict(parts) for name, parts in self._parts.items() if parts}


_clock = WallClock(time.monotonic())


def start(begun: float | None = None, listener: Listener | None = None, *, imported: str = "") -> WallClock:
    """Set this process's clock going, from ``begun`` (of ``time.monotonic``) or from now on; return it.

    With ``imported``, the time from ``begun`` until now belongs to the phase "open", in which that was done.
    """
    global _clock
    _clock = WallClock(time.monotonic() if begun is None else begun, listener)
    if imported:
        _clock.spend("open", imported)
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
