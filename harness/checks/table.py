"""A table that the program filled equals the expected one, entry by entry, with nothing left out and nothing added."""

from collections.abc import Mapping
from typing import Any

from q4kd.harness.checks.judgement import ARM_PARAM, Judgement, inconclusive, pick_run
from q4kd.harness.raw import RawRun

NAME = "table"
PARAMS: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["table", "expected"],
    "properties": {
        "arm": ARM_PARAM,
        "table": {"type": "string", "description": "Name of the table in facts.tables."},
        "expected": {
            "type": "object",
            "minProperties": 1,
            "additionalProperties": {"type": ["string", "integer", "boolean"]},
            "description": "Every entry and its value.",
        },
    },
}
DIRECTIONS: dict[str, str] = {}


def extract(runs: Mapping[str, RawRun], params: Mapping[str, Any], min_observations: int) -> dict[str, Any]:
    """Return the recorded table."""
    run = pick_run(runs, params.get("arm"))
    return {
        "table": run.facts.get("tables", {}).get(params["table"]),
        "cause": run.exit.get("cause"),
        "returncode": run.exit.get("returncode"),
    }


def judge(observation: Mapping[str, Any], params: Mapping[str, Any], min_observations: int) -> Judgement:
    """Falsified by the first entry that differs, is missing or is extra."""
    expected, table = params["expected"], observation["table"]
    bound = f"{len(expected)} entries as expected"
    if table is None:
        return inconclusive("run incomplete", f"run {observation['cause']}", bound)
    wrong = [key for key in sorted({*expected, *table}) if table.get(key) != expected.get(key)]
    measured = f"{len(table)} entries, {len(wrong)} wrong"
    if wrong:
        key = wrong[0]
        return Judgement(
            verdict="falsified",
            measured=measured,
            bound=bound,
            counterexample=f"{key}: {table.get(key)!r} instead of {expected.get(key)!r}",
        )
    if len(table) < min_observations:
        return inconclusive("too few observations", measured, bound)
    return Judgement(verdict="corroborated", measured=measured, bound=bound)
