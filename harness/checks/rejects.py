"""Something invalid is refused with the named error, and its valid twin is accepted.

The run leaves ``facts.cases``: ``[{"case", "error": type name or null, "message", "twin", "twin_error"}, …]``.
"""

from collections.abc import Mapping

from q4kd.harness.checks.judgement import Judgement, Mutation, inconclusive, pick_run
from q4kd.harness.checks.params import arm_params
from q4kd.harness.records.json_types import JsonRecord
from q4kd.harness.records.raw_run import RawRun

NAME = "rejects"
PARAMS = arm_params(
    ["error", "cases"],
    error={"type": "string", "description": "Type name of the error that every case must raise."},
    cases={"type": "array", "minItems": 1, "items": {"type": "string"}, "description": "Cases that must be there."},
)
DIRECTIONS = {"cases": "lower"}
READS = ("facts", "exit")


def extract(runs: Mapping[str, RawRun], params: JsonRecord, min_observations: int) -> JsonRecord:
    """Return the recorded cases."""
    run = pick_run(runs, params.get("arm"))
    return {"cases": list(run.facts.get("cases") or []), **run.ending}


def judge(observation: JsonRecord, params: JsonRecord, min_observations: int) -> Judgement:
    """A case that passed or raised something else falsifies; with a twin that was refused too it is inconclusive."""
    cases = {str(case["case"]): case for case in observation["cases"]}
    bound = f"{', '.join(params['cases'])}: each {params['error']}, its twin accepted"
    refused = [case for case in cases.values() if case["error"] == params["error"]]
    measured = f"{len(refused)} of {len(cases)} refused"
    wrong = [case for name, case in cases.items() if name in params["cases"] and case["error"] != params["error"]]
    if wrong:
        got = wrong[0]["error"] or "no error"
        return Judgement.falsified(measured, bound, f"{wrong[0]['case']}: {got} instead of {params['error']}")
    if not set(params["cases"]) <= set(cases):
        return inconclusive("run incomplete", f"{measured}; run {observation['cause']}", bound)
    if any(case["twin_error"] for case in cases.values()):
        return inconclusive("twin refused", measured, bound)
    if len(cases) < min_observations:
        return inconclusive("too few observations", measured, bound)
    return Judgement.corroborated(measured, bound)


def mutate(observation: JsonRecord, params: JsonRecord, min_observations: int) -> list[Mutation]:
    """Let each case pass, raise another error, lack its record, and have its twin refused."""
    cases = [dict(case) for case in observation["cases"]]
    mutations: list[Mutation] = [("no cases", {**observation, "cases": []})]
    for at, case in enumerate(cases):
        before, after = cases[:at], cases[at + 1 :]

        def put(**changed: str | None) -> JsonRecord:
            return {**observation, "cases": [*before, {**case, **changed}, *after]}  # noqa: B023 - called at once

        mutations.append((f"twin of {case['case']} refused", put(twin_error=params["error"])))
        if case["case"] in params["cases"]:
            mutations.append((f"{case['case']} accepted", put(error=None)))
            mutations.append((f"{case['case']} raised another error", put(error="AnotherError")))
            mutations.append((f"{case['case']} not tried", {**observation, "cases": [*before, *after]}))
    return mutations
