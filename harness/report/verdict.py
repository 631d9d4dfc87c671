"""The verdict on a bundle as a person takes it in: what was claimed, what survived, what fell and what is open."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from q4kd.harness.bundle.findings import origin_line, sabotage_lines
from q4kd.harness.checks.judgement import REASONS
from q4kd.harness.claims.plan import Plan, PlanEntry
from q4kd.harness.claims.waivers import expired_lines
from q4kd.harness.judging.results import Finding, Findings
from q4kd.harness.records.json_types import JsonRecord

MARKS = {"corroborated": "✓", "falsified": "✗", "inconclusive": "?"}
# What a verdict is called where a person reads in passing; the field's term stays beside it.
PLAIN = {"corroborated": "survived", "falsified": "fell", "inconclusive": "undecided"}
_TONES = {0: "corroborated", 1: "falsified", 2: "inconclusive"}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What stands at the top of a report.

    Attributes:
        tone: the verdict whose colour and mark the whole run gets.
        title: the outcome in one line.
        scale: how many claims of how many contracts.
        machine: what they were tried on.
        fell: required findings that are falsified.
        undecided: reason → required findings that are inconclusive for it and not waived.
        waived: required findings that are inconclusive and excused by a waiver.
        expired: one line for each waiver that no longer holds.
        untested: reason → plan entries out of scope for it.
        origin: how many claims were judged on runs of another bundle, None when all were run.
        carried: (bundle and when it was made) → the experiments whose runs were made for it.
        shown_to_fail: how many spoilt records and planted faults were noticed, one line each.
        unnoticed: how many of them were not.
    """

    tone: str
    title: str
    scale: str
    machine: str
    fell: tuple[Finding, ...]
    undecided: Mapping[str, list[Finding]]
    waived: tuple[Finding, ...]
    expired: tuple[str, ...]
    untested: Mapping[str, list[PlanEntry]]
    origin: str | None
    carried: Mapping[str, list[str]]
    shown_to_fail: tuple[str, ...]
    unnoticed: int


def verdict_of(findings: Findings, plan: Plan, environment: JsonRecord) -> Verdict:
    """Sum up a bundle from its findings, its plan and its environment."""
    required = [row for row in findings.rows if row.required]
    fell = tuple(row for row in required if row.verdict == "falsified")
    waived = tuple(row for row in required if row.waived)
    undecided: dict[str, list[Finding]] = defaultdict(list)
    for row in required:
        if row.verdict == "inconclusive" and not row.waived:
            undecided[str(row.reason)].append(row)
    untested: dict[str, list[PlanEntry]] = defaultdict(list)
    for entry in plan.entries:
        if entry.scope == "out_of_scope":
            untested[str(entry.reason)].append(entry)
    contracts = len({entry.contract for entry in plan.entries})
    scale = f"{counted(len(plan.entries), 'claim')} of {counted(contracts, 'contract')}"
    return Verdict(
        tone=_TONES[findings.exit_code],
        title=_title(findings.scope, len(required), len(fell), sum(map(len, undecided.values())), len(waived)),
        scale=scale,
        machine=machine_of(environment),
        fell=fell,
        undecided=undecided,
        waived=waived,
        expired=tuple(expired_lines(plan.waivers, findings.created)),
        untested=untested,
        origin=origin_line(findings),
        carried=_carried(findings),
        shown_to_fail=tuple(sabotage_lines(findings)),
        unnoticed=sum(map(_unnoticed, findings.rows)),
    )


def _carried(findings: Findings) -> Mapping[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for entry in findings.carried:
        found[f"{entry.name}, made {entry.created}, manifest {entry.bundle[:16]}…"].append(entry.experiment)
    return found


def _title(scope: str, required: int, fell: int, undecided: int, waived: int) -> str:
    if fell:
        return f"Failed: {fell} of {counted(required, 'claim')} fell"
    if undecided:
        return f"Not passed: {undecided} of {counted(required, 'claim')} could not be judged"
    if required == waived:
        return f"Not passed: no claim was judged{f', {waived} waived' if waived else ''}"
    survived = "the claim survived" if required == 1 else f"all {required} claims survived"
    if waived:
        survived = f"{required - waived} of {required} claims survived, {waived} undecided and waived"
    if scope == "partial":
        return f"Not a pass: {survived}, but only a selection was run"
    return f"Passed: {survived}"


def _unnoticed(row: Finding) -> int:
    passed = row.mutations.tried - row.mutations.caught if row.mutations is not None else 0
    return passed + sum(not kill.caught for kill in row.sabotage)


def counted(count: int, noun: str) -> str:
    """Return ``1 claim``, ``2 claims``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def meaning(reason: str) -> str:
    """Return what a reason of the closed list means, or an empty text for another one."""
    return REASONS.get(reason, "")


def machine_of(environment: JsonRecord) -> str:
    """Return the machine in a few words: its GPUs or none, processor, cores and memory. What is unknown is left out."""
    gpu, cpu = (_mapping(environment.get(name)) for name in ("gpu", "cpu"))
    listed = gpu.get("names")
    names = [str(name) for name in listed] if isinstance(listed, list) else []
    gpus = sorted(set(names))
    parts = [f"{len(names)} x {gpus[0]}" if len(gpus) == 1 and len(names) > 1 else ", ".join(gpus)] if gpus else []
    parts.append(str(cpu.get("model") or "an unknown processor"))
    if isinstance(cpu.get("cores_usable"), int):
        parts.append(counted(cpu["cores_usable"], "core"))
    memory = environment.get("memory_bytes")
    if isinstance(memory, int) and 0 < memory < 1 << 60:
        parts.append(f"{memory / 1e9:.0f} GB")
    if not gpus:
        parts.append("no GPU")
    return ", ".join(parts)


def commit_of(environment: JsonRecord) -> str:
    """Return the commit in 12 digits, with what is known of changes beside it."""
    commit = str(environment.get("commit") or "unknown")[:12]
    return f"{commit} with uncommitted changes" if environment.get("dirty") else commit


def moment_of(findings: Findings) -> str:
    """Return when the findings were written, as ``2026-11-24 00:14 UTC``."""
    made = datetime.fromisoformat(findings.created)
    try:
        made = made.replace(tzinfo=UTC) if made.tzinfo is None else made.astimezone(UTC)
    except OverflowError:  # the first or the last day there is
        return findings.created
    return f"{made:%Y-%m-%d %H:%M} UTC"


def ordered(rows: Iterable[Finding]) -> list[Finding]:
    """Return findings with what needs a person first: fallen, undecided, survived; those that do not gate last."""
    order = {"falsified": 0, "inconclusive": 1, "corroborated": 2}
    return sorted(rows, key=lambda row: (not row.required, order[row.verdict]))


def _mapping(value: object) -> JsonRecord:
    return value if isinstance(value, Mapping) else {}
