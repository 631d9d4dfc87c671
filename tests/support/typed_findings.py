"""Findings for tests that look at a few fields of them: the rest is filled in."""

from typing import Any

from q4kd.harness.judging.results import CheckResult, Finding, Findings


def check_result(check: str, **fields: Any) -> CheckResult:
    blank = dict.fromkeys(("reason", "measured", "bound", "counterexample", "margin"))
    return CheckResult(
        **{**blank, "check": check, "params": {}, "observation": {}, "verdict": "corroborated", **fields}
    )


def finding(*checks: CheckResult, **fields: Any) -> Finding:
    texts = dict.fromkeys(("contract", "id", "key", "rule", "prediction", "if_fails"), "")
    row = {**texts, "verdict": "corroborated", "scope": "required", "experiment": None, "checks": checks, **fields}
    return Finding(**row)


def findings(*rows: Finding) -> Findings:
    created = "2026-11-23T12:00:00+00:00"
    return Findings(
        schema="q4kd-findings/1", judge_version=1, profile="cpu", created=created, scope="full", summary={},
        exit_code=0, rows=rows,
    )  # fmt: skip
