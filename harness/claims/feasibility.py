"""Whether a time that a claim promises is possible at all: its work against the rooflines measured on a machine.

A check that bounds a time says so by ``TIME_BOUNDS``, a mapping of the parameter's dotted path to ``seconds`` (the
bound is a time) or ``per_second`` (it is a rate). A claim that uses one states ``falsifier.work``: the least work of
what the bound times, or of one item of what it counts. No code does work faster than the machine moves it (the roofline
model, Williams, Waterman and Patterson 2009), so a bound below ``max(FLOP / FLOP/s, bytes / B/s)`` is infeasible.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from q4kd.harness.checks import time_bounds
from q4kd.harness.claims.model import Claim
from q4kd.harness.claims.profile import Profile
from q4kd.harness.records.json_types import JsonObject, JsonValue

Outcome = Literal["feasible", "infeasible", "unknown"]
_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True, kw_only=True)
class Formula:
    """A named count of FLOP. ``keys`` are the numbers it needs, ``text`` shows it with them filled in."""

    keys: tuple[str, ...]
    flops: Callable[[Mapping[str, float]], float]
    text: str


FORMULAS: Mapping[str, Formula] = {
    # Products of weights with tokens only, one multiplication and one addition each; attention comes on top.
    "forward": Formula(
        keys=("weights", "tokens"),
        flops=lambda work: 2 * work["weights"] * work["tokens"],
        text="2 x {weights:.4g} weights x {tokens:.6g} tokens",
    ),
    # The student's backward pass multiplies twice for each product of its forward pass.
    "distillation_step": Formula(
        keys=("teacher_weights", "student_weights", "tokens"),
        flops=lambda work: (2 * work["teacher_weights"] + 6 * work["student_weights"]) * work["tokens"],
        text="(2 x {teacher_weights:.4g} + 6 x {student_weights:.4g} weights) x {tokens:.6g} tokens",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Work:
    """The least work of what a bound times: FLOP in bf16, bytes moved, and how the FLOP were counted (or "")."""

    flops: float
    bytes: float
    counted: str


@dataclass(frozen=True, kw_only=True)
class Feasibility:
    """One time bound of a claim on a profile, and the sum that shows its outcome in one line.

    It is infeasible when a measured roofline forbids it, and unknown when one is missing or not measured.
    """

    profile: str
    outcome: Outcome
    arithmetic: str


def read_work(entry: Mapping[str, str | float]) -> Work:
    """Return the work that a validated ``work:`` mapping states."""
    formula = FORMULAS[str(entry["formula"])] if "formula" in entry else None
    if formula is None:
        return Work(flops=float(entry.get("flops", 0)), bytes=float(entry.get("bytes", 0)), counted="")
    numbers = {key: float(entry[key]) for key in formula.keys}
    flops = formula.flops(numbers)
    counted = f"{formula.text.format(**numbers)} = {_scaled(flops, 'FLOP')}; "
    return Work(flops=flops, bytes=float(entry.get("bytes", 0)), counted=counted)


def assess(claim: Claim, profile: Profile) -> list[Feasibility]:
    """Return the feasibility of every time bound of a claim on a profile; none where it is out of scope."""
    if claim.falsifier is None or claim.work is None or set(claim.falsifier.needs) - profile.provides:
        return []
    work = read_work(claim.work)
    return [
        _compare(work, seconds, profile)
        for use in claim.falsifier.for_profile(profile.name).checks
        for seconds in _allowed_seconds(use.check, use.params)
    ]


def _allowed_seconds(check: str, params: JsonObject) -> Iterator[float]:
    for path, unit in time_bounds(check).items():
        value: JsonValue = params
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if not isinstance(value, (int, float)):
            continue
        if unit == "seconds":
            yield float(value)
        elif value > 0:  # a rate of nothing promises nothing
            yield 1.0 / float(value)


def _compare(work: Work, seconds: float, profile: Profile) -> Feasibility:
    sums: list[str] = []
    unmeasured: list[str] = []
    exceeded = False
    for amount, unit, name in ((work.flops, "FLOP", "bf16_flops"), (work.bytes, "B", "bytes_per_s")):
        roof = profile.rooflines.get(name)
        if not amount:
            continue
        if roof is None:
            unmeasured.append(f"profile {profile.name} has no roofline {name}")
            continue
        floor = amount / roof.value
        relation = ">" if floor > seconds else "≤"
        needed = f", which would take {_scaled(amount / seconds, unit)}/s" if floor > seconds > 0 else ""
        sums.append(
            f"{_scaled(amount, unit)} / {_scaled(roof.value, roof.unit)} = {_time(floor)} "
            f"{relation} {_time(seconds)}{needed}"
        )
        if not roof.measured:
            unmeasured.append(f"the roofline {name} of {profile.name} is not measured")
        exceeded |= roof.measured and floor > seconds
    outcome: Outcome = "infeasible" if exceeded else "unknown" if unmeasured else "feasible"
    return Feasibility(profile=profile.name, outcome=outcome, arithmetic=work.counted + "; ".join([*sums, *unmeasured]))


def _scaled(value: float, unit: str) -> str:
    for factor, prefix in _PREFIXES:
        if value >= factor:
            return f"{value / factor:.4g} {prefix}{unit}"
    return f"{value:.4g} {unit}"


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s"
