"""Time several engines on the same work, turn by turn, and say how much faster one is with its dispersion.

A machine's speed drifts while it is measured (clocks, heat, neighbours), so a ratio is taken only between runs that lie
next to each other: in every round each arm runs once, in an order that rotates, and the ratio belongs to the round.

An arm (``Arm``) is an engine with a model loaded. It may run in this process (CUDA arms do: they share the
device and one allocator) or in a worker process of its own (``teacher/worker.py``: CPU arms do, because two thread
pools in one process fight for the cores). Either way:

    prepare()             load the model, warm up; returns facts for the log (version, dtype, threads, bytes)
    run(ids_BT, save)     one timed forward pass over int64 ids [B, T] with logits at every position, synchronised
                          before and after; returns seconds. ``save``: also write the logits to this .npy file, float32
                          [B, T, V], after the clock has stopped
    close()               give back memory and processes; called once, also after a failure

In ``q4kd bench step`` a run is one optimiser step on int64 windows ``[B, T + 1]`` instead, and nothing is saved.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]


class Arm(Protocol):
    """One engine under test; see the module's docstring."""

    @property
    def name(self) -> str:
        """Short name for the table, such as ``q4k`` or ``llama.cpp``."""

    def prepare(self) -> dict[str, Any]:
        """Load and warm up; return JSON-able facts."""

    def run(self, ids_BT: Ids, save: Path | None = None) -> float:
        """Return the seconds of one turn."""

    def close(self) -> None:
        """Give back what ``prepare`` took."""


@dataclass(frozen=True)
class Shape:
    """A batch of ``batch`` sequences of ``length`` positions."""

    batch: int
    length: int

    @property
    def tokens(self) -> int:
        """Positions in all."""
        return self.batch * self.length

    def __str__(self) -> str:
        return f"{self.batch}x{self.length}"


@dataclass(frozen=True)
class Series:
    """Seconds of one arm on one shape, a value per round."""

    arm: str
    shape: Shape
    seconds: tuple[float, ...]

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second at the median round."""
        return self.shape.tokens / statistics.median(self.seconds)


@dataclass(frozen=True)
class Ratio:
    """How many times faster the subject is than ``against``, as ``spread`` describes the rounds' ratios."""

    against: str
    shape: Shape
    median: float
    low: float
    high: float
    least: float
    greatest: float
    rounds: int


def make_ids(shape: Shape, vocab_size: int, seed: int = 0) -> Ids:
    """Return random token ids int64 ``[B, T]`` in ``[0, vocab_size)``."""
    return np.random.default_rng(seed).integers(0, vocab_size, (shape.batch, shape.length), dtype=np.int64)


def interleave(
    arms: Sequence[Arm], ids_BT: Ids, rounds: int, progress: Callable[[str], None] = lambda _line: None
) -> list[Series]:
    """Run every prepared arm once per round, in rotating order, after one round that is not counted.

    Returns:
        One series per arm, in the order of ``arms``; ``progress`` receives a line per round.
    """
    shape = Shape(*ids_BT.shape)
    seconds: list[list[float]] = [[] for _ in arms]
    for turn in range(-1, rounds):
        for place in range(len(arms)):
            index = (turn + place) % len(arms)
            taken = arms[index].run(ids_BT)
            if turn >= 0:
                seconds[index].append(taken)
        if turn >= 0:
            progress(
                f"{shape} round {turn + 1}/{rounds}: "
                + ", ".join(f"{arm.name} {series[-1]:.3f} s" for arm, series in zip(arms, seconds, strict=True))
            )
    return [Series(arm.name, shape, tuple(values)) for arm, values in zip(arms, seconds, strict=True)]


def compare(series: Sequence[Series]) -> list[Ratio]:
    """Return the first series' speed as a multiple of every other's, round by round."""
    subject, *others = series
    return [
        Ratio(one.arm, subject.shape, rounds=len(one.seconds), **round_ratios(one.seconds, subject.seconds))
        for one in others
    ]


def round_ratios(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Return the ``spread`` of one arm's seconds over another's, round by round."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return ``median``, quartiles ``low`` and ``high``, and extremes ``least`` and ``greatest``."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else list(values) * 3
    extremes = {"least": min(values), "greatest": max(values)}
    return {"median": statistics.median(values), "low": low, "high": high, **extremes}


def describe_spread(found: Mapping[str, float], digits: int) -> str:
    """Return the quartiles and extremes of a ``spread`` as text."""
    low, high, least, greatest = (f"{found[name]:.{digits}f}" for name in ("low", "high", "least", "greatest"))
    return f"quartiles {low}..{high}, extremes {least}..{greatest}"
