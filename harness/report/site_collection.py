"""What the site keeps of many bundles: one entry each, and what their contracts loosened from one to the next."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from q4kd.harness.claims.changes import Change, contract_changes
from q4kd.harness.claims.model import Contract
from q4kd.harness.report.trends import Measure
from q4kd.harness.report.verdict import Verdict


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What the site keeps of one bundle.

    Attributes:
        name: file name of the bundle.
        when: time of its findings, in seconds since 1970.
        made: the same for a person.
        profile: the profile judged on.
        commit: the commit judged.
        verdict: its verdict, see ``verdict.py``.
        counts: the findings' summary.
        verdicts: claim key → verdict, or ``untested`` for a claim out of scope.
        measures: what its checks measured.
        contracts: digest of the contracts as run.
        report: link to its report.
    """

    name: str
    when: float
    made: str
    profile: str
    commit: str
    verdict: Verdict
    counts: Mapping[str, int]
    verdicts: Mapping[str, str]
    measures: tuple[Measure, ...]
    contracts: str
    report: str


@dataclass
class Collection:
    """The bundles of a folder, oldest first; what could not be read and why; parsed contracts by digest."""

    entries: list[Entry] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    contracts: dict[str, list[Contract] | str] = field(default_factory=dict)


def loosened_between(entries: Sequence[Entry], found: Collection) -> list[tuple[Entry, Entry, Change | str]]:
    """Return what each bundle's contracts loosened against the one before it, newest first; or why nobody can tell."""
    changes: list[tuple[Entry, Entry, Change | str]] = []
    for old, new in pairwise(entries):
        if old.contracts == new.contracts:
            continue
        was, now = found.contracts[old.contracts], found.contracts[new.contracts]
        if isinstance(was, str) or isinstance(now, str):
            reason = was if isinstance(was, str) else now
            changes.append((old, new, f"the contracts cannot be compared: {reason}"))
            continue
        changes += [(old, new, change) for change in contract_changes(was, now) if change.kind == "loosened"]
    return changes[::-1]
