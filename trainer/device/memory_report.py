"""Measures how many bytes this process holds, where, and for what, for log lines, events and refusals alike.

On the device the truth is NVML's figure for this process: it includes the CUDA context, loaded kernels and library
workspaces. torch's counters explain most of it; the rest is named ``other``. On GB10 NVML has no device memory to
report, so the host's MemAvailable stands beside torch's counters instead.
"""

import importlib
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from q4kd.trainer.device.devices import mem_available

_SMAPS = Path("/proc/self/smaps_rollup")
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Residency:
    """What the teacher holds in memory."""

    resident_bytes: dict[str, int]  # per GGML type as held: a dense copy of a Q4_K tensor counts under F32
    dense_bytes_of_quantised: int  # decoded copies of K-quant tensors
    scratch_bytes: int  # the reusable tile buffer
    tensor_bytes: int  # the tensors in the file


@dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """Bytes on the device held by this process."""

    process: int | None  # NVML's figure; None where NVML does not support it or does not list the process
    why_unknown: str | None  # the reason when ``process`` is None
    allocated: int  # in torch's live tensors
    reserved: int  # by torch's allocator from the driver, live tensors included
    peak_allocated: int  # largest ``allocated`` so far
    other: int | None  # ``process - reserved``: context, kernels, library workspaces; None where ``process`` is


@dataclass(frozen=True, kw_only=True)
class MemoryReport:
    """Bytes held by this process."""

    rss: int  # resident on the host, mapped files included
    pss: int | None  # the same with shared pages divided among their owners; None where the kernel does not say
    anonymous: int  # resident on the host without mapped files
    available: int  # the host's MemAvailable
    device: DeviceMemory | None  # None without CUDA
    teacher: dict[str, int]  # resident weights by GGML type (dense copies under the dtype they are held in)
    scratch: int  # the teacher's reusable decode buffers

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    def sentence(self) -> str:
        """Return one line for people: who holds what."""
        parts = [f"host {sized(self.rss)} resident ({sized(self.anonymous)} without mapped files)"]
        if self.device is not None:
            whole, tensors, peak = self.device.process, self.device.allocated, self.device.peak_allocated
            told = sized(whole) if whole is not None else f"unknown ({self.device.why_unknown})"
            parts.append(f"device {told} by NVML, {sized(tensors)} in tensors, peak {sized(peak)}")
        held = ", ".join(f"{name} {sized(size)}" for name, size in sorted(self.teacher.items()))
        parts.append(f"teacher {held or 'none'}; scratch {sized(self.scratch)}")
        return "; ".join(parts)


def measure(residency: Residency | None = None, *, cuda: bool = False) -> MemoryReport:
    """Measure this process now.

    Args:
        residency: of the teacher, when one is loaded.
        cuda: whether the process uses the current CUDA device (torch is imported only then).

    Raises:
        OSError: when /proc cannot be read.
    """
    status = _kilobytes(_STATUS)
    return MemoryReport(
        rss=status["VmRSS"],
        pss=_kilobytes(_SMAPS).get("Pss") if _SMAPS.exists() else None,
        anonymous=status.get("RssAnon", 0),
        available=mem_available(),
        device=_device_memory() if cuda else None,
        teacher=dict(residency.resident_bytes) if residency else {},
        scratch=residency.scratch_bytes if residency else 0,
    )


def sized(size: int) -> str:
    """Return bytes as ``1.23 GB``, ``4.5 MB`` or ``6 kB`` (powers of 1,000)."""
    if size >= 1e9:
        return f"{size / 1e9:.2f} GB"
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"


def _kilobytes(path: Path) -> dict[str, int]:
    """Parse lines ``Name:  12 kB`` of a /proc file to bytes."""
    found = {}
    for line in path.read_text(encoding="ascii", errors="replace").splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if len(words) == 2 and words[1] == "kB" and words[0].isdigit():
            found[name] = int(words[0]) * 1024
    return found


def _device_memory() -> DeviceMemory:
    import torch

    process, why = nvml_process_bytes(os.getpid(), torch.cuda.current_device())
    reserved = int(torch.cuda.memory_reserved())
    return DeviceMemory(
        process=process,
        why_unknown=why,
        allocated=int(torch.cuda.memory_allocated()),
        reserved=reserved,
        peak_allocated=int(torch.cuda.max_memory_allocated()),
        other=None if process is None else process - reserved,
    )


def nvml_process_bytes(pid: int, index: int, library: Any = None) -> tuple[int | None, str | None]:
    """Return a process's device bytes by NVML, or None and the reason.

    Args:
        pid: process id, as NVML sees it; another PID namespace hides it.
        index: CUDA's device index; CUDA_VISIBLE_DEVICES is followed where it lists plain indices.
        library: the pynvml module, or a stand-in for tests.
    """
    try:
        nvml = importlib.import_module("pynvml") if library is None else library
    except ImportError:
        return None, "nvidia-ml-py is not installed"
    visible = [part.strip() for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    if index < len(visible) and visible[index].isdigit():
        index = int(visible[index])
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return None, f"NVML: {error}"
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle):
            if process.pid == pid:
                used = process.usedGpuMemory
                return (int(used), None) if used is not None else (None, "NVML does not report it for this device")
        return None, f"NVML does not list process {pid}"
    except nvml.NVMLError as error:
        return None, f"NVML: {error}"
    finally:
        nvml.nvmlShutdown()
