"""From a claim and its raw runs to a verdict. Pure: the same evidence gives the same verdict, here or years later."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from q4kd.harness.checks import CHECKS, Judgement
from q4kd.harness.checks.judgement import inconclusive
from q4kd.harness.contract import CheckUse, Claim
from q4kd.harness.raw import RawRun

JUDGE_VERSION = 1
# A claim is worth its worst check: one refutation refutes it, one unknown leaves it unknown.
_ORDER = ("falsified", "inconclusive", "corroborated")


def judge_claim(claim: Claim, runs: Mapping[str, RawRun], profile: str) -> dict[str, Any]:
    """Judge one claim.

    Args:
        claim: the claim.
        runs: the raw runs of its experiment, by run name.
        profile: name of the machine profile whose bounds apply.

    Returns:
        ``{"verdict", "reason", "checks": [{"check", "params", "observation", "verdict", "reason", "measured",
        "bound", "counterexample", "margin"}]}``. A planted fault never supports ``corroborated``.
    """
    if claim.falsifier is None:
        return {"verdict": "inconclusive", "reason": "prose", "checks": []}
    falsifier = claim.falsifier.for_profile(profile)
    if not runs:
        return {"verdict": "inconclusive", "reason": "not run", "checks": []}
    if any(run.harness_error is not None for run in runs.values()):
        return {"verdict": "inconclusive", "reason": "harness error", "checks": []}
    checks = [judge_check(use, runs, falsifier.min_observations) for use in falsifier.checks]
    worst = min(checks, key=lambda check: _ORDER.index(check["verdict"]))
    verdict, reason = worst["verdict"], worst["reason"]
    if verdict == "corroborated" and any(run.fault is not None for run in runs.values()):
        verdict, reason = "inconclusive", "faulted run"
    return {"verdict": verdict, "reason": reason, "checks": checks}


def judge_check(use: CheckUse, runs: Mapping[str, RawRun], min_observations: int) -> dict[str, Any]:
    """Extract one check's observation and judge it."""
    check = CHECKS[use.check]
    observation: dict[str, Any] = {}
    try:
        observation = check.extract(runs, use.params, min_observations)
        judgement: Judgement = check.judge(observation, use.params, min_observations)
    except Exception as error:  # malformed evidence says nothing about the claim: unknown, with the error on record
        message = f"{type(error).__name__}: {error}"[:300]
        judgement = inconclusive("evidence unreadable", message, "evidence that can be read")
    return {
        "check": use.check,
        "params": _plain(use.params),
        "observation": observation,
        **dataclasses.asdict(judgement),
    }


def _plain(value: Any) -> Any:
    """Return mappings and sequences as the plain ones that JSON knows."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
