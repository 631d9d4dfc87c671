"""A private copy of the checkout in which one file at a time is changed, and commands that run in it.

A process that runs here finds ``q4kd`` by PYTHONPATH before any installed one, and so does everything it starts: the
supervisor passes that variable on. No file of the checkout is ever written.
"""

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from mutants.preloaded import Preloaded
from q4kd.harness.runs.start.forked import ForkedProcess

SUPPORT = Path(__file__).parents[1]
PACKAGES = ("contracts", "evidence", "harness", "trainer")
COPIED = (*PACKAGES, "tests", "pyproject.toml", "README.md", "ARCHITECTURE.md")
# Records of past runs: no claim that is judged here rests on them, and they are most of a checkout's bytes.
_LEFT_OUT = ("bundles", "logs", "kills", "__pycache__", "*.egg-info", ".*")
_POLL_S = 0.2
_NOT_PASSED_ON = ("PYTEST_ADDOPTS", "PYTEST_PLUGINS")
# Time stamps of changed files differ by a second at least, because compiled files are found stale by these.
_FIRST_STAMP = 1_500_000_000


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, None when it was killed for its time, and its seconds."""

    code: int | None
    seconds: float


class Stopped(Exception):  # noqa: N818 - what a person asked for is no error
    """Raised when the session ends while a command runs: nothing was learnt from it."""


class Tree:
    """One private copy of ``checkout`` below ``folder``; not to be used by two threads at one time.

    Once ``stop`` is set, its commands are killed (Stopped).
    """

    def __init__(self, checkout: Path, folder: Path, stop: threading.Event) -> None:
        self.folder, self.checkout, self._stop = folder.resolve(), folder.resolve() / "checkout", stop
        self._stamp = _FIRST_STAMP
        shutil.rmtree(self.folder, ignore_errors=True)
        self.checkout.mkdir(parents=True)
        for name in COPIED:
            source, target = checkout / name, self.checkout / name
            if source.is_dir():
                ignored = (
                    shutil.ignore_patterns(*_LEFT_OUT)
                    if name != "tests"
                    else shutil.ignore_patterns(".*", "__pycache__")
                )
                shutil.copytree(source, target, ignore=ignored)
            elif source.is_file():
                shutil.copy2(source, target)
        package = self.folder / "path" / "q4kd"
        package.mkdir(parents=True)
        for name in PACKAGES:
            (package / name).symlink_to(self.checkout / name)
        self._preloaded: Preloaded | None = None

    @property
    def path(self) -> Path:
        """The folder on PYTHONPATH."""
        return self.folder / "path"

    @contextmanager
    def changed(self, module: str, source: bytes) -> Iterator[None]:
        """Put ``source`` in the place of one module; on leaving, the module is as it was."""
        path = self.checkout / module
        original = path.read_bytes()
        self._write(path, source)
        try:
            yield
        finally:
            self._write(path, original)

    def _write(self, path: Path, source: bytes) -> None:
        self._stamp += 2
        path.write_bytes(source)
        os.utime(path, (self._stamp, self._stamp))

    def empty(self, name: str) -> Path:
        """Return an empty folder beside the copy."""
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    @property
    def server(self) -> Preloaded:
        """What forks the commands and runs of this tree; started when it is first asked for."""
        if self._preloaded is None:
            self._preloaded = Preloaded(self.folder, self._environment())
        return self._preloaded

    def run(self, words: list[str], limit_s: float, output: Path) -> Ended:
        """Fork ``mutants.tied WORDS…`` here until its end or for ``limit_s`` seconds; nothing of it is left.

        Standard output and errors go to the file ``output``.
        """
        if self._stop.is_set():
            raise Stopped
        scratch = self.folder / "tmp"
        scratch.mkdir(exist_ok=True)
        env = {**self._environment(), "TMPDIR": str(scratch)}
        with output.open("wb") as log:
            process = self.server.start(words, self.checkout, env, log)
            started = time.monotonic()
            code: int | None = None
            try:
                while code is None and time.monotonic() - started < limit_s and not self._stop.is_set():
                    with suppress(subprocess.TimeoutExpired):
                        code = process.wait(_POLL_S)
            finally:
                self._kill_all(process)
                process.release()
                shutil.rmtree(scratch, ignore_errors=True)
        if self._stop.is_set():  # what has ended may have been ended
            raise Stopped
        return Ended(code, time.monotonic() - started)

    def _environment(self) -> dict[str, str]:
        env = {name: value for name, value in os.environ.items() if name not in _NOT_PASSED_ON}
        path = os.pathsep.join([str(self.path), str(SUPPORT), *filter(None, [env.get("PYTHONPATH")])])
        return {**env, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def _kill_all(self, process: ForkedProcess) -> None:
        """Kill the command and whatever runs in this tree, however far it has moved from its parent."""
        tree: list[psutil.Process] = []
        with suppress(psutil.Error):
            tree = psutil.Process(process.pid).children(recursive=True)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        # What had lost its parent before is found among our own children (see ``adopt_orphans``).
        for member in {*tree, *psutil.Process().children(recursive=True)}:
            with suppress(psutil.Error):
                ours = member.environ().get("PYTHONPATH", "").startswith(f"{self.path}{os.pathsep}")
                if ours and member.pid != self.server.pid:
                    member.kill()
                    member.wait(5.0)

    def remove(self) -> None:
        """Delete the copy and end what forks in it."""
        if self._preloaded is not None:
            self._preloaded.close()
            self._preloaded = None
        shutil.rmtree(self.folder, ignore_errors=True)
