"""Measures what a CUDA device can do and what a piece of work does to it, and frees memory between two of them."""

import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_L2_DEFEATING_BYTES = 4 << 30
_GEMM_SIZE = 8192


def current_device(kind: str = "cuda") -> torch.device:
    """Return the CPU, or the CUDA device in use with its index."""
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def seconds_of(work: Callable[[], object]) -> float:
    """Run ``work`` on the current stream and return its seconds between two CUDA events."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    work()
    stop.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(stop)) / 1e3


def synchronise(device: torch.device) -> None:
    """Wait for a CUDA device; the CPU needs no waiting."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def wall_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Run ``work`` and return its seconds by the host's clock, the device waited for before and after."""
    synchronise(device)
    started = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - started


def median_seconds(work: Callable[[], object], rounds: int = 9) -> float:
    """Return the median of ``rounds`` runs after two that are not counted."""
    for _ in range(2):
        work()
    return statistics.median(seconds_of(work) for _ in range(rounds))


def copy_bandwidth() -> float:
    """Measure a large device-to-device copy: bytes per second, reads and writes counted."""
    source = torch.randint(0, 256, (_L2_DEFEATING_BYTES,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / median_seconds(lambda: target.copy_(source))


def gemm_rate() -> float:
    """Measure an 8192 x 8192 x 8192 bfloat16 product of random matrices: floating-point operations per second."""
    a, b = (torch.randn(_GEMM_SIZE, _GEMM_SIZE, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    out = torch.empty_like(a)
    return 2 * _GEMM_SIZE**3 / median_seconds(lambda: torch.mm(a, b, out=out))


def collect_garbage() -> None:
    """Give freed device memory back before the next thing is built; nothing happens where CUDA was never used."""
    gc.collect()
    torch.cuda.empty_cache()


def utilisation(work: Callable[[], object], seconds: float = 4.0) -> dict[str, Any]:
    """Repeat ``work`` for some seconds and return what NVML says of it.

    Returns:
        ``sm_percent`` (NVML's samples of this process; None with ``why`` where it gives none), ``device_percent``
        (samples of the device, every 0.1 s) and ``repeats``.
    """
    import pynvml

    pynvml.nvmlInit()
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
        work()
        torch.cuda.synchronize()
        began, since = time.monotonic(), int(time.time() * 1e6)
        device_percent: list[int] = []
        repeats, sampled = 0, began
        while time.monotonic() - began < seconds:
            work()
            torch.cuda.synchronize()
            repeats += 1
            # The first second still averages over the idle time before it.
            if time.monotonic() - began > 1 and time.monotonic() - sampled >= 0.1:
                sampled = time.monotonic()
                device_percent.append(int(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu))
        found: dict[str, Any] = {"repeats": repeats, "device_percent": device_percent, "sm_percent": None}
        try:
            samples = pynvml.nvmlDeviceGetProcessUtilization(handle, since + 1_000_000)
            found["sm_percent"] = [int(sample.smUtil) for sample in samples if sample.pid == os.getpid()]
            found["pids"] = len({sample.pid for sample in samples})
        except pynvml.NVMLError as error:
            found["why"] = str(error)
        return found
    finally:
        pynvml.nvmlShutdown()


def host_copies(work: Callable[[], object]) -> list[dict[str, Any]]:
    """Run ``work`` under torch's profiler and return every copy from or to the host: its kind and bytes.

    Raises:
        RuntimeError: when the profiler recorded no kernel at all, so that an empty list would mean nothing.
    """
    from torch.profiler import ProfilerActivity, profile

    work()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_bytes())["traceEvents"]
    if not any(event.get("cat") == "kernel" for event in events):
        raise RuntimeError("the profiler recorded no kernel")
    return [
        {"kind": event["name"], "bytes": int(event.get("args", {}).get("bytes", -1))}
        for event in events
        if event.get("cat") == "gpu_memcpy" and ("DtoH" in event["name"] or "HtoD" in event["name"])
    ]
