"""The claims of a report by contract: each with the raw files that its checks read, and the kill matrix."""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from urllib.parse import quote

from q4kd.harness.judging.results import Finding, Findings
from q4kd.harness.records.raw_run import RawRun
from q4kd.harness.report.page import cut
from q4kd.harness.report.verdict import MARKS, PLAIN, ordered

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

    def json(self, value: object) -> str | None:
        """Return a value as JSON of at most ``detail`` characters; None where details are left out."""
        return cut(json.dumps(value, ensure_ascii=False, indent=1), self.detail) if self.detail else None


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


@dataclass(frozen=True)
class File:
    """A file of a run, and the link to it; None when nothing can be linked to."""

    run: str
    name: str
    link: str | None


@dataclass(frozen=True)
class Matrix:
    """The kill matrix of one contract: whether each claim caught each fault, None where the claim does not name it."""

    faults: list[str]
    lines: list[tuple[Finding, list[bool | None]]]


@dataclass(frozen=True)
class Group:
    """One contract: how many claims ended how (verdict, words, number), each claim with its files, the matrix."""

    name: str
    counts: list[tuple[str, str, int]]
    rows: list[tuple[Finding, list[File]]]
    matrix: Matrix | None


def contract_groups(findings: Findings, runs: Mapping[str, RawRun], raw: str | None, limits: Limits) -> list[Group]:
    """Return the contracts in order, with their claims: fallen first.

    Args:
        findings: the findings.
        runs: the runs of the bundle.
        raw: where the bundle's files lie, as the beginning of a link; None when nothing can be linked to.
        limits: how much to show.
    """
    groups: dict[str, list[Finding]] = {row.contract: [] for row in findings.rows}
    for row in ordered(findings.rows)[: limits.rows]:
        groups[row.contract].append(row)
    found = []
    for name, rows in ((name, rows) for name, rows in groups.items() if rows):
        ended: Counter[str] = Counter(row.verdict for row in rows)
        counts = [(verdict, PLAIN[verdict], ended[verdict]) for verdict in MARKS if ended[verdict]]
        files = [(row, list(_files(row, runs, raw, limits))[: 2 * limits.parts]) for row in rows]
        found.append(Group(name, counts, files, _matrix(rows, limits)))
    return found


def _files(row: Finding, runs: Mapping[str, RawRun], raw: str | None, limits: Limits) -> Iterator[File]:
    """Yield the files that a claim's checks read, the most telling of each run first; all when no check is known."""
    from q4kd.harness.checks import CHECKS

    known = [CHECKS[check.check].READS for check in row.checks if check.check in CHECKS]
    read = {name for reads in known for name in reads} or set(_FILES)
    for run in (runs[name] for name in row.runs[: limits.parts] if name in runs):
        names = run.store.names()
        for prefix in (file for name, file in _FILES.items() if name in read):
            for name in names:
                if name == prefix or (prefix.endswith("/") and name.startswith(prefix)):
                    yield File(run.name, name, link_to(raw, f"runs/{run.name}/{name}"))


def link_to(raw: str | None, name: str) -> str | None:
    """Return a link to a file of the bundle, relative to the page; None when nothing can be linked to."""
    return None if raw is None else quote(f"{raw}{name}")


def _matrix(rows: list[Finding], limits: Limits) -> Matrix | None:
    asking = [row for row in rows if row.sabotage or row.mutations]
    faults = list(dict.fromkeys(kill.fault for row in asking for kill in row.sabotage))[: limits.rows // 10]
    caught = [{kill.fault: kill.caught for kill in row.sabotage} for row in asking]
    lines = [(row, [seen.get(fault) for fault in faults]) for row, seen in zip(asking, caught, strict=True)]
    return Matrix(faults, lines) if asking else None
