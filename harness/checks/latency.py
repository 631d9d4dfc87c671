"""How long one piece of work takes: the median of several, timed one after the other within the supervised run.

``arrays/<array>.npz`` holds ``seconds`` and ``start`` (CLOCK_MONOTONIC), both float ``[n]``. The supervisor's own clock
must agree: work that began before the program or ended after it was not measured.
"""

from collections.abc import Mapping

import numpy as np

from q4kd.harness.checks.judgement import Judgement, Mutation, inconclusive, just_over, pick_run
from q4kd.harness.checks.params import ARRAY_PARAM, arm_params
from q4kd.harness.records.json_types import JsonRecord
from q4kd.harness.records.raw_run import RawRun

NAME = "latency"
PARAMS = arm_params(
    ["array", "max_s"],
    array=ARRAY_PARAM,
    max_s={"type": "number", "exclusiveMinimum": 0, "description": "Largest median allowed, in seconds."},
)
DIRECTIONS = {"max_s": "upper"}
READS = ("arrays", "exit")
TIME_BOUNDS = {"max_s": "seconds"}
_CLOCK_S = 1e-3


def extract(runs: Mapping[str, RawRun], params: JsonRecord, min_observations: int) -> JsonRecord:
    """Reduce the times to their median and spread, and compare their clock with the supervisor's."""
    run = pick_run(runs, params.get("arm"))
    observation: dict[str, object] = {**run.ending, "same_boot": run.same_boot, "count": 0}
    if f"arrays/{params['array']}.npz" not in run.store.names():
        return observation
    arrays = run.array(params["array"])
    if not {"seconds", "start"} <= set(arrays):
        return observation
    seconds, start = (arrays[key].astype(np.float64).ravel() for key in ("seconds", "start"))
    if len(seconds) != len(start) or not len(seconds):
        return observation
    if not (np.isfinite(seconds).all() and np.isfinite(start).all() and (seconds > 0).all()):
        return observation | {"not_positive": True}
    end = start + seconds
    inside = run.exit["start_t"] <= start[0] and end[-1] <= run.exit["end_t"] + _CLOCK_S
    return observation | {
        "count": len(seconds),
        "median": float(np.median(seconds)),
        "low": float(seconds.min()),
        "high": float(seconds.max()),
        "in_turn": bool(inside and (start[1:] >= end[:-1] - _CLOCK_S).all()),
        "distinct": int(np.unique(seconds).size),
    }


def judge(observation: JsonRecord, params: JsonRecord, min_observations: int) -> Judgement:
    """A median over the bound falsifies the claim; times that overlap or lie outside the run are inconclusive."""
    limit = float(params["max_s"])
    bound = f"median ≤ {limit:g} s"
    if not observation["same_boot"]:
        return inconclusive("machine restarted", "another boot", bound)
    if observation.get("not_positive"):
        return inconclusive("evidence unreadable", "a time that is not a positive number", bound)
    if not observation["count"] or observation["cause"] != "exited" or observation["returncode"] != 0:
        ended = f"run ended: {observation['cause']}, exit code {observation['returncode']}"
        return inconclusive("run incomplete", ended, bound)
    median = float(observation["median"])
    spread = f"{observation['low']:.3g} to {observation['high']:.3g}"
    measured = f"median {median:.4g} s ({spread}) of {observation['count']}"
    if not observation["in_turn"]:
        return inconclusive("evidence unreadable", f"{measured}: times overlap or lie outside the run", bound)
    if median > limit:
        return Judgement.falsified(
            measured, bound, f"median {median:.4g} s, {median / limit:.2f} x the bound", median / limit
        )
    if observation["count"] < min_observations:
        return inconclusive("too few observations", measured, bound)
    if observation["distinct"] < 2:
        return inconclusive("constant", measured, bound)
    return Judgement.corroborated(measured, bound, median / limit)


def mutate(observation: JsonRecord, params: JsonRecord, min_observations: int) -> list[Mutation]:
    """Move the median just over its bound; repeat one value; overlap the times; leave too few or none."""
    mutations: list[Mutation] = [
        ("median just over the bound", {"median": just_over(params["max_s"])}),
        ("no times", {"count": 0}),
        ("one time too few", {"count": min_observations - 1}),
        ("times that overlap or lie outside the run", {"in_turn": False}),
        ("the same time every time", {"distinct": 1}),
        ("a time of zero", {"not_positive": True}),
        ("exit code 1", {"returncode": 1}),
        ("another boot", {"same_boot": False}),
    ]
    return [(name, {**observation, **changed}) for name, changed in mutations]
