"""error_ratio: corroborates a program that rounds like its peer, falsifies a coarser one, never passes on nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from check_outcomes import evaluate, outcome
from good_runs import CASES, EXACT, ROUNDING, rounding_arms
from raw_runs import KILLED, write_run

from q4kd.harness.records.raw_run import RawRun

PARAMS, LEAST, _, _ = CASES["error_ratio"]
NAMES = {"subject": "program", "reference": "float64"}


def judged(runs: dict[str, RawRun], least: int = LEAST, **params: Any) -> str:
    return outcome(evaluate("error_ratio", runs, PARAMS | params, least))


@pytest.mark.parametrize(
    ("error", "expected"),
    [(0.003, "corroborated"), (0.004, "corroborated"), (0.006, "falsified"), (1e-6, "unequal budget")],
)
def test_the_ratio_decides(tmp_path: Path, error: float, expected: str) -> None:
    assert judged(rounding_arms(tmp_path, "exp", error)) == expected


def test_one_bad_position_is_enough_and_is_named(tmp_path: Path) -> None:
    runs = rounding_arms(tmp_path / "good", "exp", 0.003)
    worse = EXACT * (1 + 0.003 * ROUNDING[0])
    worse[:, 3] = EXACT[:, 3] * (1 + 0.01 * ROUNDING[0][:, 3])
    arrays = {"x": {"subject": worse, "reference": EXACT}}
    runs["exp.packed"] = write_run(tmp_path, "exp.packed", arrays=arrays, facts={"comparators": {"x": NAMES}})
    judgement = evaluate("error_ratio", runs, PARAMS, LEAST)
    assert judgement.verdict == "falsified"
    assert str(judgement.counterexample).startswith("position 3: ")


def test_errors_are_root_mean_squares_over_sequences(tmp_path: Path) -> None:
    exact = np.ones((2, 1, 3), np.float32)
    exact[0, 0, 0] = 2.0
    errors = {"packed": np.array([0.03, 0.01]), "dense": np.array([0.01, 0.03])}
    runs = {
        f"exp.{arm}": write_run(
            tmp_path,
            f"exp.{arm}",
            arrays={"x": {"subject": exact * (1 + error[:, None, None]), "reference": exact}},
            facts={"comparators": {"x": {"subject": arm, "reference": "float64"}}},
        )
        for arm, error in errors.items()
    }
    judgement = evaluate("error_ratio", runs, PARAMS | {"min_sequences": 2, "peer_max": 0.1}, 1)
    assert judgement.verdict == "corroborated"
    assert judgement.margin == pytest.approx(1 / 1.2, rel=1e-6)


def changed(arm: str, **parts: Any) -> Callable[[Path, dict[str, RawRun]], None]:
    def change(root: Path, runs: dict[str, RawRun]) -> None:
        base = {"arrays": {"x": runs[f"exp.{arm}"].array("x")}, "facts": runs[f"exp.{arm}"].facts}
        runs[f"exp.{arm}"] = write_run(root / "changed", f"exp.{arm}", **{**base, **parts})

    return change


def arrays(subject: Any, reference: Any = EXACT) -> dict[str, Any]:
    return {"arrays": {"x": {"subject": subject, "reference": reference}}}


def named(subject: Any, reference: Any = "float64") -> dict[str, Any]:
    return {"facts": {"comparators": {"x": {"subject": subject, "reference": reference}}}}


GOOD = EXACT * (1 + 0.003 * ROUNDING[0])
PEER = EXACT * (1 + 0.004 * ROUNDING[1])
HOLED = np.where(np.arange(40) == 7, np.nan, GOOD)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (changed("packed", facts={"comparators": {}}, ending=KILLED), "run incomplete"),
        (changed("dense", facts={"comparators": {}}, ending=KILLED), "run incomplete"),
        (changed("dense", **named("program")), "self comparison"),
        (changed("dense", **named("float64")), "self comparison"),
        (changed("dense", **named(None)), "self comparison"),
        (changed("dense", **named("peer", "another")), "self comparison"),
        (changed("dense", **arrays(GOOD)), "self comparison"),
        (changed("dense", **arrays(EXACT.copy())), "self comparison"),
        (changed("dense", **arrays(PEER, EXACT + np.float32(1e-3))), "unequal budget"),
        (changed("dense", **arrays(EXACT * (1 + 0.1 * ROUNDING[1]))), "unequal budget"),
        (changed("dense", **arrays(np.where(np.arange(40) == 7, np.inf, PEER))), "reference not finite"),
        (changed("dense", **arrays(PEER[:, :3])), "too few observations"),
        (changed("packed", **arrays(GOOD[:, :3])), "falsified"),
        (changed("packed", **arrays(HOLED)), "falsified"),
        (changed("packed", **arrays(EXACT.copy())), "unequal budget"),
    ],
)
def test_evidence_that_shows_nothing(
    tmp_path: Path, change: Callable[[Path, dict[str, RawRun]], None], expected: str
) -> None:
    runs = rounding_arms(tmp_path, "exp", 0.003)
    change(tmp_path, runs)
    assert judged(runs) == expected


def test_too_little_is_too_little(tmp_path: Path) -> None:
    runs = rounding_arms(tmp_path, "exp", 0.003)
    assert judged(runs, least=6) == "too few observations"
    assert judged(runs, min_sequences=7) == "too few observations"
    flat = np.ones_like(EXACT)
    for arm, noise in (("packed", ROUNDING[0]), ("dense", ROUNDING[1])):
        changed(arm, **arrays(flat * (1 + 0.003 * noise), flat))(tmp_path / arm, runs)
    assert judged(runs) == "constant"
