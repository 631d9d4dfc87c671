"""Watches MemAvailable on devices that share the host's memory.

There, memory that CUDA allocates is not counted by cgroups, so no limit stops it; when it runs out the host hangs or
the kernel kills whichever process it likes. The watchdog ends this process first, with one clear line. Checkpoints are
written atomically, so the newest one survives.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Callable

from q4kd.trainer.device.devices import classify, cuda_facts, mem_available
from q4kd.trainer.device.memory_report import sized

EXIT_CODE = 75  # EX_TEMPFAIL: the same run may succeed when other programs hold less memory
_INTERVAL_S = 0.1
_IN_A_ROW = 3


class MemoryWatchdog:
    """Ends the process when MemAvailable stays below ``floor_bytes``; a context manager.

    Args:
        floor_bytes: bytes to leave to the host.
        read: function that returns MemAvailable in bytes.
        stop: function called with one line when the floor is broken; by default it prints the line and exits with
            ``EXIT_CODE``.
        interval_s: seconds between readings. Three low readings in a row count, so that a passing dip does not.
    """

    def __init__(
        self,
        floor_bytes: int,
        *,
        read: Callable[[], int] = mem_available,
        stop: Callable[[str], object] | None = None,
        interval_s: float = _INTERVAL_S,
    ) -> None:
        self._floor, self._read, self._interval = floor_bytes, read, interval_s
        self._stop = stop or _exit
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory-watchdog", daemon=True)

    def __enter__(self) -> "MemoryWatchdog":
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        low = 0
        while not self._over.wait(self._interval):
            available = self._read()
            low = low + 1 if available < self._floor else 0
            if low == _IN_A_ROW:
                self._stop(
                    f"memory: expected at least {sized(self._floor)} left to the host, got {sized(available)} "
                    f"(MemAvailable); lower batch_size or seq_len, or close other programs. "
                    f"Stopped before the machine would hang; --resume continues from the last checkpoint."
                )
                return


def guarded(device: str) -> contextlib.AbstractContextManager[object]:
    """Return a watchdog for a run on a device that shares the host's memory, else a context that does nothing."""
    if device == "cpu":
        return contextlib.nullcontext()
    import torch

    facts = cuda_facts(torch.cuda.current_device() if torch.cuda.is_available() else 0)
    if classify(facts.capability, facts.integrated) != "unified":
        return contextlib.nullcontext()
    return MemoryWatchdog(default_floor(facts.total_bytes))


def default_floor(total_bytes: int) -> int:
    """Return the floor for a machine with this much memory: 3 %, at least 1 GiB."""
    return max(1 << 30, total_bytes * 3 // 100)


def _exit(line: str) -> None:
    print(f"q4kd: {line}", file=sys.stderr, flush=True)
    os._exit(EXIT_CODE)
