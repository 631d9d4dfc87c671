"""For each check a claim and recorded runs that corroborate it, and the same runs with something wrong."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from raw_runs import event, samples, write_run

from q4kd.harness.claims.model import Claim, Falsifier
from q4kd.harness.records.raw_run import RawRun

MB = 1_000_000
START = event("process_start", 0.1, pid=7)
STEADY = samples(*[(t / 4, 200 * MB + (50 * MB if t > 8 else 0)) for t in range(21)])
GROWN = samples(*[(t / 4, 200 * MB + (500 * MB if t > 8 else 0)) for t in range(21)])
PHASE = [START, event("imports_done", 1.0), event("done", 5.0)]
TYPES = {"Q4_K": 70 * MB, "Q6_K": 10 * MB}
READY = event("teacher_ready", 2.0, resident_bytes=TYPES, dense_bytes_of_quantised=0, scratch_bytes=8 * MB)
STEPS = [event("step", float(n), step=n, loss=3.0 / n, tokens=8) for n in range(1, 6)]
CHECKPOINT = {
    "step": 5, "optimizer_step_min": 5, "optimizer_step_max": 5, "tensors": 9, "finite": True, "digests_match": True,
}  # fmt: skip
REFERENCE = np.random.default_rng(0).normal(size=(4, 50))
TURNS = np.arange(12.0)
PAIRS = {
    "numerator": 1.0 + TURNS / 100, "denominator": 2.0 + TURNS / 100,
    "numerator_start": 10 * TURNS, "denominator_start": 10 * TURNS + 4,
}  # fmt: skip
EXACT = np.random.default_rng(1).normal(size=(6, 5, 40)).astype(np.float32)
ROUNDING = np.random.default_rng(2).normal(size=(2, *EXACT.shape)).astype(np.float32)
LOG = "teacher ready: 3 tensors\nStep 1/5: loss: 3.0000 x\nlogits: 4 positions\n"

# check → its parameters, the least observations, a good run, and what of it a fault changes.
CASES: dict[str, tuple[dict[str, Any], int, dict[str, Any], dict[str, Any]]] = {
    "error_ratio": (
        {"subject": "packed", "peer": "dense", "array": "x", "max": 1.2, "peer_max": 0.02, "min_sequences": 6},
        5,
        {},
        {},
    ),
    "gpu_utilization": (
        {"min_percent": 50, "event": "step", "min_events": 3},
        10,
        {"events": [START, *STEPS, event("done", 6.0)], "memory": [{**line, "gpu_sm": 90} for line in STEADY]},
        {"memory": [{**line, "gpu_sm": 5} for line in STEADY]},
    ),
    "improves": (
        {"metric": "eval.kl", "better": "lower", "treatment": "kd", "control": "ce", "min_seeds": 3, "min_steps": 5},
        3,
        {},
        {},
    ),
    "latency": (
        {"array": "x", "max_s": 2.0},
        10,
        {"arrays": {"x": {"seconds": 0.5 + TURNS / 100, "start": TURNS}}, "ending": {"end_t": 20.0}},
        {"arrays": {"x": {"seconds": 3.0 + TURNS / 100, "start": 10 * TURNS}}, "ending": {"end_t": 200.0}},
    ),
    "log_absent": (
        {"absent": [["PMAT-333", "Dequantizing"]], "completion": ["logits:"], "known_positive": ["teacher ready"]},
        2,
        {"stdout": LOG},
        {"stdout": LOG + "PMAT-333: Dequantizing\n"},
    ),
    "log_present": (
        {
            "lines": [{"fragments": ["Step ", "/5"], "times": 1}, {"fragments": ["warning"], "times": 0}],
            "completion": ["logits:"],
            "losses": True,
        },
        3,
        {"stdout": LOG, "events": [*STEPS, event("done", 6.0)]},
        {"stdout": LOG.replace("3.0000", "2.0000")},
    ),
    "memory_ceiling": (
        {
            "series": "rss_above_baseline",
            "phase": ["imports_done", "done"],
            "ceiling": {"times": 1.25, "of": "gguf_tensor_bytes", "plus_bytes": 10 * MB},
        },
        10,
        {"events": PHASE, "memory": STEADY, "facts": {"gguf_tensor_bytes": 80 * MB}},
        {"memory": GROWN},
    ),
    "parity": (
        {"array": "x", "metric": "relative_frobenius", "max": 1e-5},
        4,
        {
            "arrays": {"x": {"subject": REFERENCE * (1 + 1e-6), "reference": REFERENCE}},
            "facts": {"comparators": {"x": {"subject": "program", "reference": "float64"}}},
        },
        {"arrays": {"x": {"subject": REFERENCE * (1 + 1e-3), "reference": REFERENCE}}},
    ),
    "ratio": (
        {"array": "x", "max": 1.0},
        10,
        {"arrays": {"x": PAIRS}},
        {"arrays": {"x": {**PAIRS, "numerator": 3.0 + TURNS / 100}}},
    ),
    "rejects": (
        {"error": "FrozenTeacherError", "cases": ["a", "b"]},
        2,
        {"facts": {"cases": [{"case": c, "error": "FrozenTeacherError", "twin_error": None} for c in "ab"]}},
        {"facts": {"cases": [{"case": c, "error": None, "twin_error": None} for c in "ab"]}},
    ),
    "residency": (
        {"max_dense_bytes": 0, "max_ratio": 1.02, "outside": {"times": 1.25, "plus_bytes": 10 * MB}},
        8,
        {
            "events": [*PHASE[:2], READY, PHASE[2]],
            "memory": STEADY,
            "facts": {"gguf_tensor_bytes": 80 * MB, "gguf_bytes_by_type": TYPES},
        },
        {"memory": GROWN},
    ),
    "survives": (
        {"steps": 5, "checkpoint": True},
        5,
        {"events": [*STEPS, event("done", 9.0)], "facts": {"checkpoint": CHECKPOINT}},
        {"events": STEPS[:3]},
    ),
    "table": (
        {"table": "t", "expected": {"x": 1, "y": True}},
        2,
        {"facts": {"tables": {"t": {"x": 1, "y": True}}}},
        {"facts": {"tables": {"t": {"x": 1, "y": False}}}},
    ),
}  # fmt: skip


def claim_of(check: str, experiment: str = "exp", faults: tuple[str, ...] = ("planted",)) -> Claim:
    """Return a claim of one check, that its good runs corroborate."""
    params, least, _, _ = CASES[check]
    falsifier = Falsifier(
        check=check, experiment=experiment, params=params, profiles={}, sabotage=faults, min_observations=least
    )
    return Claim(
        contract="c", id=f"FT-{check}", line=1, rule="r", prediction="p", if_fails="f", falsifier=falsifier, prose={}
    )


def good_runs(root: Path, check: str, experiment: str = "exp", **options: Any) -> dict[str, RawRun]:
    """Write the runs that corroborate ``claim_of(check)``; ``options`` replace parts of them."""
    good = CASES[check][2]
    if check == "improves":
        return _arms(root, experiment, lambda seed: 1.0 + seed / 20, **options)
    if check == "error_ratio":
        return rounding_arms(root, experiment, 0.003, **options)
    parts = {"memory": STEADY[:4], **good, **options}
    parts["ending"] = {**good.get("ending", {}), **options.get("ending", {})}
    return {experiment: write_run(root, experiment, **parts)}


def bad_runs(root: Path, check: str, experiment: str = "exp", **options: Any) -> dict[str, RawRun]:
    """Write the runs as a planted fault leaves them: each names it, and they refute the claim."""
    named = {"fault": "planted", **options}
    if check == "improves":
        return _arms(root, experiment, lambda seed: 2.5 + seed / 20, **named)
    if check == "error_ratio":
        return rounding_arms(root, experiment, 0.006, **named)
    return good_runs(root, check, experiment, **{**CASES[check][3], **named})


def rounding_arms(root: Path, experiment: str, error: float, **options: Any) -> dict[str, RawRun]:
    """Write two arms: ``packed`` with a relative error of ``error``, ``dense`` with one of 0.004."""
    runs = {}
    for arm, source, size, noise in (
        ("packed", "program", error, ROUNDING[0]),
        ("dense", "peer", 0.004, ROUNDING[1]),
    ):
        name = f"{experiment}.{arm}"
        parts = {
            "arrays": {"x": {"subject": EXACT * (1 + size * noise), "reference": EXACT}},
            "facts": {"comparators": {"x": {"subject": source, "reference": "float64"}}},
            "memory": STEADY[:4],
        }
        runs[name] = write_run(root, name, **{**parts, **options})
    return runs


def _arms(root: Path, experiment: str, end: Callable[[int], float], **options: Any) -> dict[str, RawRun]:
    runs = {}
    for seed in (1, 2, 3):
        for arm, kl in (("kd", end(seed)), ("ce", 1.5 + seed / 10)):
            plan = event("run_plan", data_sha256="d", seed=seed)
            before, after = (event("eval", kl=value, loss=value, agreement=0.1) for value in (3.0, kl))
            name = f"{experiment}.{arm}-seed{seed}"
            argv = ["--set", f"alpha={0.1 if arm == 'kd' else 1.0}", "--set", f"out={name}"]
            events = [START, plan, before, *STEPS, after, event("done", 9.0)]
            runs[name] = write_run(root, name, **{"events": events, "memory": STEADY[:4], "argv": argv, **options})
    return runs
