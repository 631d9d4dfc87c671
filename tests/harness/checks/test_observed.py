"""log_present, ratio and gpu_utilization: corroborate the good evidence, falsify the bad, never pass on nothing."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from check_outcomes import evaluate, outcome
from raw_runs import KILLED, event, samples, write_run

# --- log_present ---

LINES = {
    "lines": [
        {"fragments": ["Step ", "/20: loss: "], "times": 2},
        {"fragments": ["Step 10/20: loss: "], "times": 1},
        {"fragments": ["Step 20/20: loss: "], "times": 1},
    ],
    "completion": ["Model written to"],
    "losses": True,
}
STEPS = [event("step", step=step, loss=8.0 - step / 10) for step in range(1, 21)]
DONE = [*STEPS, event("done", 9.0)]
TEN, TWENTY, END = "Step 10/20: loss: 7.0000 (5 tok/s)\n", "Step 20/20: loss: 6.0000\n", "Model written to m\n"


@pytest.mark.parametrize(
    ("text", "events", "ending", "least", "expected"),
    [
        (TEN + TWENTY + END, DONE, {}, 1, "corroborated"),
        (TEN + END, DONE, {}, 1, "falsified"),
        (TEN + TWENTY + TWENTY + END, DONE, {}, 1, "falsified"),
        ("Step 11/20: loss: 6.9\n" + TEN + TWENTY + END, DONE, {}, 1, "falsified"),
        ("step 10/20 loss 7\n" + TWENTY + END, DONE, {}, 1, "falsified"),  # a reworded line
        ("Step 10/20: loss: 7.0200\n" + TWENTY + END, DONE, {}, 1, "falsified"),  # not the event's loss
        ("Step 10/20: loss: nan\n" + TWENTY + END, DONE, {}, 1, "falsified"),
        (TEN + TWENTY, DONE, {}, 1, "no completion marker"),
        (TEN + TWENTY + END, STEPS, {}, 1, "run incomplete"),
        (TEN + TWENTY + END, DONE, KILLED, 1, "run incomplete"),
        ("", DONE, KILLED, 1, "run incomplete"),
        (TEN + TWENTY + END, DONE, {}, 9, "too few observations"),
    ],
)
def test_log_present(
    tmp_path: Path, text: str, events: list[Any], ending: dict[str, Any], least: int, expected: str
) -> None:
    run = write_run(tmp_path, stdout=text, events=events, ending=ending)
    assert outcome(evaluate("log_present", run, LINES, least)) == expected


def test_log_present_of_zero_lines_needs_a_complete_log(tmp_path: Path) -> None:
    params = {"lines": [{"fragments": ["Step "], "times": 0}], "completion": ["Model written to"]}
    assert (
        outcome(evaluate("log_present", write_run(tmp_path / "a", stdout=END, events=DONE), params)) == "corroborated"
    )
    assert (
        outcome(evaluate("log_present", write_run(tmp_path / "b", stdout=TEN + END, events=DONE), params))
        == "falsified"
    )
    assert outcome(evaluate("log_present", write_run(tmp_path / "c", events=DONE), params)) == "no completion marker"


# --- ratio ---


def pairs(above: Any, below: Any, gap: float = 1.0, shift: float = 0.4) -> dict[str, Any]:
    count = len(above)
    start = np.arange(count) * gap
    return {
        "cost": {
            "numerator": np.asarray(above, float),
            "denominator": np.asarray(below, float),
            "numerator_start": start,
            "denominator_start": start + shift,
        }
    }


FAST = pairs([0.9, 0.95, 1.0, 0.8, 0.9], [1.0, 1.1, 1.0, 1.0, 0.9])


@pytest.mark.parametrize(
    ("arrays", "params", "ending", "least", "expected"),
    [
        (FAST, {"max": 1.0}, {}, 5, "corroborated"),
        (FAST, {"max": 0.8}, {}, 5, "falsified"),
        (FAST, {"min": 0.8}, {}, 5, "corroborated"),
        (FAST, {"min": 1.0}, {}, 5, "falsified"),
        (FAST, {"max": 1.0}, {}, 6, "too few observations"),
        (pairs([1.0] * 5, [1.0] * 5), {"max": 2.0}, {}, 5, "constant"),
        (pairs([1, 2, 3.0], [1, 2, 3.1], gap=0.0), {"max": 2.0}, {}, 3, "arms not interleaved"),
        (pairs([1, 2, 3.0], [1, 2, 3.1], shift=0.0), {"max": 2.0}, {}, 3, "arms not interleaved"),
        (pairs([1, 2, 3.0], [1, 2, 3.1], shift=5.0), {"max": 2.0}, {}, 3, "arms not interleaved"),
        (pairs([1, np.nan, 3.0], [1, 2, 3.1]), {"max": 2.0}, {}, 3, "evidence unreadable"),
        (pairs([1, 2, 3.0], [1, 0, 3.1]), {"max": 2.0}, {}, 3, "evidence unreadable"),
        (pairs([], []), {"max": 2.0}, {}, 1, "run incomplete"),
        ({}, {"max": 2.0}, KILLED, 1, "run incomplete"),
        ({"cost": {"numerator": np.ones(3)}}, {"max": 2.0}, {}, 1, "run incomplete"),
        (FAST, {"max": 1.0}, {"boot_id_end": "other"}, 5, "machine restarted"),
    ],
)
def test_ratio(
    tmp_path: Path, arrays: dict[str, Any], params: dict[str, Any], ending: dict[str, Any], least: int, expected: str
) -> None:
    run = write_run(tmp_path, arrays=arrays, ending=ending)
    assert outcome(evaluate("ratio", run, {"array": "cost", **params}, least)) == expected


# --- gpu_utilization ---

BUSY = {"min_percent": 90, "event": "step", "min_events": 4}
WORK = [event("step", t, step=int(t)) for t in (1.0, 2.0, 3.0, 4.0, 5.0)] + [event("done", 6.0)]


def gpu(values: list[float | None]) -> list[dict[str, Any]]:
    return [
        sample | {"gpu_sm": value}
        for sample, value in zip(samples(*[(1 + i / 10, 1e6) for i in range(len(values))]), values, strict=True)
    ]


@pytest.mark.parametrize(
    ("memory", "events", "ending", "least", "expected"),
    [
        (gpu([95.0] * 40), WORK, {}, 20, "corroborated"),
        (gpu([95.0] * 30 + [10.0] * 10), WORK, {}, 20, "corroborated"),
        (gpu([89.0] * 40), WORK, {}, 20, "falsified"),
        (gpu([0.0] * 40), WORK, {}, 20, "falsified"),
        (gpu([None] * 40), WORK, {}, 20, "utilisation not reported"),  # only other processes were busy
        (gpu([95.0] * 10 + [None] * 30), WORK, {}, 20, "too few observations"),
        (gpu([95.0] * 40), WORK[:2], {}, 20, "run incomplete"),
        (gpu([95.0] * 40), [event("done", 6.0)], {}, 20, "too few observations"),  # busy, but no work was finished
        (gpu([95.0] * 40), WORK[:5], KILLED, 20, "run incomplete"),
        ([], WORK, {}, 1, "utilisation not reported"),
    ],
)
def test_gpu_utilization(
    tmp_path: Path, memory: list[Any], events: list[Any], ending: dict[str, Any], least: int, expected: str
) -> None:
    run = write_run(tmp_path, memory=memory, events=events, ending=ending)
    assert outcome(evaluate("gpu_utilization", run, BUSY, least)) == expected
