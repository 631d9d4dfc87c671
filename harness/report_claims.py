"""The claims of a report: one row for each with its bar and its files, and the kill matrix of each contract."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import quote

from q4kd.harness.raw import RawRun
from q4kd.harness.report_page import cut
from q4kd.harness.report_verdict import MARKS, PLAIN, meaning, ordered
from q4kd.harness.results import CheckResult, Finding, Findings, KillOutcome

# Property of a run that a check reads → its file, in the order in which a person would open them.
_FILES = {
    "stdout": "stdout.log",
    "memory": "memory.jsonl",
    "arrays": "arrays/",
    "facts": "facts.json",
    "events": "events.jsonl",
    "exit": "exit.json",
    "argv": "argv.json",
    "stderr": "stderr.log",
}
_BAR_END = 1.25  # margin at which a bar is full: what is over its bound must be seen to be


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much of a bundle one page shows.

    Attributes:
        rows: claims, runs, inputs, faults of a contract, and so on.
        parts: checks, faults, runs and files of one claim or run.
        text: characters of one text.
        detail: characters of an observation or of a contract's text; 0 leaves them out.
        plots: plots of one kind.
    """

    rows: int
    parts: int
    text: int
    detail: int
    plots: int

    def cut(self, text: object) -> str:
        """Return a text as it is shown, no longer than ``text`` characters."""
        return cut(text, self.text)


@dataclass(frozen=True)
class Bar:
    """A margin as a bar of 100 units: how far it is filled, where the bound stands, and both in words."""

    filled: float
    bound: float
    over: bool
    words: str


def bar_of(margin: float | None) -> Bar | None:
    """Return the bar of a margin, measured / bound; None where a check has none."""
    if margin is None or not math.isfinite(margin) or margin < 0:
        return None
    share = f"{100 * margin:.0f}" if margin > 0.1 else f"{100 * margin:.2g}"
    # A check for which more is better states its bound / measured, so "of the bound" would be wrong.
    words = f"past the bound, {margin:.3g} x" if margin > 1 else f"{share} % of the way to the bound"
    filled = 100 * min(margin, _BAR_END) / _BAR_END
    return Bar(round(max(filled, 0.8 if margin else 0.0), 2), round(100 / _BAR_END, 2), margin > 1, words)


def contract_groups(
    findings: Findings, runs: Mapping[str, RawRun], raw: str | None, limits: Limits
) -> list[dict[str, object]]:
    """Return the contracts in order, each with its claims as rows and its kill matrix.

    Args:
        findings: the findings.
        runs: the runs of the bundle.
        raw: where the bundle's files lie, as the beginning of a link; None when nothing can be linked to.
        limits: how much to show.
    """
    shown = ordered(findings.rows)[: limits.rows]
    groups: dict[str, list[Finding]] = {}
    for row in findings.rows:
        groups.setdefault(row.contract, [])
    for row in shown:
        groups[row.contract].append(row)
    numbers = {row.key: number for number, row in enumerate(findings.rows, 1)}
    return [
        {
            "name": limits.cut(name),
            "counts": [
                (verdict, PLAIN[verdict], count)
                for verdict in MARKS
                if (count := sum(row.verdict == verdict for row in rows))
            ],
            "rows": [_row(row, numbers[row.key], runs, raw, limits) for row in rows],
            "matrix": _matrix(rows, numbers, limits),
        }
        for name, rows in groups.items()
        if rows
    ]


def _row(row: Finding, number: int, runs: Mapping[str, RawRun], raw: str | None, limits: Limits) -> dict[str, object]:
    checks = row.checks
    deciding = row.deciding or next(iter(checks), None)
    files = [file for name in row.runs[: limits.parts] if name in runs for file in _files(row, runs[name], raw)]
    return {
        "anchor": f"claim-{number}",
        "verdict": row.verdict,
        "mark": MARKS[row.verdict],
        "plain": PLAIN[row.verdict],
        "gates": row.required,
        "open": row.verdict == "falsified",
        "id": limits.cut(row.id),
        "rule": limits.cut(row.rule),
        "prediction": limits.cut(row.prediction),
        "if_fails": limits.cut(row.if_fails),
        "message": limits.cut(row.message),
        "reason": limits.cut(row.reason) if row.reason else None,
        "waiver": limits.cut(row.waiver) if row.waiver else None,
        "meaning": meaning(row.reason) if row.reason else "",
        "counterexamples": [
            limits.cut(check.counterexample) for check in checks[: limits.parts] if check.counterexample
        ],
        "measured": limits.cut((deciding and deciding.measured) or "nothing"),
        "bound": limits.cut((deciding and deciding.bound) or "no bound"),
        "bar": bar_of(deciding.margin) if deciding else None,
        "more": max(0, len(checks) - 1),
        "mutations": row.mutations,
        "missed": [limits.cut(name) for name in (row.mutations.missed if row.mutations else ())[: limits.parts]],
        "faults": [_fault(kill, limits) for kill in row.sabotage[: limits.parts]],
        "caught": sum(kill.caught for kill in row.sabotage),
        "planted": len(row.sabotage),
        "checks": [_check(check, limits) for check in checks[: limits.parts]],
        "experiment": limits.cut(row.experiment) if row.experiment else None,
        "runs": [limits.cut(name) for name in row.runs[: limits.parts]],
        "files": files[: 2 * limits.parts],
        "seconds": row.seconds,
    }


def _fault(kill: KillOutcome, limits: Limits) -> dict[str, object]:
    return {
        "fault": limits.cut(kill.fault),
        "caught": kill.caught,
        "detail": limits.cut((kill.detail or "").removeprefix("caught: ")),
    }


def _check(check: CheckResult, limits: Limits) -> dict[str, object]:
    def text(value: object) -> str | None:
        return cut(json.dumps(value, ensure_ascii=False, indent=1), limits.detail) if limits.detail else None

    return {
        "check": limits.cut(check.check),
        "verdict": check.verdict,
        "plain": PLAIN[check.verdict],
        "reason": limits.cut(check.reason) if check.reason else None,
        "measured": limits.cut(check.measured or "nothing"),
        "bound": limits.cut(check.bound or "no bound"),
        "bar": bar_of(check.margin),
        "params": text(check.params),
        "observation": text(check.observation),
    }


def _files(row: Finding, run: RawRun, raw: str | None) -> Iterable[dict[str, object]]:
    """Yield the files of a run that a claim's checks read, the most telling first; all when a check is not known."""
    from q4kd.harness.checks import CHECKS

    known = [CHECKS[check.check].READS for check in row.checks if check.check in CHECKS]
    read = {name for reads in known for name in reads} or set(_FILES)
    names = run.store.names()
    for prefix in (file for name, file in _FILES.items() if name in read):
        for name in names:
            if name == prefix or (prefix.endswith("/") and name.startswith(prefix)):
                yield {"run": run.name, "name": name, "link": link_to(raw, f"runs/{run.name}/{name}")}


def link_to(raw: str | None, name: str) -> str | None:
    """Return a link to a file of the bundle, relative to the page; None when nothing can be linked to."""
    return None if raw is None else quote(f"{raw}{name}")


def _matrix(rows: list[Finding], numbers: Mapping[str, int], limits: Limits) -> dict[str, object] | None:
    """Return the kill matrix of one contract: its claims down, the faults they name across, level 1 beside them."""
    asking = [row for row in rows if row.sabotage or row.mutations]
    faults = list(dict.fromkeys(kill.fault for row in asking for kill in row.sabotage))[: limits.rows // 10]
    if not asking:
        return None
    lines = []
    for row in asking:
        seen = {kill.fault: kill.caught for kill in row.sabotage}
        lines.append(
            {
                "anchor": f"claim-{numbers[row.key]}",
                "id": limits.cut(row.id),
                "mutations": row.mutations,
                "cells": [seen.get(fault) for fault in faults],
            }
        )
    return {"faults": [limits.cut(fault) for fault in faults], "lines": lines}
