"""Experiments run ahead of whoever asks for them: all that is planned at once, as far as there are cores."""

import importlib
import importlib.util
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from q4kd.harness.runs.cores import Cores
from q4kd.harness.runs.experiment import EXPERIMENTS
from q4kd.harness.runs.supervise import end_all

# What a package that is not q4kd's must name for its experiments, in the threads below, to import transformers.
_IMPORTERS = (
    b"transformers",
    b"q4kd.trainer",
    b"q4kd.harness.inputs",
    b"q4kd.harness.oracles",
    b"q4kd.harness.subjects",
)
_MAX_THREADS = 256  # a thread that waits for cores costs next to nothing


def settle_imports(experiments: Iterable[str]) -> None:
    """Import what several threads may ask for, before there are several.

    transformers exchanges its module for another while it is imported: of two threads that import it for the first time
    at once, one finds names missing (``cannot import name 'AutoConfig'``). It takes a second, which experiments of a
    package that names neither it nor what of q4kd may import it do not wait for.
    """
    packages = {EXPERIMENTS.module(name).partition(".")[0] for name in experiments if name in EXPERIMENTS}
    if any(_may_import_transformers(package) for package in packages):
        with suppress(ImportError):
            importlib.import_module("transformers")


def _may_import_transformers(package: str) -> bool:
    """Return whether a module of a package names what imports transformers; True where its modules cannot be read."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return True
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):  # a namespace, such as q4kd itself
        return True
    modules = [Path(spec.origin)]
    for folder in spec.submodule_search_locations or ():
        modules += Path(folder).rglob("*.py")
    return any(name in module.read_bytes() for module in modules for name in _IMPORTERS)


class Ahead:
    """Jobs by name, each in a thread that waits for its cores; the longest is served first (``Cores``).

    Args:
        cores: what the jobs' runs take.
        jobs: what each experiment does, by its name; one that raises has done what it could.
    """

    def __init__(self, cores: Cores, jobs: Mapping[str, Callable[[], None]]) -> None:
        self._cores = cores
        if len(jobs) > 1:
            settle_imports(jobs)
        self._pool = ThreadPoolExecutor(min(_MAX_THREADS, max(1, len(jobs))), thread_name_prefix="ahead")
        self._futures: dict[str, Future[None]] = {name: self._pool.submit(job) for name, job in jobs.items()}

    def wait(self, name: str) -> None:
        """Wait until a job has ended, however it ended; return at once for one that is not there."""
        future = self._futures.get(name)
        if future is not None:
            future.exception()

    def stop(self) -> None:
        """End at once: nothing more is started, and what is under way is killed. Does nothing when all have ended."""
        self._cores.close()
        stop(self._pool, self._futures.values())


def stop(pool: ThreadPoolExecutor, futures: Iterable[Future[Any]]) -> None:
    """Cancel what has not begun, and kill the runs that the pool's threads wait for, until no thread is left."""
    pool.shutdown(wait=False, cancel_futures=True)
    while any(future.running() for future in futures):
        end_all()
        time.sleep(0.05)
