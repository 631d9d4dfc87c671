"""A session of mutants: the clean runs, the sample, several workers; resumable, bounded in time."""

import hashlib
import json
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FrameType
from typing import NoReturn, TypeVar

from filelock import FileLock, Timeout

from mutants.clean import CleanExperiment, CleanStore
from mutants.operators import Mutant, controls
from mutants.sample import draw, load_equivalent, population, split_equivalent
from mutants.tied import adopt_orphans
from mutants.tree import Stopped, Tree
from mutants.trial import Trial, read_trials, try_mutant

_Job = TypeVar("_Job")
_LOOK_S = 0.5
_GRACE_S = 60.0
# Every run imports it.
_EVERYWHERE = "trainer/errors.py"


@dataclass(frozen=True)
class Options:
    """What a session is asked for; the meaning of each is in the help of the command line."""

    checkout: Path
    out: Path
    sample: int
    seed: int
    workers: int
    minutes: float
    modules: tuple[str, ...] = ()
    profile: str = "cpu"
    reached_only: bool = False
    tests_always: bool = False
    without: tuple[str, ...] = ()
    controls: int = 1
    only: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What a session knows at its end."""

    trials: list[Trial]
    controls: list[Trial]
    planned: int
    places: int
    unreached: list[Mutant]
    equivalent: list[tuple[Mutant, str]]
    experiments: list[CleanExperiment]


def run_session(options: Options) -> Outcome:
    """Run or resume a session and return what it knows at its end, which may be before all of the sample was planted.

    Raises:
        RuntimeError: when the folder holds a session of other sources or is in use, or the copies cannot be used.
        KeyboardInterrupt: on SIGINT and SIGTERM; what was finished is kept, and no process is left.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(options.out / ".lock", timeout=0):
            return _run(options)
    except Timeout as error:
        raise RuntimeError(f"{options.out} is in use by another session; name another folder with --out") from error


def _run(options: Options) -> Outcome:
    _refuse_other_sources(options)
    adopt_orphans()
    deadline = time.monotonic() + 60.0 * options.minutes
    stop = threading.Event()
    with _interruptible(), ExitStack() as stack:
        trees = [Tree(options.checkout, options.out / "trees" / str(n), stop) for n in range(options.workers)]
        for tree in trees:
            stack.callback(tree.remove)
        clean = CleanStore(options.out / "clean", options.profile)
        claims, named = clean.plan(trees[0])
        asked = set(options.only or claims) - set(options.without)
        claims = {name: keys for name, keys in claims.items() if name in asked}
        experiments: list[CleanExperiment] = []

        def look(tree: Tree, name: str) -> None:
            found = clean.experiment(tree, name, claims[name])
            experiments.append(found)
            lost = f", not corroborated: {', '.join(found.not_corroborated)}" if found.not_corroborated else ""
            print(f"clean {name}: {len(found.claims)} claims, {found.seconds:.1f} s{lost}", flush=True)

        _spread(list(claims), look, trees, stop, deadline)
        if len(experiments) < len(claims):
            raise RuntimeError(
                f"{len(experiments)} of {len(claims)} experiments ran clean in {options.minutes} minutes"
            )
        experiments.sort(key=lambda run: run.name)
        everything = population(options.checkout, named, experiments, options.modules)
        live, equivalent = split_equivalent(draw(everything, options.seed), load_equivalent())
        unreached = [mutant for mutant in live if not _reached(mutant, experiments)]
        drawn = [m for m in live if _reached(m, experiments)] if options.reached_only else live
        chosen = drawn[: options.sample]
        half = len(chosen) // 2  # when the session is under way
        chosen = [*chosen[:half], *controls(_EVERYWHERE, options.controls), *chosen[half:]]
        results = options.out / "trials.jsonl"
        done = {trial.key for trial in read_trials(results)}
        writing = threading.Lock()

        def plant(tree: Tree, mutant: Mutant) -> None:
            trial = try_mutant(mutant, tree, clean, experiments, tests_always=options.tests_always)
            with writing, results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(trial)) + "\n")
            print(_line(trial), flush=True)

        _spread([mutant for mutant in chosen if mutant.key not in done], plant, trees, stop, deadline)
    keys = {mutant.key for mutant in chosen}
    trials = [trial for trial in read_trials(results) if trial.key in keys and not trial.control]
    unchanged = [trial for trial in read_trials(results) if trial.key in keys and trial.control]
    return Outcome(trials, unchanged, len(chosen) - options.controls, len(live), unreached, equivalent, experiments)


def _reached(mutant: Mutant, experiments: Sequence[CleanExperiment]) -> bool:
    return any(run.claims and run.reaches(mutant.module, mutant.lines) for run in experiments)


def _line(trial: Trial) -> str:
    where = f"{trial.module}:{trial.line} {trial.operator}: {trial.original} -> {trial.mutant}"
    claim = f" by {trial.claim}" if trial.claim else ""
    return f"claims {trial.by_claims}{claim} ({trial.claims_s} s), tests {trial.by_tests} ({trial.tests_s} s): {where}"


def _spread(
    jobs: Sequence[_Job],
    work: Callable[[Tree, _Job], None],
    trees: Sequence[Tree],
    stop: threading.Event,
    deadline: float,
) -> None:
    """Do the jobs in order, one at a time in each tree, until all are done or the deadline has passed.

    What runs then has a little time to end, and is killed. A job that fails ends the session with its error; an
    interruption kills what runs.
    """
    queue: SimpleQueue[_Job] = SimpleQueue()
    for job in jobs:
        queue.put(job)
    failures: list[str] = []

    def worker(tree: Tree) -> None:
        while not stop.is_set() and time.monotonic() < deadline:
            try:
                work(tree, queue.get_nowait())
            except (Empty, Stopped):
                return
            except Exception:  # shown by the main thread, which ends the session
                failures.append(traceback.format_exc())
                stop.set()

    threads = [threading.Thread(target=worker, args=(tree,), name=f"mutants {tree.folder.name}") for tree in trees]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive():
                thread.join(_LOOK_S)
                if time.monotonic() > deadline + _GRACE_S:
                    stop.set()
    except BaseException:
        stop.set()
        for thread in threads:
            thread.join()
        raise
    if failures:
        raise RuntimeError(failures[0])


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGTERM interrupt as SIGINT does."""

    def interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _refuse_other_sources(options: Options) -> None:
    digest = sources_digest(options.checkout)
    path = options.out / "sources.txt"
    if path.exists() and path.read_text(encoding="utf-8") != digest:
        raise RuntimeError(f"{options.out} holds a session of other sources; name another folder with --out")
    path.write_text(digest, encoding="utf-8")


def sources_digest(checkout: Path) -> str:
    """Return a digest of what decides the results: the trainer, the harness, the contracts and the tests."""
    digest = hashlib.sha256()
    for top in ("contracts", "harness", "tests/support", "tests/trainer", "trainer"):
        for path in sorted((checkout / top).rglob("*")):
            if path.is_file() and not {"__pycache__", "mutants"} & set(path.relative_to(checkout).parts):
                digest.update(f"{path.relative_to(checkout).as_posix()}\0".encode())
                digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
