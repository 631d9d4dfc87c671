"""Decides what kind of device a machine has, where weights are allocated on it, and how much memory there is to spend.

There are two classes: *classic* devices have memory of their own, *unified* ones (GB10, Jetson) share the host's. The
class follows from the driver's attributes where they are known, else from the compute capability.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from q4kd.trainer.errors import InputError

DeviceClass = Literal["cpu", "classic", "unified"]
Allocation = Literal["device", "managed"]
ALLOCATION_VARIABLE = "Q4KD_UNIFIED_MEMORY"

# Integrated GPUs have these: Tegra K1, X1, X2, Xavier, Orin, Thor (as 10.1 and, since CUDA 13, 11.0), GB10.
_INTEGRATED_CAPABILITIES = frozenset({(3, 2), (5, 3), (6, 2), (7, 2), (8, 7), (10, 1), (11, 0), (12, 1)})


@dataclass(frozen=True)
class DeviceFacts:
    """A device as its driver describes it; None where an attribute could not be read."""

    name: str
    capability: tuple[int, int]  # compute capability, such as (9, 0)
    integrated: bool | None  # attribute "integrated with the host memory"
    managed: bool | None  # attribute "can allocate managed memory"
    total_bytes: int  # memory that the device reports as its own, or shares


def classify(capability: tuple[int, int], integrated: bool | None) -> DeviceClass:
    """Return ``classic`` or ``unified`` for any compute capability.

    The attribute would be enough if every driver set it; a capability that only integrated chips have settles the rest.
    A host whose CPU can read device memory (GH200) is still classic: its GPU has memory of its own.
    """
    return "unified" if integrated or capability in _INTEGRATED_CAPABILITIES else "classic"


@dataclass(frozen=True)
class AllocationPolicy:
    """The way in which teacher weights are allocated, and the reason that is announced with it."""

    allocation: Allocation
    reason: str


def allocation_policy(device_class: DeviceClass, override: str | None) -> AllocationPolicy:
    """Decide the allocation: the override if set (``1`` managed, ``0`` device memory), else what the class needs.

    Raises:
        InputError: for an override that is neither.
    """
    if override not in (None, "", "0", "1"):
        raise InputError(ALLOCATION_VARIABLE, expected="0, 1 or unset", got=repr(override)[:40], remedy="unset it")
    if override:
        chosen: Allocation = "managed" if override == "1" else "device"
        return AllocationPolicy(chosen, f"{ALLOCATION_VARIABLE}={override}")
    if device_class == "unified":
        return AllocationPolicy("managed", "the device shares the host's memory")
    return AllocationPolicy("device", "the device has memory of its own" if device_class == "classic" else "no device")


def allocation_override(environment: Mapping[str, str] = os.environ) -> str | None:
    """Return the override in force, None when unset."""
    return environment.get(ALLOCATION_VARIABLE)


def check_allocation(policy: AllocationPolicy, device_class: DeviceClass) -> None:
    """Refuse to carry out managed allocation on a classic device.

    Over-committed managed memory can hang such a device for every process on it; the decision is still what the
    override says, and it is this function, not the table, that stops it.

    Raises:
        InputError: for managed memory on a device that is not unified.
    """
    if policy.allocation == "managed" and device_class != "unified":
        subject, remedy = f"managed memory ({policy.reason})", f"unset {ALLOCATION_VARIABLE}"
        expected = "a device that shares the host's memory"
        raise InputError(subject, expected=expected, got=f"a {device_class} device", remedy=remedy)


def has_visible_gpu(environment: Mapping[str, str] = os.environ, control: Path = Path("/dev/nvidiactl")) -> bool:
    """Return whether NVIDIA's driver has a device here that is not hidden from this process."""
    return control.exists() and environment.get("CUDA_VISIBLE_DEVICES") not in ("", "-1")


def mem_available(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Return MemAvailable in bytes: what can be had without swapping, reclaimable page cache included.

    Raises:
        OSError: when ``meminfo`` cannot be read or has no such line.
    """
    for line in meminfo.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{meminfo} has no MemAvailable")


def memory_budget(device_class: DeviceClass, free_bytes: int | None, available: int) -> int:
    """Return the bytes that a teacher may take.

    Args:
        device_class: class of the device that will hold it.
        free_bytes: cudaMemGetInfo's free memory; None on the CPU. It leaves out reclaimable page cache on unified
            devices, so it is not used there.
        available: the host's MemAvailable in bytes.
    """
    return free_bytes if device_class == "classic" and free_bytes is not None else available


def cuda_facts(index: int = 0) -> DeviceFacts:
    """Ask CUDA for a device's facts.

    Raises:
        InputError: when there is no usable CUDA device, or torch or CuPy cannot use it.
    """
    try:
        import torch
    except ImportError as error:
        raise _no_cuda(f"torch is not installed ({error})", "pip install 'q4kd[train]'") from error
    if not torch.cuda.is_available():
        without = f"torch {torch.__version__}, built without CUDA"
        got = "no CUDA device that torch can use" if torch.version.cuda else without
        raise _no_cuda(got, "q4kd doctor says what is missing; --device cpu needs nothing")
    try:
        import cupy
    except ImportError as error:
        major = (torch.version.cuda or "13").partition(".")[0]
        raise _no_cuda(f"CuPy is not installed ({error})", f"pip install 'q4kd[cuda{major}]'") from error
    properties = torch.cuda.get_device_properties(index)
    attributes = cupy.cuda.Device(index).attributes
    known = {name: bool(value) for name, value in attributes.items()}
    capability = (properties.major, properties.minor)
    integrated, managed = known.get("Integrated"), known.get("ManagedMemory")
    return DeviceFacts(properties.name, capability, integrated, managed, int(properties.total_memory))


def _no_cuda(got: str, remedy: str) -> InputError:
    return InputError("--device cuda", expected="a CUDA device, torch with CUDA, and CuPy", got=got, remedy=remedy)
