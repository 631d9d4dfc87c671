"""A check: the output holds the input's numbers, each as often, in ascending order."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from q4kd.harness.checks.judgement import Judgement, Mutation, inconclusive, pick_run
from q4kd.harness.records.raw_run import RawRun

NAME = "sorted_output"
PARAMS: dict[str, Any] = {"type": "object", "additionalProperties": False, "properties": {}}
DIRECTIONS: dict[str, str] = {}
READS = ("facts",)


def extract(runs: Mapping[str, RawRun], params: Mapping[str, Any], min_observations: int) -> dict[str, Any]:
    """Count what is missing, what is new and what is out of order."""
    facts = pick_run(runs, None).facts
    given, found = facts.get("given"), facts.get("sorted")
    if given is None or found is None:
        return {"count": 0}
    descents = sum(b < a for a, b in pairwise(found))
    return {"count": len(given), "same_numbers": sorted(given) == sorted(found), "descents": descents}


def judge(observation: Mapping[str, Any], params: Mapping[str, Any], min_observations: int) -> Judgement:
    """Falsified by a number lost or gained, or by one that is smaller than the one before it."""
    bound = "the same numbers, ascending"
    if observation["count"] < max(min_observations, 2):
        return inconclusive("too few observations", f"{observation['count']} numbers", bound)
    measured = f"{observation['descents']} descents in {observation['count']} numbers"
    if not observation["same_numbers"]:
        lost = "numbers were lost or gained"
        return Judgement(verdict="falsified", measured=measured, bound=bound, counterexample=lost)
    if observation["descents"]:
        return Judgement(verdict="falsified", measured=measured, bound=bound, counterexample=measured)
    return Judgement(verdict="corroborated", measured=measured, bound=bound)


def mutate(observation: Mapping[str, Any], params: Mapping[str, Any], min_observations: int) -> list[Mutation]:
    """Lose a number, put one out of order, sort nothing."""
    return [
        ("a number lost", {**observation, "same_numbers": False}),
        ("one descent", {**observation, "descents": 1}),
        ("nothing sorted", {**observation, "count": 0}),
    ]
