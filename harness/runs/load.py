"""How much of a run was its own work, and how long it waited for a core that other programs had.

Both are the kernel's figures (``/proc/PID/task/*/schedstat``: nanoseconds on a core, nanoseconds in the run queue; see
the kernel's ``scheduler/sched-stats``), read from outside.
"""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_NS = 1e-9


class CpuClock:
    """Adds up the processor time of some processes, and the time in which the most delayed of their threads waited.

    Attributes:
        cpu_s: seconds on cores, of all threads together, as far as they lived when they were looked at.
        waited_s: seconds of wall time in which work waited for a core; 0 where the kernel does not say.
    """

    def __init__(self) -> None:
        self.cpu_s = self.waited_s = 0.0
        self._seen: dict[str, tuple[int, int]] = {}

    def look(self, pids: Iterable[int]) -> None:
        """Read the figures of these processes' threads."""
        delays = [0]
        for pid in pids:
            for thread, (ran, waited) in _threads(pid).items():
                ran_before, waited_before = self._seen.get(thread, (0, 0))
                self._seen[thread] = ran, waited
                self.cpu_s += max(0, ran - ran_before) * _NS
                delays.append(waited - waited_before)
        # Threads wait side by side, so their delays do not add up.
        self.waited_s += max(delays) * _NS


def _threads(pid: int) -> dict[str, tuple[int, int]]:
    """Return what each thread ran and waited, in nanoseconds, by its path under /proc."""
    found = {}
    with suppress(OSError):  # a process or a thread that has just ended
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError, ValueError):
                ran, waited, _ = (task / "schedstat").read_text(encoding="ascii").split()
                found[str(task)] = int(ran), int(waited)
    return found
