"""What experiments read of the samples of memory that the supervisor took of a run."""

import json
from collections.abc import Sequence
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
