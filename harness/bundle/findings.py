"""Findings: one verdict for each claim in scope, the counts, and the exit code that follows from them."""

import importlib.resources
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import lru_cache
from typing import Literal, cast

from q4kd.harness.claims.model import Claim, Contract
from q4kd.harness.claims.plan import Plan
from q4kd.harness.claims.schema_match import Schema
from q4kd.harness.claims.waivers import applying, today
from q4kd.harness.judging.results import Carried, ClaimResult, Finding, Findings
from q4kd.harness.records.json_types import JsonObject, JsonRecord
from q4kd.harness.records.store import MAX_DEPTH, Store, depth, parse_shallow
from q4kd.trainer.errors import InputError
from q4kd.trainer.files import parse_json

SCHEMA = "q4kd-findings/1"
VERDICTS = ("corroborated", "falsified", "inconclusive")
PROSE = "prose"
NOT_RUN = "not run"


def exit_code(findings: Iterable[Finding], scope: str) -> int:
    """Return 1 if a required claim is falsified; else 2 if one is inconclusive, none held, or in part; else 0.

    An inconclusive claim with a waiver that applies does not count, but it does not hold either.
    """
    verdicts = [finding.verdict for finding in findings if finding.required and not finding.waived]
    if "falsified" in verdicts:
        return 1
    if not verdicts or scope != "full" or any(verdict != "corroborated" for verdict in verdicts):
        return 2
    return 0


def assemble(
    plan: Plan,
    contracts: Sequence[Contract],
    results: Mapping[str, ClaimResult],
    *,
    judge_version: int,
    created: str | None = None,
    carried: Sequence[Carried] = (),
) -> Findings:
    """Build what ``findings.json`` holds: a finding for every entry of the plan that is in scope.

    Args:
        plan: made from ``contracts``.
        contracts: the contracts.
        results: what became of each claim, by its key. Without one a claim is ``inconclusive(not run)``.
        judge_version: version of the judging rules.
        created: ISO 8601 time; now when None.
        carried: experiments whose runs were taken over from another bundle.

    Raises:
        InputError: a result is malformed, so that the document does not fit ``findings.schema.json``.
    """
    claims = {claim.key: claim for contract in contracts for claim in contract.claims}
    created = created or today()
    findings = []
    for entry in plan.entries:
        if entry.scope == "out_of_scope":
            continue
        claim = claims[entry.key]
        result = results.get(entry.key, ClaimResult.inconclusive(NOT_RUN))
        if claim.falsifier is None:
            result = ClaimResult.inconclusive(PROSE)
        finding = _finding(claim, entry.scope, result)
        waiver = applying(plan.waivers, finding.key, finding.verdict, finding.scope, created)
        findings.append(replace(finding, waiver=waiver))
    document = Findings(
        schema=SCHEMA,
        judge_version=judge_version,
        profile=plan.profile,
        created=created,
        scope=plan.scope,
        summary=summary(plan, findings),
        exit_code=exit_code(findings, plan.scope),
        rows=tuple(findings),
        carried=tuple(carried),
    )
    return validate_findings(document.to_json(), "findings")


def _finding(claim: Claim, scope: Literal["required", "not_gating"], result: ClaimResult) -> Finding:
    return Finding(
        **vars(result),
        contract=claim.contract,
        id=claim.id,
        key=claim.key,
        rule=claim.rule,
        prediction=claim.prediction,
        scope=scope,
        experiment=claim.falsifier.experiment if claim.falsifier else None,
        if_fails=claim.if_fails,
    )


def summary(plan: Plan, findings: Iterable[Finding]) -> dict[str, int]:
    """Count the verdicts of required claims, the claims out of scope, those that do not gate and those waived."""
    counts = dict.fromkeys((*VERDICTS, "out_of_scope", "not_gating"), 0)
    if plan.waivers:
        counts["waived"] = 0
    for finding in findings:
        verdict = "waived" if plan.waivers and finding.waived else finding.verdict
        counts[verdict if finding.required else "not_gating"] += 1
    counts["out_of_scope"] = sum(entry.scope == "out_of_scope" for entry in plan.entries)
    return counts


def headline(document: Findings) -> str:
    """Return the sentence that says how a run went: counts of verdicts, the profile, how many are out of scope."""
    counts = document.summary
    held = counts["corroborated"]
    line = f"{held} claim{'' if held == 1 else 's'} corroborated"
    line += "".join(f", {counts[verdict]} {verdict}" for verdict in VERDICTS[1:] if counts[verdict])
    line += f", {counts['waived']} inconclusive and waived" if counts.get("waived") else ""
    line += f" on profile {document.profile}; {counts['out_of_scope']} out of scope"
    if counts["not_gating"]:
        line += f"; {counts['not_gating']} not gating"
    line += f"; {origin}" if (origin := origin_line(document)) is not None else ""
    return line + ("; partial selection, cannot pass" if document.scope == "partial" else "")


def origin_line(document: Findings) -> str | None:
    """Return how many claims were judged on runs of another bundle, and of which; None when all were run."""
    if not document.carried:
        return None
    experiments = {entry.experiment for entry in document.carried}
    count = sum(row.experiment in experiments for row in document.rows)
    origins = ", ".join(dict.fromkeys(entry.name for entry in document.carried))
    return f"{count} re-judged from {origins}, {len(document.rows) - count} run"


def sabotage_lines(document: Findings) -> list[str]:
    """Return, one line each, how many mutations turned their claim and how many planted faults were caught."""
    tried = [row.mutations for row in document.rows if row.mutations is not None]
    faults = [kill for row in document.rows for kill in row.sabotage]
    lines = []
    if tried:
        turned, count = sum(mutations.caught for mutations in tried), sum(mutations.tried for mutations in tried)
        lines.append(f"L1: {turned} of {count} mutations turned")
    if faults:
        lines.append(f"L2: {sum(kill.caught for kill in faults)} of {len(faults)} planted faults caught")
    return lines


@lru_cache(maxsize=1)
def _schema() -> Schema:
    source = importlib.resources.files("q4kd.harness.bundle") / "findings.schema.json"
    return Schema(cast("JsonObject", parse_json(source.read_bytes(), "findings.schema.json")))


def validate_findings(value: object, origin: str) -> Findings:
    """Return the findings that a JSON value holds, when it fits ``findings.schema.json``.

    Raises:
        InputError: naming the place that does not fit.
    """

    def refused(expected: str, got: str) -> InputError:
        return InputError(origin, expected=expected, got=got[:200], remedy="run falsify again")

    if depth(value) > MAX_DEPTH:
        raise refused(f"at most {MAX_DEPTH} levels", "deeper nesting")
    error = _schema().error(value)
    if error is not None:
        place = "/".join(str(part) for part in error.absolute_path) or "the document"
        raise refused(f"a {SCHEMA} document", f"{place}: {error.message}")
    try:
        findings = Findings.from_json(cast("JsonRecord", value))
    except ValueError as problem:
        raise refused("waivers with a day", str(problem)) from problem
    try:
        datetime.fromisoformat(findings.created).timestamp()
    except (ValueError, OverflowError) as problem:
        raise refused("created as an ISO 8601 time", repr(findings.created)) from problem
    return findings


def parse_findings(data: bytes, origin: str) -> Findings:
    """Parse and validate ``findings.json`` (InputError when it is not one)."""
    return validate_findings(parse_shallow(data, origin), origin)


def read_findings(store: Store) -> Findings:
    """Return the findings of a bundle (InputError when it has none that can be used)."""
    return parse_findings(store.read("findings.json"), "findings.json")
