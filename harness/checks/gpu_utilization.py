"""How busy the GPU was with this program: NVML's utilisation by process, sampled from outside, while work was done.

Utilisation of the whole device would count another program's work, and a fast idle loop is not work: the phase must
span a stated number of steps.
"""

from collections.abc import Mapping
from itertools import pairwise
from statistics import median

from q4kd.harness.checks.judgement import Judgement, Mutation, inconclusive, just_over, just_under, pick_run
from q4kd.harness.checks.params import arm_params
from q4kd.harness.checks.run_facts import completion, describe_exit
from q4kd.harness.records.json_types import JsonRecord
from q4kd.harness.records.raw_run import RawRun

NAME = "gpu_utilization"
# NVML averages over up to a second, and has nothing to say of a process between two averages.
MAX_GAP_S = 2.0
PARAMS = arm_params(
    ["min_percent", "event", "min_events"],
    min_percent={"type": "number", "exclusiveMinimum": 0, "maximum": 100, "description": "Of the median."},
    event={"enum": ["step", "forward_done"], "description": "What marks finished work."},
    min_events={"type": "integer", "minimum": 2, "description": "Finished work between the first and the last mark."},
)
DIRECTIONS = {"min_percent": "lower", "min_events": "lower"}
READS = ("events", "memory", "exit")


def extract(runs: Mapping[str, RawRun], params: JsonRecord, min_observations: int) -> JsonRecord:
    """Take this process tree's samples between the first and the last finished piece of work."""
    run = pick_run(runs, params.get("arm"))
    marks = [float(event["t"]) for event in run.events_named(params["event"])]
    observation: dict[str, object] = completion(run) | {"events": len(marks), "samples": 0, "silent": 0}
    if len(marks) < 2:
        return observation
    inside = [sample for sample in run.memory if marks[0] <= sample["t"] <= marks[-1]]
    told = [sample for sample in inside if sample.get("gpu_sm") is not None]
    busy = [float(sample["gpu_sm"]) for sample in told]
    times = [marks[0], *(float(sample["t"]) for sample in told), marks[-1]]
    return observation | {
        "samples": len(busy),
        "silent": len(inside) - len(busy),
        "median_percent": median(busy) if busy else None,
        "other_bytes": max((int(sample.get("gpu_others") or 0) for sample in inside), default=0),
        "span_s": marks[-1] - marks[0],
        "largest_gap_s": max(b - a for a, b in pairwise(times)),
    }


def judge(observation: JsonRecord, params: JsonRecord, min_observations: int) -> Judgement:
    """A median under the bound while work was done falsifies; where NVML names no process it is inconclusive."""
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
        busy = f"the GPU was {observation['median_percent']:g} % busy with this program"
        margin = params["min_percent"] / max(float(observation["median_percent"]), 1e-9)
        return Judgement.falsified(measured, bound, f"{busy} for {observation['span_s']:.1f} s", margin)
    if not observation["completed"]:
        return inconclusive("run incomplete", describe_exit(observation), bound)
    if observation["largest_gap_s"] > MAX_GAP_S:
        return inconclusive("phase not covered", measured, bound)
    margin = params["min_percent"] / float(observation["median_percent"])
    return Judgement.corroborated(measured, bound, margin)


def mutate(observation: JsonRecord, params: JsonRecord, min_observations: int) -> list[Mutation]:
    """Lower the median just under the bound; do less work; leave too few samples, a gap or none; do not end."""
    mutations: list[Mutation] = [
        ("median just under the bound", {"median_percent": just_under(params["min_percent"])}),
        ("no work", {"events": 0}),
        ("one event too few", {"events": params["min_events"] - 1}),
        ("no figure for this process", {"samples": 0, "median_percent": None}),
        ("one sample too few", {"samples": min_observations - 1}),
        ("a gap between samples", {"largest_gap_s": just_over(MAX_GAP_S)}),
        ("not completed", {"completed": False}),
    ]
    return [(name, {**observation, **changed}) for name, changed in mutations]
