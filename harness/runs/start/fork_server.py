"""The fork server: imports torch and transformers once, then forks a process for each run that asks.

It is a program of its own, ``python -m q4kd.harness.runs.start.fork_server SOCKET``, and imports nothing of q4kd: a
forked process imports the program under test itself, after a fault is planted, as a fresh one does. Over each
connection it receives one request, and answers with the process's id and, when that has ended, with its status. The
ended process stays a zombie until the connection is closed, so that its id cannot name another meanwhile. The server
ends when its standard input does, and whatever it has forked ends with it.
"""

import array
import contextlib
import gc
import importlib
import json
import os
import random
import runpy
import selectors
import socket
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What nearly every run imports of other projects. None of them may start a thread or CUDA; the server looks.
IMPORTS = (
    "torch",
    "transformers",
    "transformers.models.auto.modeling_auto",
    "transformers.models.qwen2.modeling_qwen2",
    "accelerate",
    "safetensors.torch",
    "tokenizers",
    "gguf",
)
PROGRAM = "q4kd.harness.child"
READY = b"ready"
_MAX_REQUEST = 1 << 20
_THREADS = Path("/proc/self/task")
_LENGTH = struct.Struct("!I")


@dataclass(frozen=True)
class Request:
    """A process that is asked for: its arguments, environment and working folder, and where its output goes."""

    argv: list[str]
    env: dict[str, str]
    cwd: str
    stdout: int
    stderr: int


def encode(argv: list[str], env: dict[str, str], cwd: str) -> bytes:
    """Return a request as it travels, beside which stdout and stderr are sent as descriptors."""
    body = json.dumps({"argv": argv, "env": env, "cwd": cwd}).encode()
    return _LENGTH.pack(len(body)) + body


def unfit() -> str | None:
    """Return why this process must not be forked, or None: a fork has no other thread, and CUDA does not survive.

    CUDA is in use where a device of the driver is open. That its library is mapped says nothing: torch's builds for
    CUDA 13 link it, and importing them opens nothing.
    """
    threads = len(list(_THREADS.iterdir()))
    if threads != 1:
        return f"{threads} threads"
    if opened := _driver_devices():
        return f"CUDA is in use ({', '.join(opened)})"
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        return "this kernel has no pidfd"
    return None


def _driver_devices() -> list[str]:
    """Return the devices of NVIDIA's drivers that this process has open, such as ``/dev/nvidiactl``."""
    opened = set()
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the listing's own descriptor is closed by now
            opened.add(str(link.readlink()))
    return sorted(path for path in opened if path.startswith("/dev/nv"))


def serve(path: str) -> Request | None:
    """Serve until standard input ends (None). In each forked process this returns its request instead."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener, selectors.DefaultSelector() as selector:
        listener.bind(path)
        listener.listen(64)
        why = unfit()
        sys.stdout.buffer.write(READY + b"\n" if why is None else f"unfit: {why}\n".encode())
        sys.stdout.flush()
        if why is not None:
            return None
        selector.register(listener, selectors.EVENT_READ)
        selector.register(0, selectors.EVENT_READ)
        server = _Server(selector)
        while True:
            for key, _ in selector.select():
                if key.fileobj == 0:
                    server.leave()
                    return None
                if key.fileobj is listener:
                    server.accept(listener)
                elif isinstance(key.fileobj, socket.socket):
                    request = server.converse(key.fileobj)
                    if request is not None:  # this is the forked process: it has no business with the server's files
                        server.leave()
                        return request
                else:
                    server.report(key.fd)


class _Server:
    """The connections, and the processes behind them."""

    def __init__(self, selector: selectors.BaseSelector) -> None:
        self._selector = selector
        self._connections: dict[socket.socket, int | None] = {}
        self._ends: dict[int, tuple[socket.socket, int]] = {}  # pidfd → connection and process

    def accept(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        self._connections[connection] = None
        self._selector.register(connection, selectors.EVENT_READ)

    def converse(self, connection: socket.socket) -> Request | None:
        """Fork for the request of a connection; forget the process of one that was closed."""
        pid = self._connections[connection]
        if pid is not None:
            self._forget(connection, pid)
            return None
        request = _receive(connection)
        if request is None or unfit() is not None:
            self._forget(connection, None)
            return None
        try:
            pid = os.fork()
        except OSError:  # no memory or no process id is left: its supervisor starts a process of its own
            pid = -1
        if pid == 0:
            os.setsid()
            return request
        os.close(request.stdout)
        os.close(request.stderr)
        if pid < 0:
            self._forget(connection, None)
            return None
        self._connections[connection] = pid
        pidfd = os.pidfd_open(pid)
        self._ends[pidfd] = connection, pid
        self._selector.register(pidfd, selectors.EVENT_READ)
        _tell(connection, {"pid": pid})
        return None

    def report(self, pidfd: int) -> None:
        """Tell how a process ended, and leave it unwaited for."""
        connection, pid = self._ends.pop(pidfd)
        self._selector.unregister(pidfd)
        os.close(pidfd)
        ended: Any = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        _tell(connection, {"returncode": code})

    def _forget(self, connection: socket.socket, pid: int | None) -> None:
        self._selector.unregister(connection)
        del self._connections[connection]
        connection.close()
        if pid is not None:
            for pidfd in [pidfd for pidfd, (_, process) in self._ends.items() if process == pid]:
                self._selector.unregister(pidfd)
                os.close(pidfd)
                del self._ends[pidfd]
                os.kill(pid, 9)  # its supervisor is gone
            os.waitpid(pid, 0)

    def leave(self) -> None:
        """Close every connection and descriptor, through the objects that own them."""
        for connection in self._connections:
            connection.close()
        for pidfd in self._ends:
            os.close(pidfd)
        self._connections.clear()
        self._ends.clear()


def _receive(connection: socket.socket) -> Request | None:
    """Return the request of a connection, or None when it is not a whole one with two descriptors."""
    room = socket.CMSG_SPACE(2 * array.array("i").itemsize)
    data, ancillary, _, _ = connection.recvmsg(1 << 16, room)
    descriptors = array.array("i")
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
    while len(data) >= _LENGTH.size and len(data) < (wanted := _LENGTH.size + _LENGTH.unpack_from(data)[0]):
        if wanted > _MAX_REQUEST or not (more := connection.recv(1 << 16)):
            break
        data += more
    if len(descriptors) == 2 and len(data) > _LENGTH.size:
        return Request(**json.loads(data[_LENGTH.size :]), stdout=descriptors[0], stderr=descriptors[1])
    for descriptor in descriptors:
        os.close(descriptor)
    return None


def _tell(connection: socket.socket, answer: dict[str, int]) -> None:
    try:
        connection.sendall(json.dumps(answer).encode() + b"\n")
    except OSError:
        return  # its supervisor is gone; the closed connection says so next


def become(request: Request) -> None:
    """Make this forked process what ``python -P -m q4kd.harness.child ARGV`` is when it begins, then run that.

    What differs from a fresh process: the modules of ``IMPORTS`` are there, with what they read of HOME when they were
    imported (a folder of the server's own); pages are shared with the server; a name in /proc/PID/cmdline is the
    server's. Hashes of strings are seeded the same, and generators without a seed are seeded anew.
    """
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (request.stdout, 1), (request.stderr, 2)):
        os.dup2(source, target)
        os.close(source)
    os.chdir(request.cwd)
    os.environ.clear()
    os.environ.update(request.env)
    random.seed()
    sys.modules["numpy"].random.seed()
    for name in [name for name in sys.modules if name.partition(".")[0] == "q4kd"]:
        del sys.modules[name]
    sys.argv[:] = [sys.argv[0], *request.argv]
    runpy.run_module(PROGRAM, run_name="__main__", alter_sys=True)


def main() -> None:
    """Import, serve, and in a forked process run the program to its end."""
    for name in IMPORTS:
        importlib.import_module(name)
    gc.freeze()  # what was imported is never collected, so its pages stay shared
    request = serve(sys.argv[1])
    if request is not None:
        become(request)


if __name__ == "__main__":
    main()
