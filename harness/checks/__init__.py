"""The closed registry of checks. Each is a pure module: raw runs to a small observation, observation to a judgement.

A check module exports ``NAME``, ``PARAMS`` (JSON Schema of its parameters), ``DIRECTIONS`` (which parameters are upper
or lower bounds; for a list or a boolean, ``lower`` says that more, or true, is stricter), ``READS`` (what of a run its
``extract`` may look at), ``extract``, ``judge`` and ``mutate``, which spoils an observation in every way that ``judge``
must notice. A check that bounds a time may also export ``TIME_BOUNDS``: the path of each such parameter to its kind,
``{"max_s": "seconds"}`` or ``{"min_per_s": "per_second"}``; a claim by it must state its work.
"""

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any, Protocol

from q4kd.harness.checks.judgement import REASONS, Judgement, Mutation
from q4kd.harness.raw import RawRun

__all__ = ["CHECKS", "REASONS", "Check", "Judgement", "Mutation"]

_NAMES = (
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
    PARAMS: dict[str, Any]
    DIRECTIONS: dict[str, str]
    READS: tuple[str, ...]

    @staticmethod
    def extract(runs: Mapping[str, RawRun], params: Mapping[str, Any], min_observations: int) -> dict[str, Any]:
        """Reduce raw runs to the numbers that the judgement needs (JSON-able)."""

    @staticmethod
    def judge(observation: Mapping[str, Any], params: Mapping[str, Any], min_observations: int) -> Judgement:
        """Decide, from the observation alone."""

    @staticmethod
    def mutate(observation: Mapping[str, Any], params: Mapping[str, Any], min_observations: int) -> list[Mutation]:
        """Spoil a corroborated observation in every way that ``judge`` must notice, each with its name."""


class _Checks(Mapping[str, Check]):
    """The check modules by name, imported when asked for."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names
        self._modules: dict[str, Check] = {}

    def __getitem__(self, name: str) -> Check:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._modules:
            module: Any = import_module(f"q4kd.harness.checks.{name}")
            self._modules[name] = module
        return self._modules[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


CHECKS: Mapping[str, Check] = _Checks(_NAMES)
