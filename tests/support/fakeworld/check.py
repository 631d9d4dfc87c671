"""A check: the measured value of every run stays below a ceiling."""

from q4kd.harness.checks.judgement import Judgement

NAME = "fake"
PARAMS = {
    "type": "object",
    "properties": {"ceiling": {"type": "number"}, "crash": {"type": "boolean"}},
    "additionalProperties": False,
}
DIRECTIONS = {"ceiling": "upper"}
READS = ("facts",)


def extract(runs, params, min_observations):
    if params.get("crash"):
        raise RuntimeError("the check itself is broken")
    return {"values": {name: run.facts["value"] for name, run in sorted(runs.items())}}


def judge(observation, params, min_observations):
    values = observation["values"]
    worst = max(values, key=values.get)
    bad = values[worst] > params["ceiling"]
    return Judgement(
        verdict="falsified" if bad else "corroborated",
        measured=f"{values[worst]} in {worst}",
        bound=f"at most {params['ceiling']}",
        counterexample=f"{worst} measured {values[worst]}" if bad else None,
    )


def mutate(observation, params, min_observations):
    values = observation["values"]
    return [(f"{name} over", {"values": {**values, name: params["ceiling"] + 1}}) for name in values]
