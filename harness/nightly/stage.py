"""The processes of a night: each stage one, under a lock that outlives the night, its output in the night's log."""

import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

import psutil

from q4kd.trainer.errors import InputError
from q4kd.trainer.yaml_lines import printable

COMMAND: tuple[str, ...] = (sys.executable, "-P", "-m", "q4kd.harness")
_PR_SET_PDEATHSIG = 1
_GRACE_S = 60.0


class StageRunner:
    """Runs commands of q4kd one at a time; lines with the time and the stage go to ``log`` and to standard output.

    A stage's process holds the file ``lock`` for as long as it lives.
    """

    def __init__(self, lock: Path, log: Path) -> None:
        self._lock = lock
        self._file: IO[str] = log.open("a", encoding="utf-8", buffering=1)

    def say(self, stage: str, text: str) -> None:
        """Write one line."""
        line = f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} [{stage}] {printable(text, 2000)}"
        self._file.write(line + "\n")
        print(line, flush=True)

    def wait_for_orphan(self) -> None:
        """Wait until the stage of a night that was killed has ended: it was told to, and it may still be writing."""
        deadline = time.monotonic() + 2 * _GRACE_S
        with self._lock.open("a") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return
                except OSError as error:
                    if time.monotonic() > deadline:
                        expected, got = "the stage of a killed night to have ended", "one that still runs"
                        remedy = f"end the process that holds {self._lock}"
                        raise InputError("q4kd nightly", expected=expected, got=got, remedy=remedy) from error
                    time.sleep(0.2)

    def spawn(self, stage: str, arguments: list[str], command: tuple[str, ...] | None = None) -> int:
        """Run a command of q4kd, its output into the log line by line; return its code, negative for a signal."""
        words = [*COMMAND, *(command or (stage,)), *arguments]
        self.say(stage, "q4kd " + " ".join(words[len(COMMAND) :]))
        with self._lock.open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The child keeps the lock for as long as it lives, also when this process dies first.
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
                pass_fds=(lock.fileno(),),
                preexec_fn=_die_with_parent,
            )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                self.say(stage, line.rstrip("\n"))
            return process.wait()
        finally:
            if process.poll() is None:  # interrupted: let it end its runs, and see to it
                runs = psutil.Process(process.pid).children(recursive=True)
                process.terminate()
                try:
                    process.wait(_GRACE_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                for run in runs:
                    with suppress(psutil.NoSuchProcess):
                        run.kill()
                psutil.wait_procs(runs, timeout=_GRACE_S)


def _die_with_parent() -> None:
    """Ask the kernel for SIGTERM when this process's parent dies, also by SIGKILL: an orphan would share the GPU."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
