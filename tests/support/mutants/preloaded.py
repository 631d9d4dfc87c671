"""A process that has imported torch, transformers and pytest, and forks what a tree asks for: imports are paid once.

``python -P -m mutants.preloaded SOCKET`` serves as the harness's own fork server does, and imports nothing of the
trainer before it forks: what is forked finds the sources as they are then. It forks the runs of experiments, and the
commands of ``tied``.
"""

import gc
import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from q4kd.harness.runs.experiment import ONE_THREAD
from q4kd.harness.runs.start import fork_server
from q4kd.harness.runs.start.forked import ONE_THREADED, ForkedProcess, ForkServer
from q4kd.harness.runs.supervise import child_environment

_TIED = "mutants.tied"


class Preloaded:
    """The server of one tree, as the session asks it.

    Args:
        folder: its socket lies there.
        env: its environment.

    Raises:
        RuntimeError: when it cannot fork honestly.
    """

    def __init__(self, folder: Path, env: Mapping[str, str]) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="mutants-")) / "socket"  # the path of a socket must be short
        self._server: subprocess.Popen[bytes] = subprocess.Popen(
            [sys.executable, "-P", "-m", "mutants.preloaded", str(self.path)],
            env={**env, **ONE_THREADED},
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._server.stdout is not None
        said = b""
        try:
            said = self._server.stdout.readline().strip()
        finally:
            if said != fork_server.READY:
                self.close()
        if said != fork_server.READY:
            raise RuntimeError(f"expected a process that can fork, got {said.decode()!r}")

    @property
    def pid(self) -> int:
        """Process id of the server."""
        return self._server.pid

    def start(self, words: Sequence[str], cwd: Path, env: Mapping[str, str], log: IO[bytes]) -> ForkedProcess:
        """Fork ``python -m mutants.tied WORDS…`` in ``cwd``; its output and errors go to ``log``.

        Raises:
            RuntimeError: when the server does not answer.
        """
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(str(self.path))
        request = fork_server.encode([_TIED, *words], dict(env), str(cwd))
        sent = socket.send_fds(connection, [request], [log.fileno(), log.fileno()])
        connection.sendall(request[sent:])
        answer = b""
        while not answer.endswith(b"\n"):
            piece = connection.recv(1)
            if not piece:
                connection.close()
                raise RuntimeError("the process that forks has ended")
            answer += piece
        return ForkedProcess(int(json.loads(answer)["pid"]), connection, log, log)

    def close(self) -> None:
        """End the server, and with it what it has forked."""
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.kill()
        self._server.wait()
        self._server.stdin.close()
        self._server.stdout.close()
        shutil.rmtree(self.path.parent, ignore_errors=True)


class Borrowed(ForkServer):
    """The same server as an experiment's runner asks it, which is not the runner's to end."""

    def __init__(self, path: Path) -> None:
        super().__init__(child_environment(Path("/nonexistent"), {**os.environ, **ONE_THREAD}))
        shutil.rmtree(self._folder)
        self._path, self._says = path, fork_server.READY
        self._server = _Running()  # type: ignore[assignment]
        self._opened.set()

    def close(self) -> None:
        """Leave it to the session."""


class _Running:
    """In the place of a process that only its parent can ask: a server that has ended refuses to be connected."""

    def poll(self) -> int | None:
        return None


def main(path: str) -> None:
    """Import, serve, and in a forked process do what was asked for."""
    for name in (*fork_server.IMPORTS, "pytest"):
        importlib.import_module(name)
    gc.freeze()
    request = fork_server.serve(path)
    if request is None:
        return
    tempfile.tempdir = None  # read again from the new environment
    _start_hook()
    server: Any = fork_server
    if request.argv[:1] == [_TIED]:
        server.PROGRAM = request.argv.pop(0)
    fork_server.become(request)


def _start_hook() -> None:
    """Import the ``sitecustomize`` that lies first on the path now, as an interpreter that starts does."""
    importlib.invalidate_caches()
    sys.modules.pop("sitecustomize", None)
    with suppress(ImportError):
        importlib.import_module("sitecustomize")


if __name__ == "__main__":
    main(sys.argv[1])
