"""Findings: one verdict for each claim in scope, the counts, and the exit code that follows from them."""

import importlib.resources
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from q4kd.harness.claims_model import Claim, Contract
from q4kd.harness.plan import Plan
from q4kd.harness.store import MAX_DEPTH, depth
from q4kd.harness.waivers import Waiver, applying, today
from q4kd.trainer.errors import InputError
from q4kd.trainer.files import parse_json

SCHEMA = "q4kd-findings/1"
VERDICTS = ("corroborated", "falsified", "inconclusive")
PROSE = "prose"
NOT_RUN = "not run"


def inconclusive(reason: str) -> dict[str, Any]:
    """Return the result of a claim that could not be judged, in the shape ``judge_claim`` gives."""
    return {"verdict": "inconclusive", "reason": reason, "checks": []}


def exit_code(findings: Iterable[Mapping[str, Any]], scope: str) -> int:
    """Return 1 if a required claim is falsified; else 2 if one is inconclusive, none held, or in part; else 0.

    An inconclusive claim with a waiver that applies does not count, but it does not hold either.
    """
    required = [finding for finding in findings if finding["scope"] == "required"]
    verdicts = [finding["verdict"] for finding in required if not _is_waived(finding)]
    if "falsified" in verdicts:
        return 1
    if not verdicts or scope != "full" or any(verdict != "corroborated" for verdict in verdicts):
        return 2
    return 0


def _is_waived(finding: Mapping[str, Any]) -> bool:
    return finding["verdict"] == "inconclusive" and finding.get("waiver") is not None


def assemble(
    plan: Plan,
    contracts: Sequence[Contract],
    results: Mapping[str, Mapping[str, Any]],
    *,
    judge_version: int,
    created: str | None = None,
) -> dict[str, Any]:
    """Build ``findings.json``.

    Args:
        plan: the plan; every entry in scope gets a finding, whether or not it has a result.
        contracts: the contracts the plan was made from.
        results: claim key → what ``judge_claim`` returned, with ``runs``, ``sabotage`` and ``seconds`` where known. A
            claim without a result is ``inconclusive(not run)``, a prose claim ``inconclusive(prose)``.
        judge_version: version of the judging rules.
        created: ISO 8601 time; now when None.

    Raises:
        InputError: when what results does not fit ``findings.schema.json`` (a result that is malformed).
    """
    claims = {claim.key: claim for contract in contracts for claim in contract.claims}
    created = created or today()
    findings = []
    for entry in plan.entries:
        if entry.scope == "out_of_scope":
            continue
        claim = claims[entry.key]
        result = results.get(entry.key)
        if claim.falsifier is None:
            result = inconclusive(PROSE)
        finding = _finding(claim, entry.scope, inconclusive(NOT_RUN) if result is None else result)
        if (waiver := applying(plan.waivers, finding, created)) is not None:
            finding["waiver"] = dict(vars(waiver))
        findings.append(finding)
    document = {
        "schema": SCHEMA,
        "judge_version": judge_version,
        "profile": plan.profile,
        "created": created,
        "scope": plan.scope,
        "summary": summary(plan, findings),
        "exit_code": exit_code(findings, plan.scope),
        "findings": findings,
    }
    return validate_findings(document, "findings")


def _finding(claim: Claim, scope: str, result: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "contract": claim.contract,
        "id": claim.id,
        "key": claim.key,
        "rule": claim.rule,
        "prediction": claim.prediction,
        "verdict": result["verdict"],
        "reason": result.get("reason"),
        "scope": scope,
        "checks": [dict(check) for check in result.get("checks", [])],
        "experiment": claim.falsifier.experiment if claim.falsifier else None,
        "runs": sorted(result.get("runs", [])),
        "mutations": result.get("mutations"),
        "sabotage": [dict(record) for record in result.get("sabotage", [])],
        "if_fails": claim.if_fails,
        "seconds": result.get("seconds"),
    }


def summary(plan: Plan, findings: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Count the verdicts of required claims, the claims out of scope, those that do not gate and those waived."""
    counts = dict.fromkeys((*VERDICTS, "out_of_scope", "not_gating"), 0)
    if plan.waivers:
        counts["waived"] = 0
    for finding in findings:
        verdict = "waived" if plan.waivers and _is_waived(finding) else finding["verdict"]
        counts[verdict if finding["scope"] == "required" else "not_gating"] += 1
    counts["out_of_scope"] = sum(entry.scope == "out_of_scope" for entry in plan.entries)
    return counts


def headline(document: Mapping[str, Any]) -> str:
    """Return the sentence that says how a run went: counts of verdicts, the profile, how many are out of scope."""
    counts = document["summary"]
    held = counts["corroborated"]
    line = f"{held} claim{'' if held == 1 else 's'} corroborated"
    line += "".join(f", {counts[verdict]} {verdict}" for verdict in VERDICTS[1:] if counts[verdict])
    line += f", {counts['waived']} inconclusive and waived" if counts.get("waived") else ""
    line += f" on profile {document['profile']}; {counts['out_of_scope']} out of scope"
    if counts["not_gating"]:
        line += f"; {counts['not_gating']} not gating"
    return line + ("; partial selection, cannot pass" if document["scope"] == "partial" else "")


def sabotage_lines(document: Mapping[str, Any]) -> list[str]:
    """Return, one line each, how many mutations turned their claim and how many planted faults were caught."""
    rows = document["findings"]
    tried = [row["mutations"] for row in rows if row["mutations"] is not None]
    faults = [record for row in rows for record in row["sabotage"]]
    lines = []
    if tried:
        turned, count = sum(mutations["caught"] for mutations in tried), sum(m["tried"] for m in tried)
        lines.append(f"L1: {turned} of {count} mutations turned")
    if faults:
        lines.append(f"L2: {sum(record['caught'] for record in faults)} of {len(faults)} planted faults caught")
    return lines


@lru_cache(maxsize=1)
def _schema() -> Draft202012Validator:
    source = importlib.resources.files("q4kd.harness") / "findings.schema.json"
    return Draft202012Validator(parse_json(source.read_bytes(), "findings.schema.json"))


def validate_findings(value: Any, origin: str) -> dict[str, Any]:
    """Return ``value`` when it fits ``findings.schema.json``.

    Raises:
        InputError: naming the place that does not fit.
    """
    if depth(value) > MAX_DEPTH:
        raise InputError(
            origin, expected=f"at most {MAX_DEPTH} levels", got="deeper nesting", remedy="run falsify again"
        )
    error = best_match(_schema().iter_errors(value))
    if error is not None:
        place = "/".join(str(part) for part in error.absolute_path) or "the document"
        raise InputError(
            origin, expected=f"a {SCHEMA} document", got=f"{place}: {error.message[:200]}", remedy="run falsify again"
        )
    try:
        datetime.fromisoformat(value["created"]).timestamp()
    except (ValueError, OverflowError) as problem:
        raise InputError(
            origin, expected="created as an ISO 8601 time", got=repr(value["created"])[:80], remedy="run falsify again"
        ) from problem
    for index, row in enumerate(value["findings"]):
        try:
            Waiver(**row["waiver"]) if "waiver" in row else None
        except ValueError as problem:
            raise InputError(
                origin, expected="a waiver with a day", got=f"findings/{index}/waiver: {problem}"[:200],
                remedy="run falsify again",
            ) from problem  # fmt: skip
    return dict(value)


def parse_findings(data: bytes, origin: str) -> dict[str, Any]:
    """Parse and validate ``findings.json`` (InputError when it is not one)."""
    return validate_findings(parse_json(data, origin), origin)
