"""The registry of checks, closed to contracts. Each is pure: raw runs to a small observation, and that to a judgement.

A check module exports ``NAME``, ``PARAMS`` (JSON Schema of its parameters), ``DIRECTIONS`` (which parameters are upper
or lower bounds; for a list or a boolean, ``lower`` says that more, or true, is stricter), ``READS`` (what of a run its
``extract`` may look at), ``extract``, ``judge`` and ``mutate``, which spoils an observation in every way that ``judge``
must notice. A check that bounds a time may also export ``TIME_BOUNDS``: the path of each such parameter to its kind,
``{"max_s": "seconds"}`` or ``{"min_per_s": "per_second"}``; a claim by it must state its work.

Another project adds a check, a module or an object of this form, by an entry point of its name in ``q4kd.checks``.
"""

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Protocol, cast

from jsonschema import Draft202012Validator

from q4kd.harness.checks.judgement import READABLE, REASONS, Judgement, Mutation
from q4kd.harness.records.json_types import JsonRecord
from q4kd.harness.records.raw_run import RawRun
from q4kd.harness.runs.extensions import blaming, load_extensions

__all__ = ["CHECKS", "REASONS", "Check", "Judgement", "Mutation", "time_bounds"]

_NAMES = (
    "error_ratio",
    "gpu_utilization",
    "improves",
    "latency",
    "log_absent",
    "log_present",
    "memory_ceiling",
    "parity",
    "ratio",
    "rejects",
    "residency",
    "survives",
    "table",
)


class Check(Protocol):
    """What a check module provides."""

    NAME: str
    PARAMS: JsonRecord
    DIRECTIONS: dict[str, str]
    READS: tuple[str, ...]

    @staticmethod
    def extract(runs: Mapping[str, RawRun], params: JsonRecord, min_observations: int) -> JsonRecord:
        """Reduce raw runs to the numbers that the judgement needs (JSON-able)."""

    @staticmethod
    def judge(observation: JsonRecord, params: JsonRecord, min_observations: int) -> Judgement:
        """Decide, from the observation alone."""

    @staticmethod
    def mutate(observation: JsonRecord, params: JsonRecord, min_observations: int) -> list[Mutation]:
        """Spoil a corroborated observation in every way that ``judge`` must notice, each with its name."""


class _Checks(Mapping[str, Check]):
    """The checks by name: our modules, imported when asked for, and those of installed extensions."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names
        self._modules: dict[str, Check] = {}
        self._added: dict[str, Check] | None = None

    def _extensions(self) -> dict[str, Check]:
        if self._added is None:
            added: dict[str, Check] = {}
            for extension in load_extensions("q4kd.checks"):
                with blaming(extension.origin):
                    if extension.name in self._names:
                        raise ValueError(f"{extension.name!r} is the name of a built-in check")
                    added[extension.name] = _usable(extension.name, extension.value)
            self._added = added
        return self._added

    def __getitem__(self, name: str) -> Check:
        if name not in self._names:
            return self._extensions()[name]
        if name not in self._modules:
            self._modules[name] = cast("Check", import_module(f"q4kd.harness.checks.{name}"))
        return self._modules[name]

    def __iter__(self) -> Iterator[str]:
        return iter((*self._names, *self._extensions()))

    def __len__(self) -> int:
        return len(self._names) + len(self._extensions())


def _usable(name: str, check: Check) -> Check:
    """Return a foreign check that has all of a check's parts (ValueError or AttributeError naming the one it lacks)."""
    if name != check.NAME:
        raise ValueError(f"NAME is {check.NAME!r}")
    Draft202012Validator.check_schema(check.PARAMS)
    if not set(check.DIRECTIONS.values()) <= {"upper", "lower"}:
        raise ValueError("DIRECTIONS must map parameters to 'upper' or 'lower'")
    if not check.READS or not set(check.READS) <= set(READABLE):
        raise ValueError(f"READS must name some of {', '.join(READABLE)}")
    for part in ("extract", "judge", "mutate"):
        if not callable(getattr(check, part)):
            raise ValueError(f"{part} is not a function")
    return check


CHECKS: Mapping[str, Check] = _Checks(_NAMES)


def time_bounds(check: str) -> Mapping[str, str]:
    """Return the parameters by which a check bounds a time, path → ``seconds`` or ``per_second``; empty for others."""
    bounds: Mapping[str, str] = getattr(CHECKS.get(check), "TIME_BOUNDS", {})
    return bounds
