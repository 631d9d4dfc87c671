"""Memory of a running process tree, measured from outside it and written as JSON lines.

``python -P -m q4kd.harness.runs.memory PID FILE INTERVAL`` samples until its standard input closes. A process of its
own keeps its rhythm while the harness judges other runs; a thread of the harness lost up to 1.6 s, and a peak with it.
"""

import importlib
import json
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import psutil

# A tree is walked less often than it is measured: the walk reads every process of the machine.
_WALK_EVERY_S = 0.2


class MemoryLog:
    """Samples one process tree into ``path``.

    A line is ``{"t", "pid", "rss", "rss_anon", "processes", "mem_available"}``, bytes and CLOCK_MONOTONIC seconds, and
    with an NVIDIA device also ``gpu_bytes`` (this tree's, null when the driver does not say), ``gpu_sm`` (percent of
    the multiprocessors' time, this tree's processes only), ``gpu_util`` (percent, whole device) and ``gpu_others``
    (bytes held by processes outside the tree). ``rss_anon`` leaves out mapped files, such as a GGUF read by mmap.

    Args:
        path: the file to append to; None only follows which processes belong to the tree.
        pid: the root of the tree.
    """

    def __init__(self, path: Path | None, pid: int) -> None:
        self._file: IO[str] | None = path.open("a", encoding="utf-8", buffering=1) if path is not None else None
        self._pid = pid
        self._walked = 0.0
        self.tree: dict[int, psutil.Process] = {}
        self._gpu = GpuMeter.open() if path is not None else None
        with suppress(psutil.NoSuchProcess):
            self.tree[pid] = psutil.Process(pid)

    def sample(self) -> None:
        """Measure once and write one line; writes nothing when the whole tree is gone."""
        now = time.monotonic()
        if now - self._walked >= _WALK_EVERY_S:
            self._walk()
            self._walked = now
        if self._file is None:
            return
        resident = anonymous = alive = 0
        for process in self.tree.values():
            if (sizes := resident_bytes(process)) is not None:
                resident, anonymous, alive = resident + sizes[0], anonymous + sizes[1], alive + 1
        if not resident:
            return
        # Digits that no check reads are a third of a compressed log: 0.1 ms, and whole MiB of what others may take.
        line: dict[str, float | None] = {
            "t": round(now, 4),
            "pid": self._pid,
            "rss": resident,
            "rss_anon": anonymous,
            "processes": alive,
        }
        line["mem_available"] = psutil.virtual_memory().available >> 20 << 20
        if self._gpu is not None:
            line |= self._gpu.sample(set(self.tree))
        self._file.write(json.dumps(line) + "\n")

    def _walk(self) -> None:
        for process in list(self.tree.values()):
            try:
                for child in process.children(recursive=True):
                    self.tree.setdefault(child.pid, child)
            except psutil.Error:
                continue
            if process.pid == self._pid:
                break  # while the root lives its recursive children are the whole tree

    def close(self) -> None:
        """Close the file and the GPU handle."""
        if self._file is not None:
            self._file.close()
        if self._gpu is not None:
            self._gpu.close()


class Sampler:
    """A process that samples the tree of ``pid`` into ``path`` every ``interval_s`` seconds until it is stopped."""

    def __init__(self, path: Path, pid: int, interval_s: float) -> None:
        words = [sys.executable, "-P", "-m", "q4kd.harness.runs.memory", str(pid), str(path), str(interval_s)]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, start_new_session=True)

    def stop(self) -> None:
        """End it. Nothing is written afterwards."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def main(words: list[str]) -> int:
    """Sample until standard input closes: ``PID FILE INTERVAL``. Returns 0."""
    pid, path, interval_s = int(words[0]), Path(words[1]), float(words[2])
    log, due = MemoryLog(path, pid), time.monotonic()
    while not select.select([sys.stdin], [], [], max(0.0, due - time.monotonic()))[0]:
        log.sample()
        due = max(due + interval_s, time.monotonic())
    log.close()
    return 0


def resident_bytes(process: psutil.Process) -> tuple[int, int] | None:
    """Return (resident, resident without mapped files and shared memory) bytes; None when it is gone or a zombie."""
    try:
        size = process.memory_info()
    except psutil.Error:
        return None
    return (size.rss, size.rss - size.shared) if size.rss else None


@contextmanager
def nvml_session() -> Iterator[Any]:
    """Yield NVML, started; it is stopped at the end. Raises what it raises without its library, a driver or a right."""
    library: Any = importlib.import_module("pynvml")
    library.nvmlInit()
    try:
        yield library
    finally:
        library.nvmlShutdown()


def device_name(library: Any, handle: object) -> str:
    """Return the name of an NVML device, which older bindings give as bytes."""
    name = library.nvmlDeviceGetName(handle)
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)


class GpuMeter:
    """Per-process figures from NVML for the first device that CUDA would use; ``open`` returns None without one."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self._last_seen = 0

    @classmethod
    def open(cls) -> "GpuMeter | None":
        """Start NVML, or return None when there is no NVIDIA driver or no device."""
        try:
            import pynvml

            pynvml.nvmlInit()
            if pynvml.nvmlDeviceGetCount() == 0:
                pynvml.nvmlShutdown()
                return None
            return cls(pynvml, pynvml.nvmlDeviceGetHandleByIndex(0))
        except Exception:  # NVML's error classes are made at run time; without a driver there is nothing to measure
            return None

    def sample(self, pids: set[int]) -> dict[str, int | None]:
        """Return ``gpu_bytes, gpu_others, gpu_sm, gpu_util`` for a set of process ids; null where not supported."""
        nvml = self._nvml
        used: dict[int, int | None] = {}
        for process in self._ask(nvml.nvmlDeviceGetComputeRunningProcesses, self._handle) or ():
            used[process.pid] = process.usedGpuMemory
        mine = [size for pid, size in used.items() if pid in pids]
        others = [size for pid, size in used.items() if pid not in pids and size is not None]
        busy = self._ask(nvml.nvmlDeviceGetProcessUtilization, self._handle, self._last_seen) or ()
        self._last_seen = max([self._last_seen, *(sample.timeStamp for sample in busy)])
        share = [int(sample.smUtil) for sample in busy if sample.pid in pids]
        rates = self._ask(nvml.nvmlDeviceGetUtilizationRates, self._handle)
        return {
            "gpu_bytes": sum(size for size in mine if size is not None) if mine and None not in mine else None,
            "gpu_others": sum(others),
            "gpu_sm": max(share) if share else None,
            "gpu_util": int(rates.gpu) if rates is not None else None,
        }

    def _ask(self, function: Any, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except self._nvml.NVMLError:
            return None

    def close(self) -> None:
        """Stop NVML."""
        self._ask(self._nvml.nvmlShutdown)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
