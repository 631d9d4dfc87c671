"""The closed registry of checks. Each is a pure module: raw runs to a small observation, observation to a judgement.

A check module exports ``NAME``, ``PARAMS`` (JSON Schema of its parameters), ``DIRECTIONS`` (which parameters are upper
or lower bounds), ``extract(runs, params, min_observations)`` and ``judge(observation, params, min_observations)``.
"""

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any, Protocol

from q4kd.harness.checks.judgement import REASONS, Judgement
from q4kd.harness.raw import RawRun

__all__ = ["CHECKS", "REASONS", "Check", "Judgement"]

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

    @staticmethod
    def extract(runs: Mapping[str, RawRun], params: Mapping[str, Any], min_observations: int) -> dict[str, Any]:
        """Reduce raw runs to the numbers that the judgement needs (JSON-able)."""

    @staticmethod
    def judge(observation: Mapping[str, Any], params: Mapping[str, Any], min_observations: int) -> Judgement:
        """Decide, from the observation alone."""


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
