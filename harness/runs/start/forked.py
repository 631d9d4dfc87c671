"""Processes forked by the fork server, for a supervisor that is not their parent."""

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from q4kd.harness.runs.start import fork_server

# The server's imports take 3 s, and a machine may be very busy.
_READY_S = 180.0
# pyarrow's allocator starts a thread where it is imported, and what has two threads cannot be forked honestly.
ONE_THREADED = {"JE_ARROW_MALLOC_CONF": "background_thread:false"}
# Only q4kd, which is imported after the fork, reads these; and the CUDA driver, which is not loaded before it.
_AFTER_THE_FORK = ("HOME", "Q4KD_TEACHER_BACKEND", "Q4KD_UNIFIED_MEMORY", "CUDA_VISIBLE_DEVICES")


class ForkedProcess:
    """A process of the fork server, with what a supervisor asks of ``subprocess.Popen``.

    Attributes:
        pid: process id, which is also that of its session and group; it stays taken until ``release``.
        returncode: exit code, or minus the number of the signal that ended it; None while it runs.
        stdout: read end of its output.
        stderr: read end of its errors.
    """

    def __init__(self, pid: int, connection: socket.socket, stdout: IO[bytes], stderr: IO[bytes]) -> None:
        self.pid, self.stdout, self.stderr = pid, stdout, stderr
        self.returncode: int | None = None
        self._connection = connection
        self._told = b""

    def poll(self) -> int | None:
        """Return ``returncode``, after a look at whether it has ended."""
        return self._look(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it has ended, at most ``timeout`` seconds (``subprocess.TimeoutExpired``)."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.returncode is None:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if self._look(left) is None and left == 0.0:
                assert timeout is not None
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return self.returncode

    def release(self) -> None:
        """Let the server wait for it, so that its id may be used again."""
        self._connection.close()

    def _look(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._connection], [], [], timeout)[0]:
            piece = self._connection.recv(4096)
            self._told += piece
            if b"\n" in self._told:
                self.returncode = json.loads(self._told)["returncode"]
            elif not piece:  # the server has died, and the kernel has killed what it had forked
                self.returncode = -signal.SIGKILL
        return self.returncode


class ForkServer:
    """The fork server of a session. One thread opens it; any thread asks it, and waits until it is open.

    Args:
        env: its environment, and that of each process it forks, but for HOME and what is read after the fork.
    """

    def __init__(self, env: Mapping[str, str]) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="q4kd-fork-"))
        self._env = {**env, "HOME": str(self._folder), "CUDA_VISIBLE_DEVICES": ""}
        self._path = self._folder / "socket"
        self._server: subprocess.Popen[bytes] | None = None
        self._opened = threading.Event()
        self._says = b""

    def open(self) -> None:
        """Start the server, and return when its imports are done, or have failed."""
        command = [sys.executable, "-P", "-m", "q4kd.harness.runs.start.fork_server", str(self._path)]
        try:
            self._server = subprocess.Popen(
                command,
                env={**self._env, **ONE_THREADED},
                cwd=self._folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            assert self._server.stdout is not None
            there, _, _ = select.select([self._server.stdout], [], [], _READY_S)
            self._says = self._server.stdout.readline() if there else b""
        finally:
            self._opened.set()

    def wait_open(self) -> None:
        """Wait until the server is open, or will never be."""
        self._opened.wait()

    def close(self) -> None:
        """End the server and what it has forked; whoever waits for it starts processes by themselves."""
        server = self._server
        if server is not None:
            assert server.stdin is not None and server.stdout is not None
            server.stdin.close()
            try:
                server.wait(5.0)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
            self._opened.wait()
            server.stdout.close()
        self._opened.set()
        shutil.rmtree(self._folder, ignore_errors=True)

    def start(self, argv: Sequence[str], cwd: Path, env: Mapping[str, str]) -> ForkedProcess | None:
        """Start ``python -m q4kd.harness.child …`` in ``cwd``, or return None where only a fresh process will do.

        That is so for another program, for an environment in which the imports might have come out differently, and
        where the server cannot fork honestly (``fork_server.unfit``) or has died.
        """
        if list(argv[:4]) != [sys.executable, "-P", "-m", fork_server.PROGRAM] or _shared(env) != _shared(self._env):
            return None
        self.wait_open()
        if self._says.strip() != fork_server.READY or self._server is None or self._server.poll() is not None:
            return None
        ends = os.pipe(), os.pipe()
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(str(self._path))
            words = fork_server.encode(list(argv[4:]), dict(env), str(cwd))
            sent = socket.send_fds(connection, [words], [write for _, write in ends])
            connection.sendall(words[sent:])
            pid = _read_pid(connection)
        except OSError:
            pid = None
        for _, write in ends:
            os.close(write)
        if pid is None:
            connection.close()
            for read, _ in ends:
                os.close(read)
            return None
        return ForkedProcess(pid, connection, *(os.fdopen(read, "rb", buffering=0) for read, _ in ends))


def _shared(env: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if name not in _AFTER_THE_FORK}


def _read_pid(connection: socket.socket) -> int | None:
    """Return the process id that the server answers with, byte by byte, so that nothing after it is lost."""
    line = b""
    while not line.endswith(b"\n"):
        piece = connection.recv(1)
        if not piece:
            return None
        line += piece
    return int(json.loads(line)["pid"])
