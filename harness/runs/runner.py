"""Runs experiments, each once per session whatever the number of workers that ask, and hands out the raw evidence."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from filelock import FileLock

from q4kd.harness.records.json_types import JsonRecord
from q4kd.harness.records.raw_run import RawRun
from q4kd.harness.records.redact import redact
from q4kd.harness.records.store import DirectoryStore
from q4kd.harness.runs.experiment import Arm, Experiment, Inputs, get_experiment
from q4kd.harness.runs.supervise import SETTABLE, run_supervised
from q4kd.trainer.errors import InputError
from q4kd.trainer.files import read_json, write_json

LAUNCHER: tuple[str, ...] = (sys.executable, "-m", "q4kd.harness.child")
RAW_FILES = (
    "argv.json", "stdout.log", "stderr.log", "events.jsonl", "memory.jsonl", "exit.json", "facts.json",
    "harness_error.json",
)  # fmt: skip
MAX_ARRAY_FILE = 8 << 20


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
    """

    def __init__(self, bundle_dir: Path, inputs: Inputs, profile: str, *, keep_outputs: bool = False) -> None:
        self.bundle_dir, self.inputs, self.profile, self.keep_outputs = bundle_dir, inputs, profile, keep_outputs
        self._locks = bundle_dir / ".locks"

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

            with ThreadPoolExecutor(max(1, min(experiment.parallel, len(os.sched_getaffinity(0))))) as pool:
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
            with ExitStack() as stack:
                if experiment.exclusive:
                    stack.enter_context(FileLock(accelerator_lock()))
                run_supervised(
                    [*LAUNCHER, *options, "--", *arguments],
                    run_dir=folder,
                    cwd=folder,
                    timeout_s=arm.timeout_s if timeout_s is None else timeout_s,
                    stall_s=arm.stall_s,
                    interval_s=arm.interval_s,
                    env={**os.environ, **settings},
                    placeholders=places,
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


def accelerator_lock() -> Path:
    """Return the lock file that keeps two experiments of this host, and of any session, off the accelerator at once."""
    return Path(tempfile.gettempdir()) / f"q4kd-accelerator-{os.getuid()}.lock"


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
