import json
import os
import subprocess
import sys
import time

import pytest

from q4kd.harness.runs import supervise
from q4kd.harness.runs.load import CpuClock
from q4kd.harness.runs.supervise import run_supervised

# It works for a second of processor time, and says how long that took.
WORKS = """
import os, sys, time
os.sched_setaffinity(0, {int(sys.argv[1])})
begun = time.monotonic()
while time.process_time() < 1.0:
    pass
print(time.monotonic() - begun)
"""
SPINS = "import os, sys\nos.sched_setaffinity(0, {int(sys.argv[1])})\nprint('up', flush=True)\nwhile True: pass"


@pytest.fixture
def core():
    return min(os.sched_getaffinity(0))


@pytest.fixture
def busy(core):
    """Three programs that use one core without end."""
    command = [sys.executable, "-c", SPINS, str(core)]
    # Sessions of their own, as runs are: the kernel shares a core between sessions first (sched(7), autogroup).
    others = [subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) for _ in range(3)]
    for other in others:
        other.stdout.readline()
    yield core
    for other in others:
        other.kill()
        other.communicate()


def run(folder, core, *, timeout_s, code=WORKS, stall_s=None):
    run_supervised(
        [sys.executable, "-c", code, str(core)],
        run_dir=folder,
        cwd=folder,
        timeout_s=timeout_s,
        stall_s=stall_s,
        env=os.environ,
    )
    return json.loads((folder / "exit.json").read_text())


def test_work_and_waiting_are_told_apart(tmp_path, busy):
    end = run(tmp_path, busy, timeout_s=60)
    assert end["cause"] == "exited"
    assert 0.7 < end["cpu_s"] < 1.6
    # Four programs on one core: it waited about three times as long as it worked.
    assert end["waited_s"] > end["cpu_s"]
    assert end["cpu_s"] + end["waited_s"] <= end["wall_s"] + 0.5


def test_seconds_of_waiting_do_not_count_against_a_limit(tmp_path, busy):
    end = run(tmp_path, busy, timeout_s=2.0)
    assert end["wall_s"] > 2.3  # the limit has passed on the wall, and would have ended it
    assert (end["cause"], end["returncode"]) == ("exited", 0)


def test_nor_against_a_stall(tmp_path, busy):
    end = run(tmp_path, busy, timeout_s=60, stall_s=2.0)
    assert end["wall_s"] > 2.3
    assert end["cause"] == "exited"


def test_what_does_nothing_is_ended_by_its_limit_on_a_busy_machine_too(tmp_path, busy):
    begun = time.monotonic()
    end = run(tmp_path, busy, timeout_s=1.5, code="import time; time.sleep(60)")
    assert end["cause"] == "timeout"
    assert time.monotonic() - begun < 12


def test_there_is_a_limit_to_waiting(tmp_path, busy, monkeypatch):
    monkeypatch.setattr(supervise, "BUSY_LIMIT", 1.5)
    end = run(tmp_path, busy, timeout_s=1.2)
    assert end["cause"] == "timeout"
    assert end["wall_s"] - end["waited_s"] < end["timeout_s"]  # which is what its own time did not exceed


def test_threads_that_wait_side_by_side_count_once(monkeypatch):
    states = [{"a": (10, 1_000), "b": (20, 3_000)}, {"a": (1_010, 1_000), "b": (20, 5_000), "c": (0, 500)}, {}]
    monkeypatch.setattr("q4kd.harness.runs.load._threads", lambda _pid: states.pop(0))
    clock = CpuClock()
    for _ in range(3):
        clock.look([1])
    assert clock.cpu_s == pytest.approx(1_030e-9)
    assert clock.waited_s == pytest.approx(5_000e-9)


def test_a_process_that_is_gone_has_no_figures():
    clock = CpuClock()
    clock.look([2**22 + 1])
    assert (clock.cpu_s, clock.waited_s) == (0, 0)
