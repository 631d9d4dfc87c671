"""The pages of the site over many bundles: all of them, and one page for each profile."""

import re
from collections.abc import Sequence
from statistics import median
from typing import TypeAlias, TypedDict

from q4kd.harness.index_trends import MIN_EARLIER, WINDOW, Trend, trends_of
from q4kd.harness.loosening import Change
from q4kd.harness.report_page import cut, render_page
from q4kd.harness.report_verdict import MARKS, PLAIN
from q4kd.harness.site_collection import Collection, Entry, loosened_between

Row: TypeAlias = dict[str, object]
_COLUMNS = 24  # bundles of a claim's history
_ROWS = 1000
_TEXT = 300
_ORDER = {"corroborated": 0, "untested": 1, "inconclusive": 2, "falsified": 3}


class _Profile(TypedDict):
    """What the page of one profile shows."""

    bundles: list[Row]
    regressions: list[Row]
    loosened: list[Row]
    history: list[Row]
    columns: list[tuple[str, str]]
    trends: list[Row]
    machines: int


def render_site(found: Collection) -> dict[str, str]:
    """Return the pages by file name: ``index.html``, and ``profile-….html`` for each profile."""
    profiles = sorted({entry.profile for entry in found.entries})
    files = _file_names(profiles)
    parts = {profile: _profile(found, profile) for profile in profiles}
    nav = [(cut(profile, 60), files[profile]) for profile in profiles]
    flags = {row["entry"]: row for part in parts.values() for row in part["bundles"]}
    newest = [(nav[i][0], nav[i][1], parts[profile]) for i, profile in enumerate(profiles)]
    pages = {
        "index.html": render_page(
            "index.html.j2",
            title="Evidence",
            nav=nav,
            here="index.html",
            newest=newest,
            bundles=[flags[entry.name] for entry in reversed(found.entries)],
            unreadable=[(cut(name, _TEXT), cut(reason, _TEXT)) for name, reason in found.unreadable],
        )
    }
    for profile in profiles:
        name = cut(profile, 60)
        pages[files[profile]] = render_page(
            "profile.html.j2",
            title=f"Evidence on {name}",
            profile=name,
            nav=nav,
            here=files[profile],
            earlier=MIN_EARLIER,
            window=WINDOW,
            **parts[profile],
        )
    return pages


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
    bundles: list[Row] = []
    for number, entry in enumerate(entries):
        worse = _worse(entries[number - 1], entry) if number else []
        bundles.append(
            {
                "entry": entry.name,
                "name": cut(entry.name, 120),
                "made": _short(entry.made),
                "profile": cut(entry.profile, 60),
                "machine": cut(entry.verdict.machine, 120),
                "commit": cut(entry.commit.replace(" with uncommitted changes", " + changes"), 60),
                "tone": entry.verdict.tone,
                "mark": MARKS[entry.verdict.tone],
                "title": entry.verdict.title,
                "counts": entry.counts,
                "report": entry.report,
                "regressions": sum(source == number for source, _ in marked),
                "loosened": sum(isinstance(change, Change) and new is entry for _, new, change in loosened),
                "worse": [cut(key, _TEXT) for key in worse],
            }
        )
    return {
        "bundles": bundles[::-1],
        "regressions": [_regression(trend, source, entries) for source, trend in marked[:_ROWS]],
        "loosened": [_loosened(*change) for change in loosened[:_ROWS]],
        "history": _history(entries),
        "columns": [(_short(entry.made), entry.report) for entry in entries[-_COLUMNS:]],
        "trends": [_trend(trend) for trend in trends[:_ROWS]],
        "machines": len({entry.verdict.machine for entry in entries}),
    }


def _worse(old: Entry, new: Entry) -> list[str]:
    """Return the claims whose verdict got worse, or that are gone although they were judged before."""
    lost = {key: "absent" for key in old.verdicts if key not in new.verdicts}
    now = {**new.verdicts, **lost}
    ranks = _ORDER | {"absent": 2}
    return [key for key, was in old.verdicts.items() if was != "untested" and ranks[now[key]] > ranks[was]]


def _regression(trend: Trend, source: int, entries: Sequence[Entry]) -> Row:
    at = trend.sources.index(source)
    earlier = trend.values[max(0, at - WINDOW) : at]
    return {
        "claim": _parts(trend.key),
        "check": cut(trend.check, 80),
        "machine": cut(trend.machine, 120),
        "made": _short(entries[source].made),
        "report": entries[source].report,
        "before": _number(median(earlier), trend.unit),
        "now": _number(trend.values[at], trend.unit),
        "runs": len(earlier),
        "newest": at == len(trend.values) - 1,
    }


def _short(moment: str) -> str:
    """Return a moment without its zone, which the page states once."""
    return moment.removesuffix(" UTC")


def _parts(key: str) -> tuple[str, str]:
    """Return a claim's id and its contract, for a person."""
    contract, _, name = key.rpartition("::")
    return cut(name, _TEXT), cut(contract, _TEXT)


def _number(value: float, unit: str) -> str:
    return f"{100 * value:.3g} %" if unit == "of the way to the bound" else f"{value:.4g}"


def _loosened(old: Entry, new: Entry, change: Change | str) -> Row:
    return {
        "from": _short(old.made),
        "to": _short(new.made),
        "report": new.report,
        "claim": _parts(change.key if isinstance(change, Change) else "every claim"),
        "text": cut(change.text if isinstance(change, Change) else change, _TEXT),
    }


def _history(entries: Sequence[Entry]) -> list[Row]:
    """Return, for every claim, its verdicts in the newest bundles: changed claims first, those out of scope last."""
    recent = entries[-_COLUMNS:]
    words = {**PLAIN, "untested": "out of scope", "absent": "not in the plan"}
    marks = {**MARKS, "untested": "-", "absent": ""}
    rows: list[tuple[int, Row]] = []
    for key in dict.fromkeys(key for entry in reversed(recent) for key in entry.verdicts):
        verdicts = [entry.verdicts.get(key, "absent") for entry in recent]
        rank = 0 if len(set(verdicts) - {"absent"}) > 1 else 2 if "untested" in verdicts else 1
        cells = [(verdict, marks[verdict], words[verdict]) for verdict in verdicts]
        rows.append((rank, {"claim": _parts(key), "cells": cells}))
    return [row for _, row in sorted(rows, key=lambda row: row[0])[:_ROWS]]


def _trend(trend: Trend) -> Row:
    low, high = min(trend.values), max(trend.values)
    span = high - low
    shown = trend.values[-60:]
    offset = len(trend.values) - len(shown)
    step = 112 / max(1, len(shown) - 1)
    points = [
        (round(4 + step * i, 1), round(26 - 22 * ((value - low) / span if span else 0.5), 1))
        for i, value in enumerate(shown)
    ]
    flagged = [points[i] for i in range(len(shown)) if trend.marks[offset + i] == "worse"]
    latest = trend.marks[-1]
    said = {
        "worse": "regression",
        "better": "better than the spread",
        "few": f"{len(trend.values)} of {MIN_EARLIER + 1} runs needed",
        "": "within the spread",
    }[latest]
    return {
        "claim": _parts(trend.key),
        "check": cut(trend.check, 80),
        "machine": cut(trend.machine, 120),
        "points": " ".join(f"{x},{y}" for x, y in points),
        "last": points[-1],
        "flagged": flagged,
        "runs": len(trend.values),
        "latest": _number(trend.values[-1], trend.unit),
        "range": f"{_number(low, trend.unit)} to {_number(high, trend.unit)}" if len(trend.values) > 1 else "one run",
        "unit": trend.unit,
        "direction": "lower is better" if trend.lower else "higher is better",
        "mark": latest,
        "said": said,
        "before": trend.before,
    }
