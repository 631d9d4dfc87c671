"""The cores of this machine, handed out to runs: so many at one time as there are, all of them to one that is timed."""

import fcntl
import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

from q4kd.harness.runs.user_folder import lock_folder

# What a run takes of the memory, with room: torch and transformers hold 0.4 GB, the largest made model adds 0.7 GB.
RUN_BYTES = 1 << 30
_CGROUP = Path("/sys/fs/cgroup")


def usable_cores(cgroup: Path = _CGROUP) -> int:
    """Return the cores that this process may use: its affinity mask, or less where its cgroup has a CPU quota."""
    cores = len(os.sched_getaffinity(0))
    quota = _cpu_quota(cgroup)
    return max(1, cores if quota is None else min(cores, math.ceil(quota)))


def _cpu_quota(cgroup: Path) -> float | None:
    """Return the quota in cores: ``cpu.max`` of cgroup v2, or the two files of v1; None without a limit."""
    try:
        limit, period = (cgroup / "cpu.max").read_text(encoding="ascii").split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        pass
    try:
        limit_us, period_us = (
            int((cgroup / "cpu" / name).read_text(encoding="ascii"))
            for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        )
    except (OSError, ValueError):
        return None
    return limit_us / period_us if limit_us > 0 and period_us > 0 else None


def free_memory(cgroup: Path = _CGROUP) -> int:
    """Return the bytes that may still be taken: MemAvailable, or less where the container has a limit of its own."""
    available = psutil.virtual_memory().available
    for limit, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            total, taken = int((cgroup / limit).read_text()), int((cgroup / used).read_text())
            stat = dict(line.split() for line in (cgroup / limit).with_name("memory.stat").read_text().splitlines())
            available = min(available, max(0, total - taken + int(stat.get(cache, 0))))
        except (OSError, ValueError):
            continue  # there is no such cgroup, or its limit is "max"
    return available


def default_workers() -> int:
    """Return how many cores runs may take together: one in eight is left to the harness, and memory must do."""
    cores = usable_cores()
    return max(1, min(cores - cores // 8, free_memory() // RUN_BYTES))


def accelerator_lock() -> Path:
    """Return the lock file that keeps two experiments of this host, and of any session, off the accelerator at once."""
    return lock_folder() / "q4kd-accelerator.lock"


class Closed(Exception):  # noqa: N818 - nothing failed: the session ends
    """Raised to those who wait for cores when the session ends."""


@dataclass(eq=False)
class _Request:
    count: int
    alone: bool
    rank: float


class Cores:
    """Cores that runs take and give back. Thread-safe.

    Who waits is served by rank, lowest first; one that needs more cores than are free lets others pass it, so that no
    core is idle. A request that must be alone is passed by nobody, and waits until nothing else is under way.
    """

    def __init__(self, total: int) -> None:
        self.total = max(1, total)
        self._changed = threading.Condition()
        self._waiting: list[_Request] = []
        self._active: list[_Request] = []
        self._closed = False

    @contextmanager
    def taken(self, count: int = 1, *, alone: bool = False, rank: float = 0.0) -> Iterator[None]:
        """Hold ``count`` cores, at most all there are; 0 for work of the harness, which only gives way to a run alone.

        Raises:
            Closed: when the session ends before they are free.
        """
        mine = _Request(self.total if alone else min(count, self.total), alone, rank)
        with self._changed:
            self._waiting.append(mine)
            self._waiting.sort(key=lambda request: request.rank)
            try:
                self._changed.wait_for(lambda: self._closed or self._may_start(mine))
                if self._closed:
                    raise Closed
                self._active.append(mine)
            finally:
                self._waiting.remove(mine)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._active.remove(mine)
                self._changed.notify_all()

    @contextmanager
    def accelerator(self, *, alone: bool) -> Iterator[None]:
        """Hold the accelerator: with others that may share it, or alone, which waits until these have ended.

        Another session of this host may make us wait longer than this one lasts.

        Raises:
            Closed: when the session ends before it is free.
        """
        kind = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
        with accelerator_lock().open("a") as file:
            while not _locked(file, kind):
                if self._closed:
                    raise Closed
                time.sleep(0.2)
            yield

    @property
    def closed(self) -> bool:
        """Whether the session has ended."""
        return self._closed

    def close(self) -> None:
        """Let nobody start any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _may_start(self, mine: _Request) -> bool:
        if any(request.alone for request in self._active) or (mine.alone and self._active):
            return False
        free = self.total - sum(request.count for request in self._active)
        for request in self._waiting:
            if request is mine:
                break
            comes_first = mine.count > 0 and 0 < request.count <= free
            if request.alone or comes_first:
                return False
        return mine.count <= free


def _locked(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
