"""Where the registries look: the folders of ``subjects``, and what other installed projects add by entry points.

A module of a subject is found by its name: ``probes*`` registers probes, ``faults*`` registers faults, every other one
registers experiments. Another project names its modules, or objects in them, under ``q4kd.experiments``,
``q4kd.checks`` and ``q4kd.faults``. A contract can only name what is installed; it brings no code. An extension that is
broken is refused by the name of its distribution.
"""

import importlib.metadata
import importlib.util
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from q4kd.trainer.errors import InputError

Group = Literal["q4kd.experiments", "q4kd.checks", "q4kd.faults"]
Kind = Literal["experiments", "probes", "faults"]
SUBJECTS = "q4kd.harness.subjects"


@dataclass(frozen=True)
class Extension:
    """One entry point, loaded: its name, its module, the module or object itself, and ``origin`` for messages.

    For a check the name is the one that contracts say.
    """

    name: str
    module: str
    origin: str
    value: Any

    @property
    def package(self) -> str:
        """The top-level package that it comes from."""
        return self.module.partition(".")[0]


@contextmanager
def blaming(origin: str) -> Iterator[None]:
    """Turn whatever goes wrong inside into an error (InputError) that names the extension it comes from."""
    try:
        yield
    except Exception as error:  # foreign code: whatever it raises, its owner must be named
        expected, got = "an extension that can be loaded", " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise InputError(origin, expected=expected, got=got, remedy="repair or uninstall that distribution") from error


@lru_cache(maxsize=4)
def subject_modules(kind: Kind) -> tuple[str, ...]:
    """Return the names of all subjects' modules of one kind, sorted. None of them is imported."""
    spec = importlib.util.find_spec(SUBJECTS)
    assert spec is not None and spec.submodule_search_locations is not None
    names = [
        f"{SUBJECTS}.{subject.name}.{module.name}"
        for folder in spec.submodule_search_locations
        for subject in pkgutil.iter_modules([folder])
        for module in pkgutil.iter_modules([f"{folder}/{subject.name}"])
    ]
    return tuple(sorted(name for name in names if kind_of(name) == kind))


def kind_of(module: str) -> Kind:
    """Return what a subject's module registers, by the beginning of its last name."""
    last = module.rpartition(".")[2]
    return "probes" if last.startswith("probes") else "faults" if last.startswith("faults") else "experiments"


@lru_cache(maxsize=8)
def load_extensions(group: Group) -> tuple[Extension, ...]:
    """Load every entry point of a group, by name.

    Raises:
        InputError: naming the distribution of the first that cannot be imported, or of two with one name.
    """
    found: dict[str, Extension] = {}
    for point in sorted(importlib.metadata.entry_points(group=group), key=lambda point: (point.name, point.value)):
        distribution = f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown distribution"
        origin = f"{group} {point.name!r} of {distribution}"
        with blaming(origin):
            if point.name in found:
                raise ValueError(f"the name is taken by {found[point.name].origin}")
            found[point.name] = Extension(point.name, point.module, origin, point.load())
    return tuple(found.values())
