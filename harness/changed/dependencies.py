"""Everything that the runs of an experiment depend on, as digests: what is recorded in a bundle, and compared later.

A run depends on its experiment with its probes and the code that makes its inputs, on every module it may execute, on
the files that were given, on the packages installed, on the machine, and on the environment variables it gets. What
judges it, claims, checks and kill records, is not among them: a run that is carried is judged anew.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from q4kd.harness.changed.program import Program, source_files
from q4kd.harness.judging.digests import experiment_closure
from q4kd.harness.records.json_types import JsonObject, JsonRecord
from q4kd.harness.requirements import requirements
from q4kd.harness.runs.experiment import get_experiment
from q4kd.harness.runs.faults import tested_packages
from q4kd.harness.runs.supervise import PASSED_ON, SETTABLE
from q4kd.harness.runs.user_inputs import GivenFiles
from q4kd.trainer.errors import InputError

FORMAT = "q4kd-dependencies/1"
# Tools around the runs, which none of them imports.
_NOT_IN_A_RUN = ("dev", "docs")
# Where programs and libraries are found: what is found there counts by its own digest or version.
_PLACES = ("PATH", "LANG", "TMPDIR", "VIRTUAL_ENV", "PYTHONPATH")


@dataclass(frozen=True, kw_only=True)
class Dependencies:
    """What the runs of a bundle depend on.

    Attributes:
        machine: instruction set, processor, cores, memory and GPUs, by name.
        packages: versions of Python and of the packages that a run may import.
        settings: digests of the environment variables a run gets, and of the files that were given.
        modules: digest of each module that some run may execute.
        experiments: by name, the digest of the experiment and the modules that its runs may execute.
    """

    machine: Mapping[str, str]
    packages: Mapping[str, str]
    settings: Mapping[str, str]
    modules: Mapping[str, str]
    experiments: Mapping[str, tuple[str, frozenset[str]]]

    def differences(self, base: "Dependencies", experiment: str) -> list[str]:
        """Return which digests of an experiment are not those of ``base``, by name; none when its runs can stand."""
        if experiment not in base.experiments:
            return ["it is not in the base"]
        (mine, modules), (theirs, others) = self.experiments[experiment], base.experiments[experiment]
        changed = ["experiment"] if mine != theirs else []
        names = sorted(modules | others)
        changed += [f"module {name}" for name in names if self.modules.get(name) != base.modules.get(name)]
        for kind in ("packages", "settings"):
            now, then = getattr(self, kind), getattr(base, kind)
            for name in sorted({*now, *then}):
                if now.get(name) != then.get(name):
                    told = f" {then.get(name, 'none')} → {now.get(name, 'none')}" if kind == "packages" else ""
                    changed.append(f"{name}{told}")
        return changed

    def to_json(self) -> JsonObject:
        """Return what ``dependencies.json`` holds; experiments with the same modules name one list of them."""
        programs: dict[str, list[str]] = {}
        experiments: dict[str, JsonObject] = {}
        for name, (digest, modules) in sorted(self.experiments.items()):
            key = _sha256(sorted(modules))[:16]
            programs[key] = sorted(modules)
            experiments[name] = {"experiment": digest, "program": key}
        plain = {name: dict(sorted(getattr(self, name).items())) for name in _TABLES}
        return {"format": FORMAT, **plain, "programs": programs, "experiments": experiments}

    @staticmethod
    def from_json(value: JsonRecord, origin: str) -> "Dependencies":
        """Read what ``to_json`` gave (InputError for anything else)."""
        try:
            if value["format"] != FORMAT:
                raise ValueError(f"format {value['format']!r}")
            tables = {name: {str(key): str(item) for key, item in value[name].items()} for name in _TABLES}
            programs = {str(key): frozenset(map(str, names)) for key, names in value["programs"].items()}
            experiments = {
                str(name): (str(entry["experiment"]), programs[entry["program"]])
                for name, entry in value["experiments"].items()
            }
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            got = f"{type(error).__name__}: {error}"[:200]
            raise InputError(origin, expected=f"a {FORMAT} document", got=got, remedy="run falsify again") from error
        return Dependencies(**tables, experiments=experiments)


_TABLES = ("machine", "packages", "settings", "modules")


def dependencies_now(
    words: Mapping[str, Iterable[str]], environment: JsonRecord, given: GivenFiles, program: Program | None = None
) -> Dependencies:
    """Return what the runs of experiments would depend on, were they made now.

    Args:
        words: the arguments of all runs of each experiment, after the launcher's ``--``.
        environment: what a bundle records of this machine (``environment.json``).
        given: the files given in the place of made inputs.
        program: the modules installed; those of the packages under test when None.

    Raises:
        InputError: an experiment that is unknown here, or has a function without a source.
    """
    program = program or Program(tested_packages())
    experiments: dict[str, tuple[str, frozenset[str]]] = {}
    for name, arguments in words.items():
        digest, closure = experiment_closure(get_experiment(name))
        experiments[name] = digest, program.of_experiment(closure, arguments)
    modules = frozenset().union(*(modules for _, modules in experiments.values()))
    return Dependencies(
        machine=machine_of(environment),
        packages=_packages(),
        settings={"environment variables": _variables(), "given files": _sha256(given.digests())},
        modules={name: program.digest(name) for name in modules},
        experiments=experiments,
    )


def machine_of(environment: JsonRecord) -> dict[str, str]:
    """Return what of a machine may change a result: its processor with all it can do, cores, memory and GPUs."""
    processor, gpu = environment["cpu"], environment["gpu"]
    return {
        "architecture": str(environment["platform"]["machine"]),
        "processor": str(processor["model"]),
        "instructions": _instructions(),
        "cores": str(processor["cores_usable"]),
        "memory, GiB": str(round(environment["memory_bytes"] / 2**30)),
        "GPUs": ", ".join(map(str, gpu["names"])) or "none",
        "driver": str(gpu["driver"]),
    }


def sources_stamp() -> str:
    """Return a digest of sizes and times of all sources that may run, to see that nobody edited them meanwhile."""
    found: list[tuple[str, int, int]] = []
    for path in source_files(tested_packages()):
        state = path.stat()
        found.append((str(path), state.st_size, state.st_mtime_ns))
    return _sha256(sorted(found))


def _instructions() -> str:
    """Return a digest of what the processor says it can do, "unknown" where it says nothing."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, flags = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return _sha256(sorted(flags.split()))[:16]
    return "unknown"


def _packages() -> dict[str, str]:
    found = {"python": f"{platform.python_implementation()} {platform.python_version()}"}
    for name, extra in requirements():
        if extra not in _NOT_IN_A_RUN:
            with suppress(importlib.metadata.PackageNotFoundError):
                found[name] = importlib.metadata.version(name)
    return found


def _variables() -> str:
    names = sorted({*PASSED_ON, *SETTABLE} - set(_PLACES))
    return _sha256({name: os.environ[name] for name in names if name in os.environ})


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
