"""One answer to "who holds what", and the watchdog that acts on it."""

import mmap
import subprocess
import sys
import threading
import types
from typing import Any

import numpy as np
import pytest

from q4kd.trainer.device import memory_report
from q4kd.trainer.device import memory_watchdog as watchdog
from q4kd.trainer.device.devices import DeviceFacts
from q4kd.trainer.device.memory_report import DeviceMemory, MemoryReport, Residency, measure, nvml_process_bytes


class _NVMLError(Exception):
    pass


def fake_nvml(processes: list[tuple[int, int | None]], fail: str | None = None) -> Any:
    def call(name: str, result: Any) -> Any:
        def answer(*_arguments: Any) -> Any:
            if fail == name:
                raise _NVMLError("Not Supported")
            return result

        return answer

    listed = [types.SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in processes]
    return types.SimpleNamespace(
        NVMLError=_NVMLError,
        nvmlInit=call("init", None),
        nvmlShutdown=call("shutdown", None),
        nvmlDeviceGetHandleByIndex=call("handle", object()),
        nvmlDeviceGetComputeRunningProcesses=call("processes", listed),
    )


def test_host_figures_follow_an_allocation() -> None:
    before = measure()
    # Pages of its own: an array may get freed ones that the process never gave back.
    pages = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    ballast = np.frombuffer(pages, np.uint8)
    ballast.fill(1)
    after = measure()
    assert 60 << 20 < after.rss - before.rss < 80 << 20
    assert 60 << 20 < after.anonymous - before.anonymous < 80 << 20
    assert after.pss is None or after.pss <= after.rss
    assert after.available > 0
    assert ballast[0] == 1


def test_the_teacher_is_told_by_type() -> None:
    report = measure(Residency({"Q4_K": 3_000_000_000, "F32": 5_000_000}, 0, 8_000_000, 3_005_000_000))
    assert report.teacher == {"Q4_K": 3_000_000_000, "F32": 5_000_000}
    assert "Q4_K 3.00 GB" in report.sentence()
    assert "scratch 8.0 MB" in report.sentence()
    assert report.to_json()["scratch"] == 8_000_000


def test_nvml_is_asked_for_this_process_only() -> None:
    assert nvml_process_bytes(7, 0, fake_nvml([(6, 5), (7, 123)])) == (123, None)


@pytest.mark.parametrize(
    ("processes", "fail", "words"),
    [
        ([(6, 5)], None, "does not list process 7"),
        ([(7, None)], None, "does not report"),
        ([(7, 1)], "init", "Not Supported"),
        ([(7, 1)], "processes", "Not Supported"),
    ],
)
def test_unknown_is_said_with_its_reason(processes: list[tuple[int, int | None]], fail: str | None, words: str) -> None:
    found, why = nvml_process_bytes(7, 0, fake_nvml(processes, fail))
    assert found is None
    assert why is not None
    assert words in why


def test_an_unknown_device_figure_is_not_shown_as_zero() -> None:
    device = DeviceMemory(process=None, why_unknown="x", allocated=1, reserved=2, peak_allocated=3, other=None)
    report = MemoryReport(rss=1, pss=None, anonymous=1, available=1, device=device, teacher={}, scratch=0)
    assert "unknown (x)" in report.sentence()


def test_the_watchdog_acts_on_three_low_readings_in_a_row() -> None:
    readings = iter([50, 5, 50, 5, 5, 5, 5])
    said: list[str] = []
    stopped = threading.Event()

    def stop(line: str) -> None:
        said.append(line)
        stopped.set()

    with watchdog.MemoryWatchdog(10, read=lambda: next(readings), stop=stop, interval_s=0.001):
        assert stopped.wait(5)
    assert len(said) == 1
    assert next(readings) == 5  # it stopped at the sixth


def test_the_watchdog_lets_a_healthy_run_end() -> None:
    said: list[str] = []
    with watchdog.MemoryWatchdog(10, read=lambda: 11, stop=said.append, interval_s=0.001):
        threading.Event().wait(0.05)
    assert said == []


def test_the_watchdog_ends_the_process_with_one_line() -> None:
    program = (
        "import time\nfrom q4kd.trainer.device.memory_watchdog import MemoryWatchdog\n"
        "with MemoryWatchdog(1 << 60, interval_s=0.001):\n    time.sleep(30)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == watchdog.EXIT_CODE
    assert done.stderr.count("\n") == 1
    assert "MemAvailable" in done.stderr


@pytest.mark.parametrize(("capability", "integrated", "watched"), [((12, 1), True, True), ((9, 0), False, False)])
def test_only_a_unified_device_is_watched(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], integrated: bool, watched: bool
) -> None:
    facts = DeviceFacts("made up", capability, integrated, managed=True, total_bytes=128 << 30)
    monkeypatch.setattr(watchdog, "cuda_facts", lambda _index: facts)
    assert isinstance(watchdog.guarded("cuda"), watchdog.MemoryWatchdog) == watched
    assert not isinstance(watchdog.guarded("cpu"), watchdog.MemoryWatchdog)


def test_the_floor_is_at_least_a_gibibyte() -> None:
    assert watchdog.default_floor(8 << 30) == 1 << 30
    assert watchdog.default_floor(128 << 30) == (128 << 30) * 3 // 100
    assert memory_report.sized(1_500_000_000) == "1.50 GB"
    assert memory_report.sized(1_500_000) == "1.5 MB"
    assert memory_report.sized(0) == "0 kB"
