import json
import mmap
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from q4kd.harness.runs.experiment import ONE_THREAD, Inputs, get_experiment
from q4kd.harness.runs.runner import LAUNCHER, ExperimentRunner, may_fork
from q4kd.harness.runs.start import fork_server
from q4kd.harness.runs.start.forked import ForkServer
from q4kd.harness.runs.supervise import child_environment, run_supervised

TELLS = """
    import hashlib, json, os, random, resource, signal, sys, threading
    import numpy as np
    told = {
        "argv": sys.argv[1:], "cwd": os.getcwd(), "path": sys.path[0] == os.getcwd(), "env": dict(os.environ),
        "hash": hash("text"), "name": __name__, "session": os.getsid(0) == os.getpid() == os.getpgid(0),
        "threads": threading.active_count(), "stdin": os.read(0, 9).decode(),
        "files": sorted(os.listdir("/proc/self/fd")),
        "signals": [str(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE, signal.SIGCHLD)],
        "limits": [resource.getrlimit(r) for r in (resource.RLIMIT_AS, resource.RLIMIT_NOFILE, resource.RLIMIT_CORE)],
        "q4kd": sorted(name for name in sys.modules if name.startswith("q4kd")),
        "flags": str(sys.flags), "umask": os.umask(0o22), "nice": os.nice(0), "torch": "torch" in sys.modules,
        "cpus": sorted(os.sched_getaffinity(0)), "encoding": [sys.stdout.encoding, sys.stdout.line_buffering],
        "drawn": [random.random(), float(np.random.random())],
    }
    with open("told.json", "w") as file:  # a log would be redacted
        json.dump(told, file)
    print("said to stderr", file=sys.stderr)
"""


@pytest.fixture(scope="module")
def server():
    server = ForkServer(child_environment(Path("/nonexistent"), {**os.environ, **ONE_THREAD}))
    server.open()
    yield server
    server.close()


def run(folder, server, code, *words, fault=None, timeout_s=60.0, env=None):
    """Run code as ``q4kd.harness.child -- module program``; return its exit record and its output."""
    folder.mkdir()
    (folder / "program.py").write_text(textwrap.dedent(code))
    options = ["--fault", fault] if fault else []
    run_supervised(
        [*LAUNCHER, *options, "--", "module", "program", *words],
        run_dir=folder,
        cwd=folder,
        timeout_s=timeout_s,
        stall_s=None,
        env={**os.environ, **ONE_THREAD, **(env or {})},
        server=server,
    )
    return json.loads((folder / "exit.json").read_text()), (folder / "stdout.log").read_text()


def gone(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_forked_process_is_what_a_fresh_one_is(server, tmp_path):
    ends, told = {}, {}
    for name, given in (("forked", server), ("fresh", None)):
        ends[name], _ = run(tmp_path / name, given, TELLS, "a", "--b")
        told[name] = json.loads((tmp_path / name / "told.json").read_text())
        assert (tmp_path / name / "stderr.log").read_text() == "said to stderr\n"
        home, cwd = told[name]["env"].pop("HOME"), told[name].pop("cwd")
        assert cwd == str(tmp_path / name)
        assert not Path(home).exists()
    assert [ends[name].get("started") for name in ends] == ["forked", None]
    assert told["forked"].pop("torch")
    assert not told["fresh"].pop("torch")
    drawn = [told[name].pop("drawn") for name in told]
    assert drawn[0][0] != drawn[1][0]
    assert told["forked"] == told["fresh"]


def test_two_forked_processes_draw_different_numbers(server, tmp_path):
    for name in ("a", "b"):
        run(tmp_path / name, server, TELLS)
    drawn = [json.loads((tmp_path / name / "told.json").read_text())["drawn"] for name in ("a", "b")]
    assert drawn[0][0] != drawn[1][0]
    assert drawn[0][1] != drawn[1][1]


@pytest.mark.parametrize(
    ("code", "returncode", "number", "cause"),
    [
        ("raise SystemExit(3)", 3, None, "exited"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", None, 9, "killed_cause_unknown"),
        ("import os; os.abort()", None, 6, "signalled"),
        ("raise ValueError('told')", 1, None, "exited"),
        ("import time; time.sleep(60)", None, 9, "timeout"),
        ("import atexit; atexit.register(print, 'at the end')", 0, None, "exited"),
    ],
)
def test_how_it_ends_is_seen_from_outside(server, tmp_path, code, returncode, number, cause):
    end, out = run(tmp_path / "run", server, code, timeout_s=8.0)
    assert (end["returncode"], end["signal"], end["cause"], end["started"]) == (returncode, number, cause, "forked")
    assert out == ("at the end\n" if "atexit" in code else "")
    if "ValueError" in code:
        assert "ValueError: told" in (tmp_path / "run" / "stderr.log").read_text()
    samples = [json.loads(line) for line in (tmp_path / "run" / "memory.jsonl").read_text().splitlines()]
    assert {sample["pid"] for sample in samples} <= {end["pid"]}
    assert gone(end["pid"])


def test_what_it_leaves_running_is_killed(server, tmp_path):
    code = """
        import subprocess, sys, time
        for new in (False, True):
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=new)
            print(child.pid, flush=True)
        time.sleep(0.6)
    """
    _, out = run(tmp_path / "run", server, code)
    pids = [int(word) for word in out.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 5
    while not all(map(gone, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert all(map(gone, pids))


def test_a_run_is_the_same_to_the_bit(server, tmp_path):
    experiment = get_experiment("first-step")
    inputs = Inputs(tmp_path / "inputs", "cpu")
    arm = experiment.arms[0]
    assert may_fork(experiment, arm)
    found = []
    for name, given in (("forked", server), ("fresh", None)):
        folder = tmp_path / name
        folder.mkdir()
        run_supervised(
            [*LAUNCHER, "--", *arm.argv(inputs)],
            run_dir=folder,
            cwd=folder,
            timeout_s=200,
            stall_s=None,
            env={**os.environ, **arm.env},
            server=given,
        )
        end = json.loads((folder / "exit.json").read_text())
        assert (end["returncode"], end.get("started")) == (0, "forked" if given else None)
        events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
        assert all(event["pid"] == end["pid"] for event in events if event["event"] == "process_start")
        (step,) = [event for event in events if event["event"] == "step"]
        (weights,) = folder.glob("run/checkpoints/step-*/model.safetensors")
        terms = [step[key] for key in ("loss", "ce", "kd", "grad_norm", "lr", "tokens")]
        found.append((terms, weights.read_bytes(), [event["event"] for event in events]))
    assert found[0] == found[1]


def test_a_fault_is_planted_before_the_program_is_imported(server, tmp_path):
    code = "import sys; from q4kd.trainer.loss import fused; print([n for n in sys.modules if n == 'torch'])"
    end, _ = run(tmp_path / "unknown", server, code, fault="no-such-fault")
    assert (end["returncode"], end["started"]) == (2, "forked")
    code = """
        from q4kd.trainer.train.run.progress import Reporter
        print(Reporter.step.__qualname__)
    """
    _, clean = run(tmp_path / "clean", server, code)
    end, planted = run(tmp_path / "planted", server, code, fault="slow-reporting")
    assert (end["returncode"], end["started"]) == (0, "forked")
    assert clean == "Reporter.step\n"
    assert planted != clean


@pytest.mark.parametrize("env", [{"OMP_NUM_THREADS": "2"}, {"MALLOC_MMAP_THRESHOLD_": "65536"}, {"LANG": "xx"}])
def test_an_environment_that_imports_read_is_not_shared(server, tmp_path, env):
    end, out = run(tmp_path / "run", server, "import os; print(os.environ)", env=env)
    assert "started" not in end
    name, value = next(iter(env.items()))
    assert f"'{name}': '{value}'" in out


def test_another_program_is_never_forked(server, tmp_path):
    assert server.start([sys.executable, "-c", "pass"], tmp_path, server._env) is None
    assert server.start([sys.executable, "-P", "-m", "q4kd.harness", "doctor"], tmp_path, server._env) is None


def test_a_process_with_threads_or_with_cuda_is_unfit():
    code = """
        import threading, time
        from q4kd.harness.runs.start.fork_server import unfit
        print(unfit())
        threading.Thread(target=time.sleep, args=(5,), daemon=True).start()
        print(unfit())
    """
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines() == ["None", "2 threads"]


def test_an_open_device_of_the_driver_makes_a_process_unfit_and_its_mapped_library_does_not(tmp_path, monkeypatch):
    (library := tmp_path / "libcuda.so.580").write_bytes(b"x" * 4096)
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ):
        assert fork_server._driver_devices() == []
    monkeypatch.setattr(Path, "readlink", lambda link: Path("/dev/nvidiactl"))
    assert fork_server._driver_devices() == ["/dev/nvidiactl"]
    monkeypatch.setattr(fork_server, "_THREADS", tmp_path)
    assert fork_server.unfit() == "CUDA is in use (/dev/nvidiactl)"


def test_the_imports_leave_one_thread_and_no_cuda(server):
    assert server._says.strip() == fork_server.READY
    assert psutil.Process(server._server.pid).num_threads() == 1


def test_the_end_of_the_server_ends_what_it_forked(tmp_path):
    server = ForkServer(child_environment(Path("/nonexistent"), {**os.environ, **ONE_THREAD}))
    server.open()
    (tmp_path / "program.py").write_text("import os, time; os.write(1, b'up'); time.sleep(60)")
    env = child_environment(Path("/nonexistent"), {**os.environ, **ONE_THREAD})
    processes = [server.start([*LAUNCHER, "--", "module", "program"], tmp_path, env) for _ in range(2)]
    assert [process.stdout.read(2) for process in processes] == [b"up"] * 2
    server._server.send_signal(signal.SIGKILL)
    assert [process.wait(10) for process in processes] == [-signal.SIGKILL] * 2
    deadline = time.monotonic() + 10
    while not all(gone(process.pid) for process in processes) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert all(gone(process.pid) for process in processes)
    assert server.start([*LAUNCHER, "--", "module", "program"], tmp_path, env) is None  # the next one is fresh
    server.close()


def test_a_wait_may_end_before_the_process(server, tmp_path):
    (tmp_path / "program.py").write_text("import time; time.sleep(2)")
    env = child_environment(Path("/nonexistent"), {**os.environ, **ONE_THREAD})
    process = server.start([*LAUNCHER, "--", "module", "program"], tmp_path, env)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.05)
    assert process.poll() is None
    assert process.wait(20) == process.poll() == 0
    process.release()


def test_what_measures_its_process_is_never_forked():
    forked = {name for name in ("first-step", "kd-vs-control", "run-sigterm") if _all_may_fork(name)}
    assert forked == {"first-step", "kd-vs-control", "run-sigterm"}
    for name in ("load-teacher", "planned-run", "reporting-cost", "student-ranks", "run-starves", "cuda-decode"):
        assert not _all_may_fork(name), name
    # Threads that are not declared are as many as the machine has: the server has one.
    assert not _all_may_fork("distill-run")


def _all_may_fork(name):
    experiment = get_experiment(name)
    return all(may_fork(experiment, arm) for arm in experiment.arms)


def test_isolation_by_process_starts_no_server(tmp_path):
    runner = ExperimentRunner(tmp_path / "b", Inputs(tmp_path / "i", "cpu"), "cpu", isolation="process")
    runner.prepare_forks(["kd-vs-control"])
    assert runner._server is None
    assert LAUNCHER[3] == fork_server.PROGRAM
