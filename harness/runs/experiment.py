"""Experiments: supervised runs of the real program, each with a name, typed inputs and one or more arms.

The registry is closed to contracts: one names an experiment; it cannot pass arguments, nor name a path. Another project
adds experiments by an entry point in ``q4kd.experiments``: a module that calls ``register``, or one or more objects.
"""

import importlib
import inspect
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias, TypeVar, get_args

from filelock import FileLock

from q4kd.harness.runs.extensions import Extension, blaming, load_extensions, subject_modules
from q4kd.harness.runs.user_inputs import GivenFiles
from q4kd.trainer.errors import unknown_name
from q4kd.trainer.files import sha256_file

# What an arm measured of its outputs; ``facts.json`` holds it.
Facts: TypeAlias = dict[str, object]
# An arm with this ``env`` has one thread, so that results and memory do not depend on the cores of the machine.
ONE_THREAD: Mapping[str, str] = {"OMP_NUM_THREADS": "1"}
# With this a process sees no GPU, whatever the machine has.
NO_GPU: Mapping[str, str] = {"CUDA_VISIBLE_DEVICES": ""}
# What a run may measure of its own process besides results; see ``Experiment.measures``.
Measured = Literal["time", "memory", "process"]
_Collect = TypeVar("_Collect", bound=Callable[[Path, "Inputs"], Facts])
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


class Inputs:
    """Files that experiments read, made once per session whatever the number of processes that ask.

    They lie in ``folder``, which is not part of the bundle: only their digests are. Sizes may depend on ``profile``.
    Files of ``given`` stand in for made ones, by the name of the input.
    """

    def __init__(self, folder: Path, profile: str, given: GivenFiles | None = None) -> None:
        self.folder, self.profile, self.given = folder, profile, given or GivenFiles()
        (folder / ".locks").mkdir(parents=True, exist_ok=True)

    def file(self, name: str, make: Callable[[Path], object]) -> Path:
        """Return ``folder/name``, calling ``make(path)`` to write it (a file or a folder) if it is not there yet.

        A file that the run was given under that name is returned as it lies, and nothing is made.
        ``make`` writes to another name; the result is renamed when complete, so a reader never sees half of it.

        Raises:
            ValueError: when ``name`` could leave the folder.
            FileNotFoundError: when ``make`` returned without writing.
        """
        parts = Path(name).parts
        if not parts or any(part.startswith(".") or "/" in part for part in parts):
            raise ValueError(f"input name {name!r} must be relative, without hidden parts")
        given = self.given.path(name)
        if given is not None:
            return given
        target = self.folder / name
        if target.exists():
            return target
        with FileLock(self.folder / ".locks" / ("--".join(parts) + ".lock")):
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                # The suffix stays last, because writers choose a format by it.
                draft = target.parent / f".making-{target.name}"
                if draft.is_dir():
                    shutil.rmtree(draft)
                draft.unlink(missing_ok=True)
                make(draft)
                draft.rename(target)
        return target

    def digests(self) -> dict[str, dict[str, str | int]]:
        """Return ``{relative name: {"sha256", "bytes"}}`` of every finished input file, given ones included."""
        found = self.given.digests()
        for path in sorted(self.folder.rglob("*")):
            relative = path.relative_to(self.folder)
            if path.is_file() and not any(part.startswith(".") for part in relative.parts):
                found[relative.as_posix()] = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
        return found


def _nothing(_inputs: Inputs) -> None:
    return


def _no_facts(_run_dir: Path, _inputs: Inputs) -> Facts:
    return {}


@dataclass(frozen=True)
class Arm:
    """One run of an experiment.

    Attributes:
        name: None for the only arm of an experiment.
        argv: arguments after the launcher's ``--``; it runs in the run folder, events go to ``events.jsonl``.
        timeout_s: seconds of wall time allowed.
        stall_s: seconds without a new event before it counts as stalled; None for programs that write none.
        env: values for the few variables that a run may set (``supervise.SETTABLE``).
        interval_s: seconds between memory samples; shorter where a whole phase takes less than a second.
        exits: exit codes besides 0 that are normal here, such as 2 for a command that must refuse its input.
    """

    name: str | None
    argv: Callable[[Inputs], list[str]]
    timeout_s: float = 600.0
    stall_s: float | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    interval_s: float = 0.05
    exits: tuple[int, ...] = ()


@dataclass(frozen=True)
class Experiment:
    """A named set of runs, executed once and judged by many falsifiers.

    Attributes:
        name: as contracts say it.
        title: what it does, in one line.
        needs: what the machine must provide, such as ``cuda``; without that the runs see no GPU.
        arms: its runs, in order; a later arm may read what an earlier one left in ``../<experiment>.<arm>/``.
        prepare: makes inputs that no ``argv`` asks for, before the run.
        collect: called after each arm with the run folder; measures outputs, writes ``arrays/*.npz``, returns facts.
        exclusive: whether it must be alone on the accelerator.
        parallel: arms that may run at one time, on machines with as many cores; their arms set OMP_NUM_THREADS.
        measures: ``time`` has the machine to itself, since another program on a core next to it makes it slower.
            ``memory`` needs a process whose pages are its own, and ``process`` (how a program starts, or is several by
            torch.distributed) one that was started as a user starts it: neither is forked from a process that has
            imported torch. Both run beside others, which change neither.
        sources: further modules that decide what is measured; kill records age with every definition in them.
    """

    name: str
    title: str
    needs: tuple[str, ...]
    arms: tuple[Arm, ...]
    prepare: Callable[[Inputs], object] = _nothing
    collect: Callable[[Path, Inputs], Facts] = _no_facts
    exclusive: bool = False
    parallel: int = 1
    sources: tuple[str, ...] = ()
    measures: tuple[Measured, ...] = ()

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        if not names or len(set(names)) != len(names) or (None in names and len(names) > 1):
            raise ValueError(f"experiment {self.name!r}: arms need distinct names, or one arm without a name")
        if not all(_NAME.fullmatch(name) for name in (self.name, *(n for n in names if n is not None))):
            raise ValueError(f"experiment {self.name!r}: names are lower-case letters, digits, '-' and '_'")
        if not set(self.measures) <= set(get_args(Measured)):
            raise ValueError(
                f"experiment {self.name!r}: measures {self.measures}, expected some of {get_args(Measured)}"
            )

    def environment(self, arm: Arm) -> dict[str, str]:
        """Return the variables that a run of an arm sets.

        An experiment that does not need CUDA runs on the CPU of any machine: it sees no GPU, so that neither torch nor
        accelerate can choose one, nor hold memory for it.
        """
        return {**({} if "cuda" in self.needs else NO_GPU), **arm.env}

    def run_name(self, arm: Arm) -> str:
        """Return the name of an arm's run folder."""
        return self.name if arm.name is None else f"{self.name}.{arm.name}"


class _Registry(Mapping[str, Experiment]):
    """Experiments by name; the modules that define them are imported at the first look."""

    def __init__(self) -> None:
        self._known: dict[str, Experiment] = {}
        self._modules: dict[str, str] = {}
        self._loaded = False

    def add(self, experiment: Experiment, module: str | None = None) -> Experiment:
        if self._known.get(experiment.name, experiment) is not experiment:
            raise ValueError(f"experiment {experiment.name!r} is registered twice")
        self._known[experiment.name] = experiment
        self._modules.setdefault(experiment.name, module or experiment.arms[0].argv.__module__)
        return experiment

    def module(self, name: str) -> str:
        self._load()
        return self._modules[name]

    def _load(self) -> None:
        if self._loaded:
            return
        for module in subject_modules("experiments"):
            before = set(self._known)
            importlib.import_module(module)
            self._modules.update(dict.fromkeys(set(self._known) - before, module))
        for extension in load_extensions("q4kd.experiments"):
            with blaming(extension.origin):
                self._extend(extension)
        self._loaded = True

    def _extend(self, extension: Extension) -> None:
        value = extension.value
        if inspect.ismodule(value):
            return  # it registered its experiments when it was loaded
        for experiment in (value,) if isinstance(value, Experiment) else tuple(value):
            if not isinstance(experiment, Experiment):
                raise TypeError(f"expected an Experiment, got {type(experiment).__name__}")
            self.add(experiment, extension.module)

    def __getitem__(self, name: str) -> Experiment:
        self._load()
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(sorted(self._known))

    def __len__(self) -> int:
        self._load()
        return len(self._known)


EXPERIMENTS = _Registry()


def register(experiment: Experiment) -> Experiment:
    """Add an experiment to the registry and return it (ValueError for a second one of the same name)."""
    return EXPERIMENTS.add(experiment)


def declare(
    name: str,
    title: str,
    *arms: Arm,
    needs: tuple[str, ...] = (),
    prepare: Callable[[Inputs], object] = _nothing,
    collect: Callable[[Path, Inputs], Facts] = _no_facts,
    exclusive: bool = False,
    parallel: int = 1,
    measures: tuple[Measured, ...] = (),
) -> Experiment:
    """Register the experiment of these parts, which are ``Experiment``'s, and return it.

    Raises:
        ValueError: as ``register`` and ``Experiment`` do.
    """
    return register(Experiment(name, title, needs, arms, prepare, collect, exclusive, parallel, (), measures))


def experiment(
    name: str,
    title: str,
    *arms: Arm,
    needs: tuple[str, ...] = (),
    prepare: Callable[[Inputs], object] = _nothing,
    exclusive: bool = False,
    parallel: int = 1,
    measures: tuple[Measured, ...] = (),
) -> Callable[[_Collect], _Collect]:
    """Declare the experiment whose runs the decorated function collects. The parameters are ``Experiment``'s.

    Raises:
        ValueError: as ``register`` and ``Experiment`` do.
    """

    def declare_collected(collect: _Collect) -> _Collect:
        register(Experiment(name, title, needs, arms, prepare, collect, exclusive, parallel, (), measures))
        return collect

    return declare_collected


def get_experiment(name: str) -> Experiment:
    """Return one experiment (InputError for an unknown one)."""
    if name not in EXPERIMENTS:
        raise unknown_name(f"experiment {name!r}", name, EXPERIMENTS, "experiment")
    return EXPERIMENTS[name]
