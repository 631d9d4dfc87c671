"""A line that must not appear in a log, provided that the log is complete and the right program wrote it.

Where a control arm is named, one that does what the line announces, its log must have one of the lines: when the
program says it in other words, nothing is learnt from their absence.

A pattern is a list of fragments that must all occur in one line, in any case. No check takes a regular expression:
matching fragments is linear in the log, whatever a contract asks for.
"""

from collections.abc import Mapping

from q4kd.harness.checks.judgement import Judgement, Mutation, inconclusive, pick_run
from q4kd.harness.checks.params import FRAGMENTS, arm_params
from q4kd.harness.records.json_types import JsonRecord
from q4kd.harness.records.raw_run import RawRun

NAME = "log_absent"
PARAMS = arm_params(
    ["absent", "completion", "known_positive"],
    absent={"type": "array", "minItems": 1, "items": FRAGMENTS, "description": "Patterns that must not occur."},
    completion=FRAGMENTS | {"description": "A line that only a complete run prints."},
    known_positive=FRAGMENTS | {"description": "A line that must occur, to show that this log would tell."},
    control={"type": "string", "description": "An arm whose log must have one of the absent lines."},
)
DIRECTIONS = {"absent": "lower"}
READS = ("stdout", "stderr")


def _find(lines: list[str], fragments: list[str]) -> list[tuple[int, str]]:
    wanted = [fragment.casefold() for fragment in fragments]
    return [(number, line) for number, line in enumerate(lines, 1) if all(part in line.casefold() for part in wanted)]


def _find_any(lines: list[str], patterns: list[list[str]]) -> list[tuple[int, str]]:
    return [hit for pattern in patterns for hit in _find(lines, pattern)]


def _lines(run: RawRun) -> list[str]:
    return [*run.stdout.splitlines(), *run.stderr.splitlines()]


def extract(runs: Mapping[str, RawRun], params: JsonRecord, min_observations: int) -> JsonRecord:
    """Search stdout and stderr of one run and, where one is named, of the control."""
    lines = _lines(pick_run(runs, params.get("arm")))
    hits = _find_any(lines, params["absent"])
    control: dict[str, int] = {}
    if "control" in params:
        control["control_hits"] = len(_find_any(_lines(pick_run(runs, params["control"])), params["absent"]))
    return {
        "lines": len(lines),
        "completion_lines": len(_find(lines, params["completion"])),
        "known_positive_lines": len(_find(lines, params["known_positive"])),
        "hits": len(hits),
        "first_hit": f"line {hits[0][0]}: {hits[0][1][:200]}" if hits else None,
        **control,
    }


def judge(observation: JsonRecord, params: JsonRecord, min_observations: int) -> Judgement:
    """A hit falsifies the claim, which is inconclusive unless both markers and the control's line are there."""
    bound = f"no line like {' or '.join('…'.join(pattern) for pattern in params['absent'])}"
    measured = f"{observation['hits']} of {observation['lines']} log lines"
    if observation["hits"]:
        return Judgement.falsified(measured, bound, str(observation["first_hit"]))
    if not observation["completion_lines"]:
        return inconclusive("no completion marker", measured, bound)
    if not observation["known_positive_lines"]:
        return inconclusive("no known positive", measured, bound)
    if "control" in params and not observation["control_hits"]:
        silent = f"{measured}; the control {params['control']} printed no such line either"
        return inconclusive("no known positive", silent, bound)
    if observation["lines"] < min_observations:
        return inconclusive("too few observations", measured, bound)
    return Judgement.corroborated(measured, bound)


def mutate(observation: JsonRecord, params: JsonRecord, min_observations: int) -> list[Mutation]:
    """Let the line occur, and take away either marker or all lines."""
    mutations: list[Mutation] = [
        ("the line occurs", {"hits": 1, "first_hit": "line 1: " + " ".join(params["absent"][0])}),
        ("no completion marker", {"completion_lines": 0}),
        ("no known positive", {"known_positive_lines": 0}),
        ("an empty log", {"lines": 0, "completion_lines": 0, "known_positive_lines": 0}),
        ("one line too few", {"lines": min_observations - 1}),
    ]
    if "control" in params:
        mutations.append(("a control without the line", {"control_hits": 0}))
    return [(name, {**observation, **changed}) for name, changed in mutations]
