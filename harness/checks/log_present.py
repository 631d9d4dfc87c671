"""Lines that a log must hold, each a stated number of times: no more, no fewer.

A pattern is a list of fragments that must all occur in one line, in their order and case. No check takes a regular
expression: matching fragments is linear in the log, whatever a contract asks for. Numbers that a line states may be
compared with the events, which the harness reads apart from the log.
"""

from collections.abc import Mapping

from q4kd.harness.checks.judgement import Judgement, Mutation, inconclusive, pick_run
from q4kd.harness.checks.params import FRAGMENTS, arm_params, closed
from q4kd.harness.checks.run_facts import completion, describe_exit
from q4kd.harness.records.json_types import JsonRecord
from q4kd.harness.records.raw_run import RawRun

NAME = "log_present"
PARAMS = arm_params(
    ["lines", "completion"],
    lines={
        "type": "array",
        "minItems": 1,
        "maxItems": 64,
        "description": "Each pattern and how many lines of stdout must match it.",
        "items": closed(["fragments", "times"], fragments=FRAGMENTS, times={"type": "integer", "minimum": 0}),
    },
    completion=FRAGMENTS | {"description": "A line that only a complete run prints."},
    losses={
        "type": "boolean",
        "description": "Whether every 'Step N/M: loss: X' line must state the loss of the event of step N.",
    },
)
DIRECTIONS: dict[str, str] = {}
READS = ("stdout", "events", "exit")


def _matches(line: str, fragments: list[str]) -> bool:
    at = 0
    for fragment in fragments:
        at = line.find(fragment, at)
        if at < 0:
            return False
        at += len(fragment)
    return True


def _stated_loss(line: str) -> tuple[int, float] | None:
    """Parse ``Step N/M: loss: X …``; None for any other line."""
    head, _, rest = line.partition(": loss: ")
    step = head.removeprefix("Step ").partition("/")[0]
    number = rest.split(" ", 1)[0]
    if not head.startswith("Step ") or not step.isdecimal():
        return None
    try:
        return int(step), float(number)
    except ValueError:
        return int(step), float("nan")


def extract(runs: Mapping[str, RawRun], params: JsonRecord, min_observations: int) -> JsonRecord:
    """Count the lines of stdout, and compare stated losses with the events."""
    run = pick_run(runs, params.get("arm"))
    lines = run.stdout.splitlines()
    events = {event.get("step"): event.get("loss") for event in run.events_named("step")}
    stated = [found for found in map(_stated_loss, lines) if found is not None]
    wrong = [
        f"step {step}: the log says {loss:g}, the event {events.get(step)}"
        for step, loss in stated
        if not isinstance(events.get(step), int | float) or not abs(loss - float(events[step])) <= 6e-5  # type: ignore[arg-type]
    ]
    return completion(run) | {
        "lines": len(lines),
        "counts": [sum(_matches(line, wanted["fragments"]) for line in lines) for wanted in params["lines"]],
        "completion_lines": sum(_matches(line, params["completion"]) for line in lines),
        "losses_stated": len(stated),
        "wrong_losses": wrong[:3],
    }


def judge(observation: JsonRecord, params: JsonRecord, min_observations: int) -> Judgement:
    """A count that differs or a loss that is not the event's falsifies; without a complete log it is inconclusive."""
    wanted = params["lines"]
    bound = "; ".join(f"{'…'.join(line['fragments'])} x {line['times']}" for line in wanted)
    measured = f"{', '.join(map(str, observation['counts']))} of {observation['lines']} lines"
    if not observation["completed"]:
        return inconclusive("run incomplete", describe_exit(observation), bound)
    if not observation["completion_lines"]:
        return inconclusive("no completion marker", measured, bound)
    for line, count in zip(wanted, observation["counts"], strict=True):
        if count != line["times"]:
            pattern = "…".join(line["fragments"])
            return Judgement.falsified(measured, bound, f"{count} lines like {pattern}, expected {line['times']}")
    if params.get("losses") and observation["wrong_losses"]:
        return Judgement.falsified(measured, bound, observation["wrong_losses"][0])
    if params.get("losses") and not observation["losses_stated"]:
        return inconclusive("too few observations", "no line states a loss", bound)
    if observation["lines"] < min_observations:
        return inconclusive("too few observations", measured, bound)
    return Judgement.corroborated(measured, bound)


def mutate(observation: JsonRecord, params: JsonRecord, min_observations: int) -> list[Mutation]:
    """Add and remove a line of each pattern, take away the end, and let a stated loss differ."""
    mutations: list[Mutation] = [
        ("not completed", {"completed": False}),
        ("no completion marker", {"completion_lines": 0}),
        ("one line too few", {"lines": min_observations - 1}),
    ]
    counts = observation["counts"]
    for at, wanted in enumerate(params["lines"]):
        for change, word in ((1, "more"), (-1, "fewer")):
            changed = [*counts[:at], counts[at] + change, *counts[at + 1 :]]
            mutations.append((f"one line {word} like {'…'.join(wanted['fragments'])}", {"counts": changed}))
    if params.get("losses"):
        mutations.append(("a loss that is not the event's", {"wrong_losses": ["step 1: the log says 0, the event 1"]}))
        mutations.append(("no loss is stated", {"losses_stated": 0}))
    return [(name, {**observation, **changed}) for name, changed in mutations]
