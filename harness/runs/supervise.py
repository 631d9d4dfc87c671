"""Runs one program under watch: output, memory and cause of death are recorded by the supervisor, not by the program.

The program runs in its own session. Whatever ends the run, no process it started is left behind.
"""

import os
import signal
import site
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, TypeAlias

import psutil

from q4kd.harness.records.redact import redact
from q4kd.harness.runs.exit_cause import KernelLog, OomCounter, SupervisorAction, classify
from q4kd.harness.runs.load import CpuClock
from q4kd.harness.runs.memory import MemoryLog, Sampler
from q4kd.harness.runs.start.forked import ForkedProcess, ForkServer
from q4kd.trainer.files import write_atomic, write_json

LOG_LIMIT = 4 << 20
# A run may take this many times its limit in wall time where it mostly waits for a core.
BUSY_LIMIT = 10
_LOOK_EVERY_S = 0.2
TRUNCATED = "\n[q4kd: log truncated here; the program wrote more]\n"

# The whole environment of a run. A variable not named here does not reach the program, so none can change a result.
# INSTRUCTION_LIMITS keep libraries to an older processor's instructions: claims hold there too, and bundles record it.
INSTRUCTION_LIMITS = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")
PASSED_ON = (
    "PATH", "LANG", "TMPDIR", "PYTHONPATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH", *INSTRUCTION_LIMITS,
    "CUDA_HOME", "CUDA_PATH", "CUDA_VISIBLE_DEVICES", "CUPY_CACHE_DIR",
)  # fmt: skip
SETTABLE = ("OMP_NUM_THREADS", "Q4KD_TEACHER_BACKEND", "Q4KD_UNIFIED_MEMORY", "MALLOC_MMAP_THRESHOLD_")
_FIXED = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
    "PYTHONHASHSEED": "0",
    "PYTHONUTF8": "1",
}

_Process: TypeAlias = subprocess.Popen[bytes] | ForkedProcess
_UNDER_WAY: set[_Process] = set()


def child_environment(home: Path, env: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a run: the allowed names of ``env``, fixed values, and a private HOME."""
    allowed = {name: env[name] for name in (*PASSED_ON, *SETTABLE) if name in env}
    allowed.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)))))
    # Without this, packages installed with `pip install --user` would vanish together with the real HOME.
    user = site.getuserbase()
    return {**allowed, **_FIXED, "HOME": str(home), **({"PYTHONUSERBASE": user} if user else {})}


def boot_id() -> str:
    """Return the kernel's id of this boot; it changes when the machine restarts, whatever the program claims."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def run_supervised(
    argv: list[str],
    *,
    run_dir: Path,
    cwd: Path,
    timeout_s: float,
    stall_s: float | None,
    interval_s: float = 0.05,
    env: Mapping[str, str],
    placeholders: Mapping[str, str] | None = None,
    server: ForkServer | None = None,
    samples_apart: bool = False,
) -> None:
    """Run ``argv`` in ``cwd`` to its end and record it in ``run_dir``, an existing folder.

    Writes ``stdout.log``, ``stderr.log``, ``memory.jsonl`` and, last and atomically, ``exit.json``. A run whose
    ``events.jsonl`` does not grow for ``stall_s`` seconds, or that takes more than ``timeout_s``, is killed with its
    whole process group; so is anything the program leaves running when it ends. Seconds in which it waited for a core
    that others had do not count, up to ``BUSY_LIMIT`` times the limit. Memory is sampled every ``interval_s`` seconds.

    ``env`` is where the allowed variables are taken from (see ``child_environment``); ``placeholders`` are absolute
    path prefixes and what is written in their place in logs and events. With a ``server`` the process is forked from
    it where it can be, which ``exit.json`` then says. With ``samples_apart`` another process takes the samples, in time
    whatever this one is busy with.

    Raises:
        OSError: when the program cannot be started.
    """
    kernel, boot = KernelLog(), boot_id()
    # A program that ends before its first event has told nothing, which is not the same as a record that was lost.
    (run_dir / "events.jsonl").touch()
    with tempfile.TemporaryDirectory(prefix="q4kd-home-", ignore_cleanup_errors=True) as home:
        started = time.monotonic()
        try:
            process = _start(argv, cwd, child_environment(Path(home), env), server)
        except OSError:
            kernel.close()
            raise
        samples = run_dir / "memory.jsonl"
        sampler = Sampler(samples, process.pid, interval_s) if samples_apart else None
        counter, memory = OomCounter(process.pid), MemoryLog(None if sampler else samples, process.pid)
        clock = CpuClock()
        assert process.stdout is not None and process.stderr is not None
        logs = [_LogCopy(process.stdout, run_dir / "stdout.log"), _LogCopy(process.stderr, run_dir / "stderr.log")]
        try:
            # Where another process takes the samples, this one only follows which processes there are.
            limits = timeout_s, stall_s, interval_s if sampler is None else max(interval_s, _LOOK_EVERY_S / 4)
            action = _watch(process, run_dir / "events.jsonl", started, limits, memory, counter, clock)
        finally:
            _UNDER_WAY.discard(process)
            _kill_all(process, memory.tree.values())
            ended = time.monotonic()
            for log in logs:
                log.finish()
            memory.close()
            if sampler is not None:
                sampler.stop()
    oom = counter.record()
    before, after = (value if isinstance(value, int) else None for value in (oom["before"], oom["after"]))
    line = kernel.oom_line(process.pid)
    status = process.wait()
    if isinstance(process, ForkedProcess):
        process.release()
    evidence: dict[str, object] = {
        "returncode": status,
        "supervisor_action": action,
        "oom_kills": after - before if before is not None and after is not None else None,
        "kernel_log_readable": kernel.readable,
        "kernel_line": line,
    }
    kernel.close()
    _drop_half_line(run_dir / "events.jsonl")
    for name in ("stdout.log", "stderr.log", "events.jsonl"):
        redact_file(run_dir / name, placeholders or {})
    write_json(
        run_dir / "exit.json",
        {
            "returncode": status if status >= 0 else None,
            "signal": -status if status < 0 else None,
            "pid": process.pid,
            "boot_id": boot,
            "boot_id_end": boot_id(),
            "start_t": started,
            "end_t": ended,
            "wall_s": ended - started,
            "cpu_s": round(clock.cpu_s, 3),
            "waited_s": round(clock.waited_s, 3),
            "cause": classify(status, before, after, line, action),
            "cause_evidence": evidence,
            "oom_counter": oom,
            "timeout_s": timeout_s,
            "stall_s": stall_s,
            "interval_s": interval_s,
            **({"started": "forked"} if isinstance(process, ForkedProcess) else {}),
        },
    )


def _start(argv: list[str], cwd: Path, env: Mapping[str, str], server: ForkServer | None) -> _Process:
    forked = server.start(argv, cwd, env) if server is not None else None
    process = forked or subprocess.Popen(
        argv,
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    _UNDER_WAY.add(process)
    return process


def end_all() -> None:
    """Kill every run of this process that is under way, as when somebody interrupts it."""
    for process in list(_UNDER_WAY):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


def _watch(
    process: _Process,
    events: Path,
    started: float,
    limits: tuple[float, float | None, float],
    memory: MemoryLog,
    counter: OomCounter,
    clock: CpuClock,
) -> SupervisorAction | None:
    timeout_s, stall_s, interval_s = limits
    size, grown, due, looked = -1, started, started, 0.0
    while process.poll() is None:
        memory.sample()
        counter.poll()
        now = time.monotonic()
        if now - looked >= _LOOK_EVERY_S:
            clock.look(list(memory.tree))
            looked = now
        length = events.stat().st_size if events.exists() else 0  # the program may replace the file
        own = now - clock.waited_s
        if length != size:
            size, grown = length, own
        action: SupervisorAction | None = None
        if own - started > timeout_s or now - started > BUSY_LIMIT * timeout_s:
            action = "timeout"
        elif stall_s is not None and own - grown > stall_s:
            action = "stalled"
        if action is not None and process.poll() is None:
            return action
        due = max(due + interval_s, now)
        try:
            process.wait(max(0.001, due - time.monotonic()))
        except subprocess.TimeoutExpired:
            continue
    return None


def _kill_all(process: _Process, tree: Iterable[psutil.Process]) -> None:
    """Kill the group, then every descendant ever seen that left it (psutil checks that a pid was not reused)."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    for member in list(tree):
        if member.pid != process.pid:
            with suppress(psutil.Error):
                member.kill()
    process.wait()


def _drop_half_line(path: Path) -> None:
    """Cut off what a killed program left of a line: the record then ends with the last whole event."""
    if path.exists():
        data = path.read_bytes()
        if not data.endswith(b"\n"):
            write_atomic(path, data[: data.rfind(b"\n") + 1])


class _LogCopy:
    """Copies one pipe to a file up to ``LOG_LIMIT`` bytes; beyond that it still drains the pipe, so nobody blocks."""

    def __init__(self, source: IO[bytes], path: Path) -> None:
        self._source, self._path = source, path
        self._thread = threading.Thread(target=self._copy, daemon=True, name=f"log {path.name}")
        self._thread.start()

    def _copy(self) -> None:
        left, truncated = LOG_LIMIT - len(TRUNCATED), False
        with self._path.open("wb", buffering=0) as file:
            while piece := os.read(self._source.fileno(), 1 << 16):
                file.write(piece[:left])
                if len(piece) > left and not truncated:
                    file.write(TRUNCATED.encode())
                    truncated = True
                left = max(0, left - len(piece))

    def finish(self) -> None:
        """Wait for the end of the pipe; a process that escaped the kill cannot hold us longer than 5 s."""
        self._thread.join(5.0)
        if not self._thread.is_alive():
            self._source.close()


def redact_file(path: Path, placeholders: Mapping[str, str]) -> None:
    """Rewrite a text file, if it exists, without this machine's paths and names (see ``redact``)."""
    if not path.exists():
        return
    data = path.read_bytes()
    text = redact(data.decode("utf-8", "replace"), placeholders).encode()
    if text != data:
        write_atomic(path, text)
