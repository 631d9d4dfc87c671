"""Trends over bundles: what a claim measured from run to run on one machine, and which runs are regressions.

A value is compared with the median of up to 20 earlier runs of the same claim by the same parameters on the same
machine, at least 3. It is marked when it is worse by more than the largest of

- 5 x 1.4826 x MAD, the median absolute deviation scaled to a standard deviation of normal noise;
- of fewer than 10 earlier runs n, whose MAD is itself uncertain, also their range x (1 + 27 / n²);
- 1 % of the median, for values that hardly vary at all.

On normal noise alone about 1 % of values are so marked after 3 runs and 0.5 % from 5 on (simulated in the tests).
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from q4kd.harness.judging.results import CheckResult, Findings

MIN_EARLIER = 3
WINDOW = 20
_FEW = 10
_DEVIATIONS = 5.0
_TO_SIGMA = 1.4826
_SMALLEST = 0.01
_LARGEST = 1e30
_NUMBER = re.compile(r"(?<![\w.])-?\d{1,20}(?:\.\d{1,20})?(?:e[+-]?\d{1,3})?", re.ASCII)

Mark = Literal["", "worse", "better", "few"]


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What one check of a claim measured in one bundle.

    Attributes:
        key: the claim.
        check: the check's name, with its number where a claim uses it twice.
        value: the margin where a check has one (1 at the bound, lower is better), else the first number it states.
        lower: whether lower is better.
        unit: what ``value`` is, for a person.
        params: digest of the check's parameters: values judged by other bounds are not comparable.
    """

    key: str
    check: str
    value: float
    lower: bool
    unit: str
    params: str


@dataclass(frozen=True, kw_only=True)
class Trend:
    """The values of one measure on one machine, oldest first, each with where it comes from and its mark.

    ``before`` counts earlier values by other parameters, which are left out.
    """

    machine: str
    key: str
    check: str
    unit: str
    lower: bool
    sources: tuple[int, ...]
    values: tuple[float, ...]
    marks: tuple[Mark, ...]
    before: int


def measures_of(findings: Findings) -> Iterator[Measure]:
    """Yield the measures of a bundle's findings: every judged check with a margin, or a number of known direction."""
    for row in findings.rows:
        seen: dict[str, int] = {}
        for check in row.checks:
            name = check.check
            seen[name] = seen.get(name, 0) + 1
            found = _value_of(check) if check.verdict != "inconclusive" else None
            if found is not None:
                value, lower, unit = found
                stated = json.dumps(check.params, sort_keys=True).encode("utf-8", "surrogatepass")
                yield Measure(
                    key=row.key,
                    check=name if seen[name] == 1 else f"{name} #{seen[name]}",
                    value=value,
                    lower=lower,
                    unit=unit,
                    params=hashlib.sha256(stated).hexdigest(),
                )


def _value_of(check: CheckResult) -> tuple[float, bool, str] | None:
    if (margin := check.margin) is not None:
        return (float(margin), True, "of the way to the bound") if abs(margin) < _LARGEST else None
    # Of checks without a margin, these two state first a number of which more is better.
    better_higher = check.check == "improves" or check.params.get("metric") == "cosine"
    number = _NUMBER.search(check.measured or "") if better_higher else None
    if number is None or not abs(float(number[0])) < _LARGEST:
        return None
    return float(number[0]), False, "margin" if check.check == "improves" else "cosine"


def trends_of(bundles: Sequence[tuple[str, Sequence[Measure]]]) -> list[Trend]:
    """Return the trend of every measure of the newest bundle that has it, by claim, check and machine.

    Args:
        bundles: (machine, measures) of each bundle, oldest first.
    """
    series: dict[tuple[str, str, str], list[tuple[int, Measure]]] = {}
    for number, (machine, measures) in enumerate(bundles):
        for measure in measures:
            series.setdefault((measure.key, measure.check, machine), []).append((number, measure))
    trends = []
    for (key, check, machine), found in sorted(series.items()):
        newest = found[-1][1]
        same = [(number, measure.value) for number, measure in found if measure.params == newest.params]
        values = tuple(value for _, value in same)
        trend = Trend(
            machine=machine,
            key=key,
            check=check,
            unit=newest.unit,
            lower=newest.lower,
            sources=tuple(number for number, _ in same),
            values=values,
            marks=marks_of(values, lower=newest.lower),
            before=len(found) - len(same),
        )
        trends.append(trend)
    return trends


def marks_of(values: Sequence[float], *, lower: bool) -> tuple[Mark, ...]:
    """Return, for each value, whether it is ``worse`` or ``better`` than the runs before it by more than they vary.

    ``few`` stands where fewer than 3 runs came before.
    """
    marks: list[Mark] = []
    for index, value in enumerate(values):
        earlier = values[max(0, index - WINDOW) : index]
        if len(earlier) < MIN_EARLIER:
            marks.append("few")
            continue
        change = value - median(earlier) if lower else median(earlier) - value
        marks.append("" if abs(change) <= spread_of(earlier) else "worse" if change > 0 else "better")
    return tuple(marks)


def spread_of(earlier: Sequence[float]) -> float:
    """Return how far from the median of ``earlier`` a run may lie before it is marked."""
    centre, count = median(earlier), len(earlier)
    deviation = _TO_SIGMA * median(abs(value - centre) for value in earlier)
    spread = max(_DEVIATIONS * deviation, _SMALLEST * abs(centre))
    if count < _FEW:
        spread = max(spread, (max(earlier) - min(earlier)) * (1 + 27 / count**2))
    return spread
