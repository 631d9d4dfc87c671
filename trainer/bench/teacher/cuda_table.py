"""What a run of ``bench/teacher/cuda.py`` found, as rows for JSON and lines for people."""

from dataclasses import asdict
from typing import Any

from q4kd.trainer.bench.interleave import Ratio, Series


def speed_row(series: Series, ratio: Ratio | None, floor: float, with_head: bool) -> dict[str, Any]:
    """Return one arm's numbers on one shape; ``floor`` is the least time of a packed pass in seconds."""
    ordered = sorted(series.seconds)
    median = ordered[len(ordered) // 2]
    return {
        "arm": series.arm,
        "shape": str(series.shape),
        "tokens": series.shape.tokens,
        "with_head": with_head,
        "median_ms": median * 1e3,
        "least_ms": ordered[0] * 1e3,
        "greatest_ms": ordered[-1] * 1e3,
        "seconds": list(series.seconds),
        "floor_fraction": floor / median,
        "q4k_speed_over_it": None if ratio is None else {**asdict(ratio), "shape": str(ratio.shape)},
    }


def speed_line(row: dict[str, Any]) -> str:
    """Return a row as a line."""
    beside = ""
    if ratio := row["q4k_speed_over_it"]:
        beside = f"  q4k runs at {ratio['median']:.3f} of it ({ratio['low']:.3f}..{ratio['high']:.3f})"
    what = "with head" if row["with_head"] else "hidden   "
    return (
        f"{row['tokens']:>5} tokens {what} {row['arm']:<18} {row['median_ms']:8.2f} ms "
        f"({row['least_ms']:.2f}..{row['greatest_ms']:.2f}), floor/time {row['floor_fraction']:.2f}{beside}"
    )


def table(found: dict[str, Any]) -> list[str]:
    """Return the short table of a finished run."""
    busy, copies = found["utilisation"], found["host_copies"]
    to_host = [copy["bytes"] for copy in copies if "DtoH" in copy["kind"]]
    return [
        f"{found['environment']['device']}, torch {found['environment']['torch']}",
        *(speed_line(row) for row in found["speed"]),
        *error_lines(found),
        f"utilisation: this process {busy['sm_percent']}, device {busy['device_percent']}",
        f"copies in a forward pass: {len(to_host)} to the host ({sum(to_host)} bytes), {len(copies)} in all",
        f"bnb-nf4: {found['bnb-nf4']}",
    ]


def error_lines(found: dict[str, Any]) -> list[str]:
    """Return a line per engine: its error, and its ratio to the dense model's at the worst and the median position."""
    return [
        f"error of {name:<18} rms {error['rms']:.2e}, by position over dense-transformers': median "
        f"{error['median_ratio']:.3f} worst {error['worst_ratio']:.3f} (worst single sample "
        f"{error['worst_single_ratio']:.2f})"
        for name, error in found["errors"].items()
    ]
