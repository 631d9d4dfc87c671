"""What experiments read of the samples of memory that the supervisor took of a run."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# A phase of a small run takes tenths of a second; a sample further away from a mark is one of another phase.
_NEAR_S = 0.05


def read_samples(run_dir: Path) -> list[dict[str, Any]]:
    """Return the samples of a run in the order of their times; see ``MemoryLog`` for what each holds."""
    return [json.loads(line) for line in (run_dir / "memory.jsonl").read_text(encoding="utf-8").splitlines()]


def sample_at(samples: Sequence[dict[str, Any]], mark: float) -> dict[str, Any] | None:
    """Return the last sample up to a time, or the first after it; None where neither lies within 50 ms of it.

    What a phase takes is the growth from its beginning. Where the machine was too busy for a sample there, a later one
    already holds a part of it, and nothing can be said.
    """
    before = [sample for sample in samples if mark - _NEAR_S <= sample["t"] <= mark]
    after = [sample for sample in samples if mark < sample["t"] <= mark + _NEAR_S]
    return before[-1] if before else after[0] if after else None


def growth(run_dir: Path, field: str, begin: float, end: float, at_least: int = 1) -> int | None:
    """Return by how many bytes a field of the samples grew from ``begin`` to its largest value until ``end``.

    None where no sample is near the beginning, or fewer than ``at_least`` lie between the two times.
    """
    samples = read_samples(run_dir)
    first = sample_at(samples, begin)
    during = [int(sample[field]) for sample in samples if begin <= sample["t"] <= end]
    return None if first is None or len(during) < at_least else max(during) - int(first[field])


def planned_bytes(plan: Mapping[str, Any]) -> int:
    """Return the peak of a ``memory_plan`` event without the item of what the allocator keeps beside it."""
    kept = sum(int(item["bytes"]) for item in plan["items"] if item["name"] == "allocator")
    return int(plan["peak_bytes"]) - kept
