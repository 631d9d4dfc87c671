"""How busy the GPU was with this program: NVML's utilisation by process, sampled from outside, while work was done.

Utilisation of the whole device would count another program's work, and a fast idle loop is not work: the phase must
span a stated number of steps.
"""

from collections.abc import Mapping
from statistics import median
from typing import Any

from q4kd.harness.checks.judgement import (
    ARM_PARAM,
    Judgement,
    completion,
    describe_exit,
    inconclusive,
    pick_run,
)
from q4kd.harness.raw import RawRun

NAME = "gpu_utilization"
PARAMS: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["min_percent", "event", "min_events"],
    "properties": {
        "arm": ARM_PARAM,
        "min_percent": {"type": "number", "exclusiveMinimum": 0, "maximum": 100, "description": "Of the median."},
        "event": {"enum": ["step", "forward_done"], "description": "What marks finished work."},
        "min_events": {
            "type": "integer",
            "minimum": 2,
            "description": "Finished work between the first and the last mark.",
        },
    },
}
DIRECTIONS = {"min_percent": "lower", "min_events": "lower"}


def extract(runs: Mapping[str, RawRun], params: Mapping[str, Any], min_observations: int) -> dict[str, Any]:
    """Take this process tree's samples between the first and the last finished piece of work."""
    run = pick_run(runs, params.get("arm"))
    marks = [float(event["t"]) for event in run.events_named(params["event"])]
    observation: dict[str, Any] = completion(run) | {"events": len(marks), "samples": 0, "silent": 0}
    if len(marks) < 2:
        return observation
    inside = [sample for sample in run.memory if marks[0] <= sample["t"] <= marks[-1]]
    busy = [float(sample["gpu_sm"]) for sample in inside if sample.get("gpu_sm") is not None]
    return observation | {
        "samples": len(busy),
        "silent": len(inside) - len(busy),
        "median_percent": median(busy) if busy else None,
        "other_bytes": max((int(sample.get("gpu_others") or 0) for sample in inside), default=0),
        "span_s": marks[-1] - marks[0],
    }


def judge(observation: Mapping[str, Any], params: Mapping[str, Any], min_observations: int) -> Judgement:
    """Falsified by a median under the bound while work was done; inconclusive where NVML names no process."""
    bound = f"median ≥ {params['min_percent']:g} % over {params['min_events']} or more {params['event']} events"
    if observation["events"] < params["min_events"]:
        reason = "too few observations" if observation["completed"] else "run incomplete"
        return inconclusive(reason, f"{observation['events']} events; {describe_exit(observation)}", bound)
    if not observation["samples"]:
        return inconclusive("utilisation not reported", "NVML gave no figure for this process", bound)
    measured = f"median {observation['median_percent']:g} % over {observation['samples']} samples"
    if observation["samples"] < min_observations:
        return inconclusive("too few observations", measured, bound)
    if observation["median_percent"] < params["min_percent"]:
        return Judgement(
            verdict="falsified",
            measured=measured,
            bound=bound,
            counterexample=f"the GPU was {observation['median_percent']:g} % busy with this program for "
            f"{observation['span_s']:.1f} s",
            margin=params["min_percent"] / max(float(observation["median_percent"]), 1e-9),
        )
    if not observation["completed"]:
        return inconclusive("run incomplete", describe_exit(observation), bound)
    margin = params["min_percent"] / float(observation["median_percent"])
    return Judgement(verdict="corroborated", measured=measured, bound=bound, margin=margin)
