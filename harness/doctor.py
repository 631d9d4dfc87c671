"""What this machine has, what is missing, and the command to get it."""

import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from q4kd.harness.requirements import requirements
from q4kd.harness.runs.exit_cause import memory_cgroup
from q4kd.harness.runs.memory import device_name, nvml_session
from q4kd.trainer.device.devices import (
    ALLOCATION_VARIABLE,
    allocation_override,
    allocation_policy,
    check_allocation,
    classify,
)
from q4kd.trainer.errors import InputError

State = Literal["ok", "missing", "note"]
# What an extra is for that a run may do without, and whether only a GPU has a use for it.
_OPTIONAL = {
    "liger": ("for student_kernels=liger", True),
    "bnb": ("for 8-bit and paged optimisers", True),
    "docs": ("for building the documentation", False),
}


@dataclass(frozen=True)
class Line:
    """One finding of the doctor. ``remedy`` is a command or an action, None where nothing is to be done."""

    subject: str
    state: State
    found: str
    remedy: str | None = None


def examine() -> list[Line]:
    """Look at this machine: interpreter, GPU, memory, cgroup, kernel log, packages. Imports neither torch nor CuPy."""
    devices = gpu_devices()
    return [
        Line("python", "ok", f"{platform.python_version()} ({sys.implementation.name}, {platform.machine()})"),
        *gpu_lines(devices),
        *memory_lines(),
        *wheel_lines(installed, driver_cuda() if devices else None),
    ]


@dataclass(frozen=True)
class GpuDevice:
    """One NVIDIA device. ``memory``, bytes, is None where it has none of its own, as on GB10: NVML says so."""

    name: str
    capability: tuple[int, int]
    memory: int | None


def gpu_devices() -> list[GpuDevice]:
    """Return the devices that NVML can describe, in index order; none without NVML or a driver."""
    found: list[GpuDevice] = []
    with suppress(Exception), nvml_session() as library:  # NVML's error classes are made at run time
        for index in range(library.nvmlDeviceGetCount()):
            handle = library.nvmlDeviceGetHandleByIndex(index)
            memory: int | None = None
            with suppress(library.NVMLError):
                memory = int(library.nvmlDeviceGetMemoryInfo(handle).total)
            major, minor = library.nvmlDeviceGetCudaComputeCapability(handle)
            found.append(GpuDevice(device_name(library, handle), (int(major), int(minor)), memory))
    return found


def driver_cuda() -> int | None:
    """Return the major CUDA version that the driver supports, or None."""
    with suppress(Exception), nvml_session() as library:
        return int(library.nvmlSystemGetCudaDriverVersion_v2()) // 1000
    return None


def gpu_lines(devices: list[GpuDevice]) -> list[Line]:
    """Describe the devices, or what to do about their absence."""
    if not devices:
        present = Path("/dev/nvidiactl").exists()
        remedy = "the device node is there but NVML does not answer: see what nvidia-smi says" if present else None
        return [Line("GPU", "missing" if present else "note", "none found; CUDA claims are out of scope here", remedy)]
    lines = []
    for index, device in enumerate(devices):
        memory = "unified memory (NVML reports no device memory)"
        if device.memory is not None:
            memory = f"{device.memory / 2**30:.0f} GiB of device memory"
        capability = ".".join(map(str, device.capability))
        lines.append(Line(f"GPU {index}", "ok", f"{device.name}, compute capability {capability}, {memory}"))
        lines.append(placement_line(index, device.capability))
    return lines


def placement_line(index: int, capability: tuple[int, int]) -> Line:
    """Describe where teacher weights would lie on a device, and what bounds them.

    NVML does not tell whether a chip is integrated; a run asks CUDA as well, and says what it found.
    """
    device_class = classify(capability, None)
    override = allocation_override()
    try:
        policy = allocation_policy(device_class, override)
        check_allocation(policy, device_class)
    except InputError as error:
        return Line(f"GPU {index} memory", "missing", f"{device_class} device; {error}", f"unset {ALLOCATION_VARIABLE}")
    bound = "the host's MemAvailable, watched" if device_class == "unified" else "the device's own free memory"
    found = f"{device_class} device; weights in {policy.allocation} memory ({policy.reason}); bounded by {bound}"
    return Line(f"GPU {index} memory", "ok", found)


def memory_lines() -> list[Line]:
    """Describe host memory and the means to tell an out-of-memory kill from another one."""
    memory = psutil.virtual_memory()
    lines = [Line("memory", "ok", f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} GiB available")]
    cgroup = memory_cgroup()
    counted = cgroup is not None and cgroup.oom_kills() is not None
    if cgroup is not None and counted:
        lines.append(Line("cgroup", "ok", f"v{cgroup.version}, oom_kill counter readable"))
    else:
        lines.append(Line("cgroup", "note", "no readable oom_kill counter", "systemd-run --user --scope q4kd falsify"))
    readable = os.access("/dev/kmsg", os.R_OK)
    if not readable and not counted:
        remedy = "sudo sysctl kernel.dmesg_restrict=0, or run in a cgroup: without both, an OOM kill cannot be proven"
        lines.append(Line("kernel log", "missing", "not readable", remedy))
    else:
        lines.append(Line("kernel log", "ok" if readable else "note", "readable" if readable else "not readable"))
    return lines


def installed(distribution: str) -> str | None:
    """Return the installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def wheel_lines(version_of: Callable[[str], str | None], cuda: int | None) -> list[Line]:
    """Describe the packages; ``cuda`` is the driver's major CUDA version, None without a device."""
    lines = []
    for name, extra in requirements():
        version, remedy = version_of(name), f"pip install 'q4kd[{extra}]'" if extra else "pip install --upgrade q4kd"
        purpose, gpu_only = _OPTIONAL.get(extra or "", ("", False))
        if extra not in (None, "train", *_OPTIONAL):
            continue
        if version:
            lines.append(Line(name, "ok", version))
        elif not purpose:
            lines.append(Line(name, "missing", "not installed", remedy))
        elif cuda is not None or not gpu_only:
            lines.append(Line(name, "note", f"not installed; {purpose}", remedy))
    cupy = {wheel: version_of(wheel) for wheel in ("cupy-cuda13x", "cupy-cuda12x", "cupy")}
    have = {wheel: version for wheel, version in cupy.items() if version}
    if len(have) > 1:
        remedy = f"pip uninstall {' '.join(list(have)[1:])}"
        lines.append(
            Line("cupy", "missing", f"{' and '.join(have)} are both installed and overwrite each other", remedy)
        )
    elif have:
        lines.append(Line("cupy", "ok", " ".join(f"{wheel} {version}" for wheel, version in have.items())))
    elif cuda is not None:
        lines.append(
            Line("cupy", "missing", "not installed", f"pip install 'q4kd[{'cuda13' if cuda >= 13 else 'cuda12'}]'")
        )
    else:
        lines.append(Line("cupy", "note", "not installed; only needed with an NVIDIA GPU"))
    return lines


def doctor_lines(lines: list[Line]) -> list[str]:
    """Return the findings as text: a mark, the subject and what was found; below it what to do."""
    width = max(len(line.subject) for line in lines)
    text = []
    for line in lines:
        mark = {"ok": "ok     ", "missing": "MISSING", "note": "note   "}[line.state]
        text.append(f"{mark}  {line.subject:<{width}}  {line.found}")
        if line.remedy:
            text.append(f"{'':9}{'':<{width}}  -> {line.remedy}")
    return text


def show(lines: list[Line]) -> int:
    """Print the findings; returns 0, or 1 when something that is needed here is missing."""
    print("\n".join(doctor_lines(lines)))
    return 1 if any(line.state == "missing" for line in lines) else 0
