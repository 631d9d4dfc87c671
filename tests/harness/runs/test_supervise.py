import json
import os
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from q4kd.harness.runs.exit_cause import memory_cgroup
from q4kd.harness.runs.memory import GpuMeter
from q4kd.harness.runs.supervise import (
    LOG_LIMIT,
    TRUNCATED,
    boot_id,
    child_environment,
    run_supervised,
)


def run(folder, code, *, timeout_s=30.0, stall_s=None, env=None, placeholders=None):
    run_supervised(
        [sys.executable, "-c", textwrap.dedent(code)],
        run_dir=folder,
        cwd=folder,
        timeout_s=timeout_s,
        stall_s=stall_s,
        env=os.environ if env is None else env,
        placeholders=placeholders,
    )
    return json.loads((folder / "exit.json").read_text())


def gone(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_gone(pid):
    deadline = time.monotonic() + 5
    while not gone(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return gone(pid)


def test_a_normal_exit_is_recorded_with_output_and_memory(tmp_path):
    end = run(tmp_path, "import sys, time; print('out'); print('err', file=sys.stderr); time.sleep(0.5)")
    assert (end["returncode"], end["signal"], end["cause"]) == (0, None, "exited")
    assert end["boot_id"] == end["boot_id_end"] == boot_id() != ""
    assert end["wall_s"] == pytest.approx(end["end_t"] - end["start_t"])
    assert (tmp_path / "stdout.log").read_text() == "out\n"
    assert (tmp_path / "stderr.log").read_text() == "err\n"
    samples = [json.loads(line) for line in (tmp_path / "memory.jsonl").read_text().splitlines()]
    assert len(samples) >= 6
    assert all(sample["pid"] == end["pid"] and sample["rss"] >= sample["rss_anon"] > 0 for sample in samples[2:])
    assert all(end["start_t"] <= sample["t"] <= end["end_t"] for sample in samples)


def test_exit_code_and_signals_are_told_apart(tmp_path):
    (tmp_path / "a").mkdir()
    end = run(tmp_path / "a", "raise SystemExit(3)")
    assert (end["returncode"], end["signal"], end["cause"]) == (3, None, "exited")
    (tmp_path / "b").mkdir()
    end = run(tmp_path / "b", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert (end["returncode"], end["signal"], end["cause"]) == (None, 9, "killed_cause_unknown")
    (tmp_path / "c").mkdir()
    assert run(tmp_path / "c", "import os; os.abort()")["cause"] == "signalled"


def test_memory_is_that_of_the_whole_tree(tmp_path):
    code = """
        import subprocess, sys
        child = "x = bytearray(120 << 20); import time; time.sleep(0.7)"
        subprocess.run([sys.executable, "-c", child])
    """
    run(tmp_path, code)
    samples = [json.loads(line) for line in (tmp_path / "memory.jsonl").read_text().splitlines()]
    assert max(sample["rss_anon"] for sample in samples) > 120 << 20
    assert max(sample["processes"] for sample in samples) == 2


def test_gpu_figures_are_those_of_the_tree_and_null_where_the_driver_does_not_say():
    class Error(Exception):
        pass

    def unsupported(*_):
        raise Error

    def process(pid, size):
        return SimpleNamespace(pid=pid, usedGpuMemory=size)

    nvml = SimpleNamespace(
        NVMLError=Error,
        nvmlDeviceGetComputeRunningProcesses=lambda handle: [process(1, 100), process(2, 30), process(9, 7)],
        nvmlDeviceGetProcessUtilization=lambda handle, since: [SimpleNamespace(pid=2, smUtil=64, timeStamp=5)],
        nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=80),
    )
    meter = GpuMeter(nvml, None)
    assert meter.sample({1, 2}) == {"gpu_bytes": 130, "gpu_others": 7, "gpu_sm": 64, "gpu_util": 80}
    # A process that holds nothing yet, or that the driver does not attribute, has no figure: it is not zero.
    assert meter.sample({3}) == {"gpu_bytes": None, "gpu_others": 137, "gpu_sm": None, "gpu_util": 80}
    nvml.nvmlDeviceGetComputeRunningProcesses = lambda handle: [process(1, 100), process(2, None)]
    nvml.nvmlDeviceGetProcessUtilization = nvml.nvmlDeviceGetUtilizationRates = unsupported
    assert meter.sample({1, 2}) == {"gpu_bytes": None, "gpu_others": 0, "gpu_sm": None, "gpu_util": None}


def test_no_new_event_is_a_stall_although_the_program_is_busy(tmp_path):
    code = """
        import time
        with open("events.jsonl", "a", buffering=1) as events:
            for n in range(8):
                print('{"event":"step"}', file=events); time.sleep(0.1)
        while True: pass
    """
    end = run(tmp_path, code, stall_s=0.6)
    assert end["cause"] == "stalled"
    assert 1.2 < end["wall_s"] < 6
    assert (tmp_path / "events.jsonl").read_text().count("step") == 8


def test_timeout_kills_even_a_program_that_ignores_signals(tmp_path):
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    end = run(tmp_path, code, timeout_s=0.7)
    assert end["cause"] == "timeout"
    assert end["cause_evidence"]["supervisor_action"] == "timeout"
    assert end["signal"] == 9
    assert end["wall_s"] < 5


@pytest.mark.parametrize("escape", [False, True], ids=["same group", "own session"])
@pytest.mark.parametrize("ends", ["pass", "time.sleep(60)"], ids=["parent exits", "parent hangs"])
def test_grandchildren_do_not_survive(tmp_path, escape, ends):
    code = f"""
        import subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session={escape})
        print(child.pid, flush=True)
        time.sleep(0.6)
        {ends}
    """
    end = run(tmp_path, code, timeout_s=1.5)
    assert end["cause"] == ("exited" if ends == "pass" else "timeout")
    assert wait_gone(int((tmp_path / "stdout.log").read_text()))


def test_a_grandchild_too_young_to_be_sampled_is_killed_with_its_group(tmp_path):
    code = """
        import os, time
        child = os.fork()
        if child == 0:
            time.sleep(60)
        os.write(1, str(child).encode())
        os._exit(0)
    """
    end = run(tmp_path, code)
    assert end["cause"] == "exited"
    assert wait_gone(int((tmp_path / "stdout.log").read_text()))


def test_logs_are_bounded_and_the_writer_is_not_blocked(tmp_path):
    code = """
        import sys
        for _ in range(3 * 1024): sys.stdout.write("x" * 4095 + "\\n")
        sys.stderr.write("done")
    """
    assert run(tmp_path, code)["returncode"] == 0
    data = (tmp_path / "stdout.log").read_bytes()
    assert len(data) == LOG_LIMIT
    assert data.endswith(TRUNCATED.encode())
    assert (tmp_path / "stderr.log").read_text() == "done"


def test_stray_environment_does_not_reach_the_program(tmp_path):
    env = {**os.environ, "Q4KD_FAULT": "x", "SECRET_TOKEN": "s", "HF_HUB_OFFLINE": "0", "Q4KD_TEACHER_BACKEND": "dense"}
    run(tmp_path, "import os, json; print(json.dumps(dict(os.environ)))", env=env)
    seen = json.loads((tmp_path / "stdout.log").read_text())
    assert "Q4KD_FAULT" not in seen
    assert "SECRET_TOKEN" not in seen
    assert seen["HF_HUB_OFFLINE"] == "1"
    assert seen["Q4KD_TEACHER_BACKEND"] == "dense"
    assert not Path(seen["HOME"]).exists()  # private, and removed after the run
    assert child_environment(tmp_path, {"HOME": "/root"})["HOME"] == str(tmp_path)


def test_half_an_event_left_by_a_kill_is_cut_off(tmp_path):
    code = """
        import os, signal
        with open("events.jsonl", "w") as events:
            events.write('{"event":"a"}\\n{"eve'); events.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    """
    run(tmp_path, code)
    assert (tmp_path / "events.jsonl").read_text() == '{"event":"a"}\n'


def test_paths_are_replaced_in_logs_and_events(tmp_path):
    code = "import os; print(os.getcwd()); open('events.jsonl', 'w').write('{\"p\": \"' + os.getcwd() + '/x\"}\\n')"
    run(tmp_path, code, placeholders={str(tmp_path): "{run}"})
    assert (tmp_path / "stdout.log").read_text() == "{run}\n"
    assert json.loads((tmp_path / "events.jsonl").read_text()) == {"p": "{run}/x"}


def test_a_program_that_cannot_start_raises(tmp_path):
    with pytest.raises(OSError, match="no-such-program"):
        run_supervised(["/no-such-program"], run_dir=tmp_path, cwd=tmp_path, timeout_s=1, stall_s=None, env={})
    assert not (tmp_path / "exit.json").exists()


@pytest.fixture
def small_cgroup():
    """A memory cgroup of 64 MB below our own."""
    own = memory_cgroup()
    if own is None:
        pytest.skip("no memory controller is mounted here")
    folder = own.folder / f"q4kd-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"a child memory cgroup cannot be made here: {error.strerror}")
    try:
        limit, swap = ("memory.max", "memory.swap.max") if own.version == 2 else ("memory.limit_in_bytes", None)
        try:
            (folder / limit).write_text(str(64 << 20))
            if swap and (folder / swap).exists():
                (folder / swap).write_text("0")
        except OSError as error:
            pytest.skip(f"the child memory cgroup takes no limit: {error.strerror}")
        yield folder
    finally:
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            try:
                folder.rmdir()
                break
            except OSError:
                time.sleep(0.05)


def test_a_real_oom_kill_is_named_by_the_kernels_counter(tmp_path, small_cgroup):
    code = f"""
        import os, time
        open({str(small_cgroup / "cgroup.procs")!r}, "w").write(str(os.getpid()))
        time.sleep(0.3)
        x = bytearray(256 << 20)
        x[::4096] = b"x" * len(x[::4096])
        print("survived")
    """
    end = run(tmp_path, code)
    if end["cause"] == "exited" and "Permission" in (tmp_path / "stderr.log").read_text():
        pytest.skip("a process cannot be moved into the child memory cgroup here")
    assert "survived" not in (tmp_path / "stdout.log").read_text()
    assert end["cause"] == "oom_killed"
    assert end["signal"] == 9
    assert end["oom_counter"]["after"] - end["oom_counter"]["before"] == 1
    # The same death without the counter and the kernel's line would not be called an OOM kill.
    assert end["cause_evidence"]["oom_kills"] == 1


def test_limits_of_instructions_reach_a_run_and_other_variables_do_not(tmp_path: Path) -> None:
    given = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_VERBOSE": "1"}
    found = child_environment(tmp_path, given)
    assert found["ONEDNN_MAX_CPU_ISA"] == "AVX2"
    assert found["ATEN_CPU_CAPABILITY"] == "avx2"
    assert "ONEDNN_VERBOSE" not in found
