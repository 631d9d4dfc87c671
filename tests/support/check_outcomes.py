"""What a check says of runs that a test wrote."""

from collections.abc import Mapping
from typing import Any

from jsonschema import Draft202012Validator

from q4kd.harness.checks import CHECKS, Judgement
from q4kd.harness.records.raw_run import RawRun


def evaluate(check: str, runs: RawRun | Mapping[str, RawRun], params: dict[str, Any], least: int = 1) -> Judgement:
    Draft202012Validator(CHECKS[check].PARAMS).validate(params)
    chosen = {runs.name: runs} if isinstance(runs, RawRun) else runs
    observation = CHECKS[check].extract(chosen, params, least)
    return CHECKS[check].judge(observation, params, least)


def outcome(judgement: Judgement) -> str:
    return judgement.reason or judgement.verdict
