"""A metric improves over a run, and more than in a control arm with the same budget, by paired seeds.

Arms are named ``<arm>-seed<k>``. With ``control: start`` each run is its own control: its value before the first step.
The rule for a control arm: equal steps, tokens and data; at least ``min_seeds`` pairs; every pair better; and the mean
margin above ``margin_se`` standard errors.
"""

import math
import re
from collections.abc import Mapping

from q4kd.harness.checks.judgement import Judgement, Mutation, inconclusive
from q4kd.harness.checks.params import closed
from q4kd.harness.checks.run_facts import completion
from q4kd.harness.records.json_types import JsonRecord
from q4kd.harness.records.raw_run import RawRun

NAME = "improves"
_SEED = re.compile(r"([a-z0-9_]{1,40})-seed([0-9]{1,6})")
_LAST_STEPS = 10
PARAMS = closed(
    ["metric", "better", "treatment", "control", "min_seeds"],
    metric={"enum": ["eval.loss", "eval.kl", "eval.agreement", "step.loss"]},
    better={"enum": ["lower", "higher"]},
    treatment={"type": "string", "pattern": "^[a-z0-9_]{1,40}$", "description": "The arm the claim is about."},
    control={"type": "string", "pattern": "^[a-z0-9_]{1,40}$", "description": "Another arm, or start."},
    min_seeds={"type": "integer", "minimum": 3},
    margin_se={
        "type": "number",
        "minimum": 0,
        "default": 2.0,
        "description": "Standard errors the mean margin must exceed.",
    },
    min_steps={"type": "integer", "minimum": 1, "default": 1, "description": "Steps every run must have taken."},
)
DIRECTIONS = {"min_seeds": "lower", "margin_se": "lower", "min_steps": "lower"}
READS = ("events", "exit", "argv")

# Two arms may differ in the treatment itself and in where each writes.
_TREATMENT_KEYS = ("alpha", "out", "events")


def _ends(run: RawRun, metric: str) -> tuple[float, float] | None:
    """Return the metric before the first step and after the last (training loss: the mean of the last ten steps)."""
    event, _, field = metric.partition(".")
    values = [float(entry[field]) for entry in run.events_named(event)]
    if len(values) < 2:
        return None
    tail = values[-_LAST_STEPS:] if event == "step" else values[-1:]
    return values[0], sum(tail) / len(tail)


def _budget(run: RawRun) -> JsonRecord:
    """Return what must be equal between paired arms, from outside (argv) and from the events."""
    plan = run.event("run_plan") or {}
    words = [str(word) for word in run.argv["argv"]]
    kept = [
        word
        for index, word in enumerate(words)
        if not any(word.startswith(f"{key}=") for key in _TREATMENT_KEYS)
        and not (index and words[index - 1] in [f"--{key}" for key in _TREATMENT_KEYS])
        and word != "--fault"
        and not (index and words[index - 1] == "--fault")
    ]
    steps = run.events_named("step")
    return {
        "arguments": kept,
        "data_sha256": plan.get("data_sha256"),
        "seed": plan.get("seed"),
        "steps": len(steps),
        "tokens": sum(int(step["tokens"]) for step in steps),
    }


def extract(runs: Mapping[str, RawRun], params: JsonRecord, min_observations: int) -> JsonRecord:
    """Pair the arms by seed."""
    arms: dict[tuple[str, int], RawRun] = {}
    for name, run in runs.items():
        match = _SEED.fullmatch(name.partition(".")[2])
        if match:
            arms[match[1], int(match[2])] = run
    pairs = []
    for (arm, seed), run in sorted(arms.items()):
        if arm != params["treatment"]:
            continue
        ends, alone = _ends(run, params["metric"]), params["control"] == "start"
        other = None if alone else arms.get((params["control"], seed))
        other_ends = other and _ends(other, params["metric"])
        paired = [run] if other is None else [run, other]
        pairs.append(
            {
                "seed": seed,
                "treatment": ends,
                "control": ends and ends[0] if alone else other_ends and other_ends[1],
                "completed": all(completion(one)["completed"] for one in paired),
                "steps": len(run.events_named("step")),
                "wall_s": [one.exit.get("wall_s") for one in paired],
                "same_budget": other is None or _budget(run) == _budget(other),
            }
        )
    return {"pairs": pairs}


def judge(observation: JsonRecord, params: JsonRecord, min_observations: int) -> Judgement:
    """Apply the module's rule."""
    sign = 1.0 if params["better"] == "higher" else -1.0
    needed = float(params.get("margin_se", 2.0))
    against = "its start" if params["control"] == "start" else f"arm {params['control']}"
    bound = f"{params['metric']} {params['better']} than {against} in every seed, mean margin > {needed:g} SE"
    pairs = observation["pairs"]
    if len(pairs) < params["min_seeds"]:
        return inconclusive("too few observations", f"{len(pairs)} seeds of {params['min_seeds']}", bound)
    if not all(pair["completed"] and pair["treatment"] and pair["control"] is not None for pair in pairs):
        return inconclusive("run incomplete", "an arm did not complete", bound)
    if min(pair["steps"] for pair in pairs) < params.get("min_steps", 1):
        return inconclusive("too few observations", f"{min(pair['steps'] for pair in pairs)} steps", bound)
    if not all(pair["same_budget"] for pair in pairs):
        return inconclusive("unequal budget", "arms differ in steps, tokens, data or arguments", bound)
    margins = [sign * (pair["treatment"][1] - pair["control"]) for pair in pairs]
    trends = [sign * (pair["treatment"][1] - pair["treatment"][0]) for pair in pairs]
    mean = sum(margins) / len(margins)
    deviation = math.sqrt(sum((margin - mean) ** 2 for margin in margins) / (len(margins) - 1))
    error = deviation / math.sqrt(len(margins))
    walls = "; ".join("/".join(f"{wall:.0f}" for wall in pair["wall_s"]) for pair in pairs)
    measured = f"margin {mean:.4f} ± {error:.4f} SE over {len(margins)} seeds (wall s {walls})"
    bad = [
        f"seed {pair['seed']}: {pair['treatment'][0]:.4f} → {pair['treatment'][1]:.4f}, {against} {pair['control']:.4f}"
        for pair, margin, trend in zip(pairs, margins, trends, strict=True)
        if not (margin > 0 and trend > 0)
    ]
    if bad or not mean > needed * error:
        counterexample = bad[0] if bad else f"mean margin {mean:.5f} is within {needed:g} x {error:.5f}"
        return Judgement.falsified(measured, bound, counterexample)
    return Judgement.corroborated(measured, bound)


def mutate(observation: JsonRecord, params: JsonRecord, min_observations: int) -> list[Mutation]:
    """Let each pair in turn not improve, not complete or differ in budget; drop pairs; let one seed carry it all."""
    pairs = [dict(pair) for pair in observation["pairs"]]
    sign = 1.0 if params["better"] == "higher" else -1.0
    mutations: list[Mutation] = [
        ("no seeds", {**observation, "pairs": []}),
        ("one seed too few", {**observation, "pairs": pairs[: params["min_seeds"] - 1]}),
    ]
    for at, pair in enumerate(pairs):
        first, last = pair["treatment"]
        changes: dict[str, JsonRecord] = {
            "no better than its control": {"control": last},
            "no better than its start": {"treatment": [first, first]},
            "worse than its start": {"treatment": [first, first - sign]},
            "not completed": {"completed": False},
            "without a control": {"control": None},
            "of zero steps": {"steps": 0},
            "one step too short": {"steps": params.get("min_steps", 1) - 1},
        }
        if params["control"] != "start":
            changes["with another budget"] = {"same_budget": False}
        for name, changed in changes.items():
            changed_pairs = [*pairs[:at], {**pair, **changed}, *pairs[at + 1 :]]
            mutations.append((f"seed {pair['seed']} {name}", {**observation, "pairs": changed_pairs}))
    if params.get("margin_se", 2.0) > 1:
        # One outlier of n equals n times the mean and gives a mean of about one standard error.
        carried = [
            {**pair, "treatment": [0.0, sign], "control": sign * (1.0 - (1e6 if at == 0 else 1e-3))}
            for at, pair in enumerate(pairs)
        ]
        mutations.append(("one seed carries the margin", {**observation, "pairs": carried}))
    return mutations
