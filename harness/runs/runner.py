"""Runs experiments, each once per session whatever the number of workers that ask, and hands out the raw evidence."""

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from filelock import FileLock

from q4kd.harness.records.json_types import JsonRecord
from q4kd.harness.records.raw_run import RawRun
from q4kd.harness.records.redact import redact
from q4kd.harness.records.store import DirectoryStore
from q4kd.harness.runs.cores import Closed, Cores, default_workers
from q4kd.harness.runs.experiment import EXPERIMENTS, ONE_THREAD, Arm, Experiment, Inputs, get_experiment
from q4kd.harness.runs.start.forked import ForkServer
from q4kd.harness.runs.supervise import SETTABLE, child_environment, run_supervised
from q4kd.trainer.errors import InputError
from q4kd.trainer.files import read_json, write_json

LAUNCHER: tuple[str, ...] = (sys.executable, "-P", "-m", "q4kd.harness.child")
RAW_FILES = (
    "argv.json", "stdout.log", "stderr.log", "events.jsonl", "memory.jsonl", "exit.json", "facts.json",
    "harness_error.json",
)  # fmt: skip
MAX_ARRAY_FILE = 8 << 20
# The server's imports cost as much as those of two runs.
_WORTH_A_SERVER = 3
_UNKNOWN_S = 5.0
# A rank before that of every run, but for those that must be alone.
_AT_ONCE = -1e9
_FEEDING = 2
# "fork": a run that measures results alone is forked from a process that has imported torch; "process": none is.
Isolation = Literal["fork", "process"]


class HarnessError(Exception):
    """The harness itself failed around a run: there is nothing to judge, and no verdict may be drawn from it.

    Attributes:
        stage: prepare, start or collect.
    """

    def __init__(self, stage: str, message: str) -> None:
        self.stage = stage
        super().__init__(f"{stage}: {message}")


class ExperimentRunner:
    """Runs experiments into one bundle.

    Clean runs go to ``runs/<run>/`` of ``bundle_dir``, others to ``faulted/<fault>--<experiment>/runs/<run>/``. With
    ``keep_outputs`` what the programs wrote besides the raw evidence (checkpoints) is kept, for looking at by hand.

    Attributes:
        cores: what runs take, ``workers`` of them together; None stands for what the machine has.
        expected: seconds that runs should take, by run name: of those that wait for cores the longest is first.
        told: called with a run's name when it begins, and again, with its seconds, when it has ended.
    """

    def __init__(
        self,
        bundle_dir: Path,
        inputs: Inputs,
        profile: str,
        *,
        keep_outputs: bool = False,
        workers: int | None = None,
        isolation: Isolation = "process",
    ) -> None:
        self.bundle_dir, self.inputs, self.profile, self.keep_outputs = bundle_dir, inputs, profile, keep_outputs
        self.cores = Cores(workers or default_workers())
        self.expected: Mapping[str, float] = {}
        self.told: Callable[[str, float | None], None] = lambda _run, _seconds: None
        self._locks = bundle_dir / ".locks"
        self._isolation = isolation
        self._server: ForkServer | None = None

    def prepare_forks(self, experiments: Iterable[str]) -> None:
        """Start the fork server where enough of these experiments' runs may come from it to pay for it."""
        arms = [(get_experiment(name), arm) for name in experiments for arm in get_experiment(name).arms]
        enough = sum(may_fork(*pair) for pair in arms) >= _WORTH_A_SERVER
        if self._isolation == "fork" and self._server is None and enough:
            self._server = ForkServer(child_environment(Path("/nonexistent"), {**os.environ, **ONE_THREAD}))
            threading.Thread(target=self._open, args=(self._server,), name="fork server", daemon=True).start()

    def _open(self, server: ForkServer) -> None:
        """Open the fork server, on a core like a run: what is timed must not be disturbed by it either."""
        try:
            with self.cores.taken(1, rank=_AT_ONCE):
                server.open()
        except Closed:
            server.close()  # which lets go of who waits for it

    def close(self) -> None:
        """End the fork server."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def run(
        self,
        experiment_name: str,
        fault: str | None = None,
        arms: Iterable[str | None] | None = None,
        timeout_s: float | None = None,
    ) -> dict[str, RawRun]:
        """Return the experiment's runs by run name, executing those that have not been executed yet.

        Args:
            experiment_name: name in the registry.
            fault: plant this fault in the arms it applies to; the other arms are the session's clean runs, copied.
            arms: only these arms; None means all.
            timeout_s: replaces each arm's own limit.

        Raises:
            InputError: for an unknown experiment or fault.
            HarnessError: when inputs could not be made, the program not started or its outputs not measured.
        """
        experiment = get_experiment(experiment_name)
        wanted = [arm for arm in experiment.arms if arms is None or arm.name in set(arms)]
        root, faulted = self.bundle_dir, wanted
        if fault is not None:
            from q4kd.harness.runs.faults import get_fault

            root = self.faulted_root(experiment_name, fault)
            limited = get_fault(fault).arms
            faulted = [arm for arm in wanted if limited is None or arm.name in limited]
            clean = [arm for arm in wanted if arm not in faulted]
            if clean:
                self.run(experiment_name, arms=[arm.name for arm in clean], timeout_s=timeout_s)
        self._locks.mkdir(parents=True, exist_ok=True)
        lock = self._locks / f"{experiment_name}--{fault or 'clean'}.lock"
        with FileLock(lock):
            missing = [arm for arm in wanted if not _complete(root / "runs" / experiment.run_name(arm))]

            def finish(arm: Arm) -> None:
                folder = root / "runs" / experiment.run_name(arm)
                if arm in faulted:
                    self._execute(experiment, arm, folder, fault, timeout_s)
                else:
                    shutil.copytree(self.bundle_dir / "runs" / folder.name, folder, dirs_exist_ok=True)

            with ThreadPoolExecutor(max(1, min(experiment.parallel, self.cores.total))) as pool:
                list(pool.map(finish, missing))
            for arm in wanted:
                folder = root / "runs" / experiment.run_name(arm)
                if not self.keep_outputs and wanted == list(experiment.arms):
                    prune(folder)
        store = DirectoryStore(root)
        names = [experiment.run_name(arm) for arm in wanted]
        for name in names:
            _raise_recorded(root / "runs" / name)
        return {name: RawRun(store, name) for name in names}

    def faulted_root(self, experiment_name: str, fault: str) -> Path:
        """Return the folder whose ``runs/`` holds an experiment's runs under a fault; it is never a clean run's."""
        return self.bundle_dir / "faulted" / f"{fault}--{experiment_name}"

    def _execute(
        self, experiment: Experiment, arm: Arm, folder: Path, fault: str | None, timeout_s: float | None
    ) -> None:
        with ExitStack() as stack:
            if self._server is not None and may_fork(experiment, arm):
                self._server.wait_open()  # meanwhile its core is for others
            if "cuda" in experiment.needs or experiment.exclusive:
                stack.enter_context(self.cores.accelerator(alone=experiment.exclusive))
            alone, rank = "time" in experiment.measures, self.rank(experiment.name, arm)
            stack.enter_context(self.cores.taken(self._cores_of(experiment, arm), alone=alone, rank=rank))
            started = time.monotonic()
            self.told(experiment.run_name(arm), None)
            self._record(experiment, arm, folder, fault, timeout_s)
            self.told(experiment.run_name(arm), time.monotonic() - started)

    def _cores_of(self, experiment: Experiment, arm: Arm) -> int:
        """An arm that does not say how many threads it has may use every core; one on the accelerator feeds that."""
        feeds = experiment.exclusive or "cuda" in experiment.needs
        return int(arm.env.get("OMP_NUM_THREADS", _FEEDING if feeds else self.cores.total))

    def rank(self, experiment_name: str, arm: Arm | None = None) -> float:
        """Return the place of an arm, or of a whole experiment, among those that wait; the lowest is served first.

        What must be alone comes first, while nothing else is there; then what the longest chain of runs begins with.
        """
        experiment = get_experiment(experiment_name)
        if "time" in experiment.measures:
            return float("-inf")
        chain = experiment.arms if experiment.parallel == 1 or arm is None else (arm,)
        later = chain if arm is None else chain[chain.index(arm) :]
        return -sum(self.expected.get(experiment.run_name(one), _UNKNOWN_S) for one in later)

    def _record(
        self, experiment: Experiment, arm: Arm, folder: Path, fault: str | None, timeout_s: float | None
    ) -> None:
        if folder.exists():
            shutil.rmtree(folder)  # left by a worker that died half way
        folder.mkdir(parents=True)
        try:
            stage = "prepare"
            experiment.prepare(self.inputs)
            arguments = arm.argv(self.inputs)
            settings = experiment.environment(arm)
            unknown = sorted(set(arm.env) - set(SETTABLE))
            if unknown:
                raise ValueError(f"arm sets {unknown}, which are not among {SETTABLE}")
            stage = "start"
            options = ["--fault", fault] if fault else []
            places = self._placeholders(folder)
            command = ["python", "-m", "q4kd.harness.child", *options, "--", *arguments]
            recorded = [redact(word, places) for word in command]
            write_json(
                folder / "argv.json",
                {
                    "argv": recorded,
                    "fault": fault,
                    "cwd": "run",
                    "env": dict(sorted(settings.items())),
                    **({"exits": list(arm.exits)} if arm.exits else {}),
                },
            )
            run_supervised(
                [*LAUNCHER, *options, "--", *arguments],
                run_dir=folder,
                cwd=folder,
                timeout_s=arm.timeout_s if timeout_s is None else timeout_s,
                stall_s=arm.stall_s,
                interval_s=arm.interval_s,
                env={**os.environ, **settings},
                placeholders=places,
                server=self._server if may_fork(experiment, arm) else None,
                samples_apart="memory" in experiment.measures,
            )
            stage = "collect"
            (folder / "arrays").mkdir(exist_ok=True)
            facts = experiment.collect(folder, self.inputs)
            _check_arrays(folder)
            write_json(folder / "facts.json", facts)
        except Exception as error:  # whatever broke, it broke in the harness: recorded, and never a verdict
            message = redact(f"{type(error).__name__}: {error}", self._placeholders(folder))[:2000]
            write_json(folder / "harness_error.json", {"stage": stage, "error": message})

    def _placeholders(self, folder: Path) -> dict[str, str]:
        given = self.inputs.given.paths()
        return {
            **{str(place): f"{{{role}}}" for role, path in given for place in (path, path.resolve())},
            **{str(path): "{inputs}" for path in (self.inputs.folder, self.inputs.folder.resolve())},
            **{str(path): "{run}" for path in (folder, folder.resolve())},
            **{str(path): "{bundle}" for path in (self.bundle_dir, self.bundle_dir.resolve())},
        }


def may_fork(experiment: Experiment, arm: Arm) -> bool:
    """Say whether an arm may be forked from the fork server: it measures results alone, on one thread of the CPU.

    Another project's program may not expect torch, so it is always started by itself.
    """
    plain = not (experiment.measures or experiment.exclusive or "cuda" in experiment.needs)
    ours = EXPERIMENTS.module(experiment.name).startswith("q4kd.")
    return plain and ours and arm.env.get("OMP_NUM_THREADS") == "1" and "MALLOC_MMAP_THRESHOLD_" not in arm.env


def prune(folder: Path) -> None:
    """Remove what is not raw evidence from a run folder: checkpoints and other outputs, already measured by then."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.name in RAW_FILES and path.is_file() and not path.is_symlink():
            continue
        if path.name == "arrays" and path.is_dir() and not path.is_symlink():
            for item in path.iterdir():
                if item.suffix != ".npz" or item.is_symlink() or not item.is_file():
                    shutil.rmtree(item) if item.is_dir() and not item.is_symlink() else item.unlink()
            continue
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _complete(folder: Path) -> bool:
    """exit.json marks the end of the program, facts.json the end of measuring it; an error ends a run too."""
    finished = (folder / "exit.json").is_file() and (folder / "facts.json").is_file()
    return finished or (folder / "harness_error.json").is_file()


def _check_arrays(folder: Path) -> None:
    for path in (folder / "arrays").iterdir():
        if path.stat().st_size > MAX_ARRAY_FILE:
            got, remedy = f"{path.stat().st_size}", "collect seeded positions and columns instead of whole arrays"
            raise InputError(f"arrays/{path.name}", expected=f"at most {MAX_ARRAY_FILE} bytes", got=got, remedy=remedy)


def _raise_recorded(folder: Path) -> None:
    recorded = folder / "harness_error.json"
    if recorded.is_file():
        value: JsonRecord = read_json(recorded, 1 << 16)
        raise HarnessError(str(value.get("stage")), str(value.get("error")).removeprefix(f"{value.get('stage')}: "))
