"""A run takes all its steps, ends by itself and leaves a checkpoint. Steps count, not minutes: a hang lasts for hours.

The step counter is the program's word; the harness's own reading of the last checkpoint must agree with it.
"""

from collections.abc import Mapping
from functools import partial

from q4kd.harness.checks.judgement import Judgement, Mutation, inconclusive, pick_run
from q4kd.harness.checks.params import arm_params
from q4kd.harness.checks.run_facts import describe_exit
from q4kd.harness.records.json_types import JsonRecord
from q4kd.harness.records.raw_run import RawRun

NAME = "survives"
PARAMS = arm_params(
    ["steps", "checkpoint"],
    steps={"type": "integer", "minimum": 1, "description": "Optimiser steps that must be completed."},
    checkpoint={"type": "boolean", "description": "Whether a checkpoint of the last step must have been left."},
)
DIRECTIONS = {"steps": "lower", "checkpoint": "lower"}
READS = ("events", "exit", "facts")


def extract(runs: Mapping[str, RawRun], params: JsonRecord, min_observations: int) -> JsonRecord:
    """Count steps, read how the run ended, and take the harness's reading of the last checkpoint."""
    run = pick_run(runs, params.get("arm"))
    steps = [event.get("step") for event in run.events_named("step")]
    return {
        "steps": len(steps),
        "contiguous": steps == list(range(1, len(steps) + 1)),
        **run.ending,
        "same_boot": run.same_boot,
        "wall_s": run.exit.get("wall_s"),
        "done": run.event("done") is not None,
        "checkpoint": run.facts.get("checkpoint") if params["checkpoint"] else None,
    }


def judge(observation: JsonRecord, params: JsonRecord, min_observations: int) -> Judgement:
    """A missing step, another end than exit 0, or a checkpoint that disagrees falsifies the claim."""
    wanted = params["steps"]
    ended = describe_exit(observation).removeprefix("ended: ")
    measured = f"{observation['steps']} steps, {ended}"
    bound = f"{wanted} steps, exit 0" + (", a checkpoint of the last" if params["checkpoint"] else "")
    refuted = partial(Judgement.falsified, measured, bound)
    if not observation["same_boot"]:
        return inconclusive("machine restarted", measured, bound)
    if observation["steps"] < wanted or not observation["contiguous"]:
        return refuted(f"{observation['steps']} of {wanted} steps in {observation['wall_s']:.0f} s; the run {ended}")
    if observation["cause"] != "exited" or observation["returncode"] != 0 or not observation["done"]:
        return refuted(f"all steps were taken, but the run {ended}")
    if params["checkpoint"]:
        found = observation["checkpoint"]
        if not found:
            return refuted("no checkpoint was left")
        counters = [found["step"], found["optimizer_step_min"], found["optimizer_step_max"]]
        if counters != [observation["steps"]] * 3:
            return refuted(f"the checkpoint counts steps {counters}, the events {observation['steps']}")
        if not found["finite"] or not found["digests_match"]:
            return refuted("the checkpoint's tensors are not finite or do not match their digests")
    if observation["steps"] < min_observations:
        return inconclusive("too few observations", measured, bound)
    return Judgement.corroborated(measured, bound)


def mutate(observation: JsonRecord, params: JsonRecord, min_observations: int) -> list[Mutation]:
    """Take fewer steps, or none; end otherwise; leave another checkpoint."""
    mutations: list[Mutation] = [
        ("zero steps", {"steps": 0}),
        ("one step too few", {"steps": params["steps"] - 1}),
        ("a step counted twice", {"contiguous": False}),
        ("killed", {"cause": "killed_cause_unknown", "returncode": None}),
        ("stalled", {"cause": "stalled", "returncode": None}),
        ("exit code 137", {"returncode": 137}),
        ("exit code 1", {"returncode": 1}),
        ("no done event", {"done": False}),
        ("another boot", {"same_boot": False}),
    ]
    if params["checkpoint"]:
        found = dict(observation["checkpoint"])
        mutations.append(("no checkpoint", {"checkpoint": None}))
        for field in ("step", "optimizer_step_min", "optimizer_step_max"):
            mutations.append((f"checkpoint with another {field}", {"checkpoint": {**found, field: found[field] - 1}}))
        for field in ("finite", "digests_match"):
            mutations.append((f"checkpoint not {field}", {"checkpoint": {**found, field: False}}))
    return [(name, {**observation, **changed}) for name, changed in mutations]
