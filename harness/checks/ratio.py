"""The ratio of two times (or other costs), measured in pairs that alternate within one session.

``arrays/<array>.npz`` holds ``numerator``, ``denominator`` (costs, float ``[n]``) and ``numerator_start``,
``denominator_start`` (CLOCK_MONOTONIC seconds, ``[n]``). The median of the pairwise ratios is judged: a machine that
slows down hits both sides of a pair.
"""

from collections.abc import Mapping

import numpy as np

from q4kd.harness.checks.judgement import Judgement, Mutation, inconclusive, just_over, just_under, pick_run
from q4kd.harness.checks.params import ARRAY_PARAM, arm_params
from q4kd.harness.records.json_types import JsonRecord
from q4kd.harness.records.raw_run import RawRun

NAME = "ratio"
PARAMS = arm_params(
    ["array"],
    array=ARRAY_PARAM,
    max={"type": "number", "exclusiveMinimum": 0, "description": "Largest median ratio allowed."},
    min={"type": "number", "exclusiveMinimum": 0, "description": "Smallest median ratio allowed."},
) | {"oneOf": [{"required": ["max"]}, {"required": ["min"]}]}
DIRECTIONS = {"max": "upper", "min": "lower"}
READS = ("arrays", "exit")
_KEYS = ("numerator", "denominator", "numerator_start", "denominator_start")


def extract(runs: Mapping[str, RawRun], params: JsonRecord, min_observations: int) -> JsonRecord:
    """Reduce the pairs to their ratios and their order in time."""
    run = pick_run(runs, params.get("arm"))
    observation: dict[str, object] = {**run.ending, "same_boot": run.same_boot, "pairs": 0}
    if f"arrays/{params['array']}.npz" not in run.store.names():
        return observation
    arrays = run.array(params["array"])
    if set(_KEYS) - set(arrays):
        return observation
    above, below, start_above, start_below = (arrays[key].astype(np.float64).ravel() for key in _KEYS)
    if not len(above) == len(below) == len(start_above) == len(start_below) or not len(above):
        return observation
    if not (np.isfinite(above).all() and np.isfinite(below).all() and (below > 0).all()):
        return observation | {"not_positive": True}
    ratios = above / below
    first, last = np.minimum(start_above, start_below), np.maximum(start_above, start_below)
    return observation | {
        "pairs": len(ratios),
        "median": float(np.median(ratios)),
        "low": float(ratios.min()),
        "high": float(ratios.max()),
        # Every pair is over before the next begins, and neither side always comes out of the same clock reading.
        "interleaved": bool((first[1:] > last[:-1]).all() and (first < last).all()),
        "distinct": int(min(np.unique(above).size, np.unique(below).size)),
    }


def judge(observation: JsonRecord, params: JsonRecord, min_observations: int) -> Judgement:
    """A median on the wrong side of the bound falsifies the claim; pairs that were not interleaved are inconclusive."""
    upper = "max" in params
    limit = float(params["max"] if upper else params["min"])
    bound = f"median ratio {'≤' if upper else '≥'} {limit:g}"
    if not observation["same_boot"]:
        return inconclusive("machine restarted", "another boot", bound)
    if observation.get("not_positive"):
        return inconclusive("evidence unreadable", "a cost that is not a positive number", bound)
    if not observation["pairs"]:
        ended = f"run ended: {observation['cause']}, exit code {observation['returncode']}"
        return inconclusive("run incomplete", ended, bound)
    median = float(observation["median"])
    spread = f"{observation['low']:.3g} to {observation['high']:.3g}"
    measured = f"median {median:.4g} ({spread}) over {observation['pairs']} pairs"
    if not observation["interleaved"]:
        return inconclusive("arms not interleaved", measured, bound)
    if observation["pairs"] < min_observations:
        return inconclusive("too few observations", measured, bound)
    if observation["distinct"] < 2:
        return inconclusive("constant", measured, bound)
    margin = median / limit if upper else limit / median if median > 0 else None
    if (median > limit) if upper else (median < limit):
        return Judgement.falsified(
            measured, bound, f"median ratio {median:.4g}, {'over' if upper else 'under'} {limit:g}", margin
        )
    return Judgement.corroborated(measured, bound, margin)


def mutate(observation: JsonRecord, params: JsonRecord, min_observations: int) -> list[Mutation]:
    """Move the median just over its bound; repeat one value; overlap the pairs; leave too few or none."""
    over = just_over(params["max"]) if "max" in params else just_under(params["min"])
    mutations: list[Mutation] = [
        ("median just out of bounds", {"median": over}),
        ("no pairs", {"pairs": 0}),
        ("one pair too few", {"pairs": min_observations - 1}),
        ("pairs not interleaved", {"interleaved": False}),
        ("the same time every time", {"distinct": 1}),
        ("a cost of zero", {"not_positive": True}),
        ("another boot", {"same_boot": False}),
    ]
    return [(name, {**observation, **changed}) for name, changed in mutations]
