"""The pages of the site over many bundles: all of them, and one page for each profile."""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypedDict

from q4kd.harness.claims.changes import Change
from q4kd.harness.report.page import cut, render_page
from q4kd.harness.report.site_collection import Collection, Entry, loosened_between
from q4kd.harness.report.trends import MIN_EARLIER, WINDOW, Trend, trends_of
from q4kd.harness.report.verdict import MARKS, PLAIN

_COLUMNS = 24  # bundles of a claim's history
_ROWS = 1000
_POINTS = 60  # of a trend's line
_TEXT = 300
_ORDER = {"corroborated": 0, "untested": 1, "inconclusive": 2, "falsified": 3}
_WORDS = {**PLAIN, "untested": "out of scope", "absent": "not in the plan"}
_SIGNS = {**MARKS, "untested": "-", "absent": ""}


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A bundle as a row: what became worse in it, and how many of its measurements and bounds did."""

    entry: Entry
    regressions: int
    loosened: int
    worse: list[str]


@dataclass(frozen=True, kw_only=True)
class Regression:
    """One marked value of a trend: the run that measured it, and the median of the runs before it."""

    trend: Trend
    entry: Entry
    before: float
    now: float
    newest: bool


@dataclass(frozen=True, kw_only=True)
class Line:
    """A trend as a line within 120 x 30 units, with the points that are regressions."""

    trend: Trend
    points: list[tuple[float, float]]
    flagged: list[tuple[float, float]]


class _Profile(TypedDict):
    """What the page of one profile shows. A cell of the history is a verdict, its mark and its words."""

    bundles: list[Bundle]
    regressions: list[Regression]
    loosened: list[tuple[Entry, Entry, str, str]]
    history: list[tuple[str, list[tuple[str, str, str]]]]
    columns: list[Entry]
    trends: list[Line]
    machines: int


def render_site(found: Collection) -> dict[str, str]:
    """Return the pages by file name: ``index.html``, and ``profile-….html`` for each profile."""
    profiles = sorted({entry.profile for entry in found.entries})
    files = _file_names(profiles)
    parts = {profile: _profile(found, profile) for profile in profiles}
    rows = {row.entry.name: row for part in parts.values() for row in part["bundles"]}

    def page(template: str, here: str, **values: object) -> str:
        return render_page(
            template, nav=files, here=here, marks=MARKS, short=_short, number=_number, claim=_parts, **values
        )

    index = page(
        "index.html.j2",
        "index.html",
        newest=[(profile, files[profile], parts[profile]["bundles"]) for profile in profiles],
        bundles=[rows[entry.name] for entry in reversed(found.entries)],
        unreadable=found.unreadable,
    )
    of_profile = functools.partial(page, "profile.html.j2", earlier=MIN_EARLIER, window=WINDOW)
    pages = {files[profile]: of_profile(files[profile], profile=profile, **parts[profile]) for profile in profiles}
    return {"index.html": index, **pages}


def _file_names(profiles: Sequence[str]) -> dict[str, str]:
    names: dict[str, str] = {}
    for profile in profiles:
        stem = f"profile-{re.sub(r'[^A-Za-z0-9]+', '-', profile).strip('-')[:40] or 'unnamed'}"
        taken = set(names.values())
        number = next(n for n in range(1, len(profiles) + 2) if _numbered(stem, n) not in taken)
        names[profile] = _numbered(stem, number)
    return names


def _numbered(stem: str, number: int) -> str:
    return f"{stem}.html" if number == 1 else f"{stem}-{number}.html"


def _profile(found: Collection, profile: str) -> _Profile:
    """Return what the page of one profile shows: its bundles, regressions, loosened bounds, history and trends."""
    entries = [entry for entry in found.entries if entry.profile == profile]
    trends = trends_of([(entry.verdict.machine, entry.measures) for entry in entries])
    loosened = loosened_between(entries, found)
    marked = [
        (source, trend)
        for trend in trends
        for source, mark in zip(trend.sources, trend.marks, strict=True)
        if mark == "worse"
    ]
    marked.sort(key=lambda pair: -pair[0])
    bundles = [
        Bundle(
            entry=entry,
            regressions=sum(source == number for source, _ in marked),
            loosened=sum(isinstance(change, Change) and new is entry for _, new, change in loosened),
            worse=_worse(entries[number - 1], entry) if number else [],
        )
        for number, entry in enumerate(entries)
    ]
    return {
        "bundles": bundles[::-1],
        "regressions": [_regression(trend, source, entries) for source, trend in marked[:_ROWS]],
        "loosened": [
            (old, new, change.key, change.text) if isinstance(change, Change) else (old, new, "every claim", change)
            for old, new, change in loosened[:_ROWS]
        ],
        "history": _history(entries[-_COLUMNS:]),
        "columns": entries[-_COLUMNS:],
        "trends": [_line(trend) for trend in trends[:_ROWS]],
        "machines": len({entry.verdict.machine for entry in entries}),
    }


def _worse(old: Entry, new: Entry) -> list[str]:
    """Return the claims whose verdict got worse, or that are gone although they were judged before."""
    lost = {key: "absent" for key in old.verdicts if key not in new.verdicts}
    now = {**new.verdicts, **lost}
    ranks = _ORDER | {"absent": 2}
    return [key for key, was in old.verdicts.items() if was != "untested" and ranks[now[key]] > ranks[was]]


def _regression(trend: Trend, source: int, entries: Sequence[Entry]) -> Regression:
    at = trend.sources.index(source)
    return Regression(
        trend=trend,
        entry=entries[source],
        before=median(trend.values[max(0, at - WINDOW) : at]),
        now=trend.values[at],
        newest=at == len(trend.values) - 1,
    )


def _short(moment: str) -> str:
    """Return a moment without its zone, which the page states once."""
    return moment.removesuffix(" UTC")


def _parts(key: str) -> tuple[str, str]:
    """Return a claim's id and its contract, for a person."""
    contract, _, name = key.rpartition("::")
    return cut(name, _TEXT), cut(contract, _TEXT)


def _number(value: float, unit: str) -> str:
    return f"{100 * value:.3g} %" if unit == "of the way to the bound" else f"{value:.4g}"


def _history(recent: Sequence[Entry]) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Return, for every claim, its verdicts in the newest bundles: changed claims first, those out of scope last."""
    rows = []
    for key in dict.fromkeys(key for entry in reversed(recent) for key in entry.verdicts):
        verdicts = [entry.verdicts.get(key, "absent") for entry in recent]
        rank = 0 if len(set(verdicts) - {"absent"}) > 1 else 2 if "untested" in verdicts else 1
        rows.append((rank, key, [(verdict, _SIGNS[verdict], _WORDS[verdict]) for verdict in verdicts]))
    return [(key, cells) for _, key, cells in sorted(rows, key=lambda row: row[0])[:_ROWS]]


def _line(trend: Trend) -> Line:
    low, span = min(trend.values), max(trend.values) - min(trend.values)
    shown, marks = trend.values[-_POINTS:], trend.marks[-_POINTS:]
    step = 112 / max(1, len(shown) - 1)
    points = [
        (round(4 + step * i, 1), round(26 - 22 * ((value - low) / span if span else 0.5), 1))
        for i, value in enumerate(shown)
    ]
    flagged = [point for point, mark in zip(points, marks, strict=True) if mark == "worse"]
    return Line(trend=trend, points=points, flagged=flagged)
