"""What other installed projects add to the registries, by entry points: experiments, checks and faults.

A project names its modules, or objects in them, under ``q4kd.experiments``, ``q4kd.checks`` and ``q4kd.faults``. A
contract can only name what is installed; it brings no code. What is broken is refused by the name of its distribution.
"""

import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from q4kd.trainer.errors import InputError

Group = Literal["q4kd.experiments", "q4kd.checks", "q4kd.faults"]


@dataclass(frozen=True)
class Extension:
    """One entry point, loaded.

    Attributes:
        name: the entry point's name; for a check, the name that contracts say.
        module: the module it lies in.
        origin: entry point and distribution, for messages.
        value: the module, or the object in it.
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
    def blamed(self) -> Iterator[None]:
        """Turn whatever goes wrong inside into an error that names this extension."""
        with _blaming(self.origin):
            yield


@contextmanager
def _blaming(origin: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # foreign code: whatever it raises, its owner must be named
        raise InputError(
            origin,
            expected="an extension that can be loaded",
            got=" ".join(f"{type(error).__name__}: {error}".split())[:300],
            remedy="repair or uninstall that distribution",
        ) from error


@lru_cache(maxsize=8)
def load_extensions(group: Group) -> tuple[Extension, ...]:
    """Load every entry point of a group, by name.

    Raises:
        InputError: naming the distribution of the first that cannot be imported, or of two with one name.
    """
    found: dict[str, Extension] = {}
    for point in sorted(importlib.metadata.entry_points(group=group), key=lambda point: (point.name, point.value)):
        distribution = (
            f"{point.dist.name} {point.dist.version}" if point.dist is not None else "an unknown distribution"
        )
        origin = f"{group} {point.name!r} of {distribution}"
        with _blaming(origin):
            if point.name in found:
                raise ValueError(f"the name is taken by {found[point.name].origin}")
            found[point.name] = Extension(point.name, point.module, origin, point.load())
    return tuple(found.values())
