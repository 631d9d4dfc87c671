"""A table that the program filled equals the expected one, entry by entry, with nothing left out and nothing added."""

from collections.abc import Mapping

from q4kd.harness.checks.judgement import Judgement, Mutation, inconclusive, pick_run
from q4kd.harness.checks.params import arm_params
from q4kd.harness.records.json_types import JsonRecord
from q4kd.harness.records.raw_run import RawRun

NAME = "table"
PARAMS = arm_params(
    ["table", "expected"],
    table={"type": "string", "description": "Name of the table in facts.tables."},
    expected={
        "type": "object",
        "minProperties": 1,
        "additionalProperties": {"type": ["string", "integer", "boolean"]},
        "description": "Every entry and its value.",
    },
)
DIRECTIONS: dict[str, str] = {}
READS = ("facts", "exit")


def extract(runs: Mapping[str, RawRun], params: JsonRecord, min_observations: int) -> JsonRecord:
    """Return the recorded table."""
    run = pick_run(runs, params.get("arm"))
    return {"table": run.facts.get("tables", {}).get(params["table"]), **run.ending}


def judge(observation: JsonRecord, params: JsonRecord, min_observations: int) -> Judgement:
    """The first entry that differs, is missing or is extra falsifies the claim."""
    expected, table = params["expected"], observation["table"]
    bound = f"{len(expected)} entries as expected"
    if table is None:
        return inconclusive("run incomplete", f"run {observation['cause']}", bound)
    wrong = [key for key in sorted({*expected, *table}) if table.get(key) != expected.get(key)]
    measured = f"{len(table)} entries, {len(wrong)} wrong"
    if wrong:
        key = wrong[0]
        return Judgement.falsified(measured, bound, f"{key}: {table.get(key)!r} instead of {expected.get(key)!r}")
    if len(table) < min_observations:
        return inconclusive("too few observations", measured, bound)
    return Judgement.corroborated(measured, bound)


def mutate(observation: JsonRecord, params: JsonRecord, min_observations: int) -> list[Mutation]:
    """Change, remove and add an entry, each in turn."""
    table = dict(observation["table"])
    changed = {key: not value if isinstance(value, bool) else f"not {value}" for key, value in table.items()}
    mutations = [(f"{key} changed", {**table, key: changed[key]}) for key in table]
    mutations += [(f"{key} missing", {k: v for k, v in table.items() if k != key}) for key in table]
    mutations += [("an entry too many", {**table, "one too many": 0}), ("an empty table", {})]
    return [
        *((name, {**observation, "table": value}) for name, value in mutations),
        ("no table", {**observation, "table": None}),
    ]
