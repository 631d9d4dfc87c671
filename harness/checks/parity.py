"""Two arrays agree, row by row, and come from different programs.

``arrays/<array>.npz`` holds ``subject`` (from the program under test) and ``reference`` (from the harness or another
engine), each ``[rows, …]``; ``facts.json`` names both sources under ``comparators``.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from q4kd.harness.checks.judgement import Judgement, Mutation, inconclusive, just_over, just_under, pick_run
from q4kd.harness.checks.params import ARRAY_PARAM, arm_params
from q4kd.harness.records.json_types import JsonRecord
from q4kd.harness.records.raw_run import RawRun

NAME = "parity"
METRICS = ("relative_frobenius", "cosine", "max_abs", "bit_equal")
PARAMS = arm_params(
    ["array", "metric"],
    array=ARRAY_PARAM,
    metric={"enum": list(METRICS), "description": "Computed for each row; the worst row counts."},
    max={"type": "number", "minimum": 0, "description": "Largest value allowed (relative_frobenius, max_abs)."},
    min={"type": "number", "maximum": 1, "description": "Smallest value allowed (cosine)."},
) | {
    "allOf": [
        {"if": {"properties": {"metric": {"const": "cosine"}}}, "then": {"required": ["min"]}},
        {"if": {"properties": {"metric": {"enum": ["relative_frobenius", "max_abs"]}}}, "then": {"required": ["max"]}},
    ]
}
DIRECTIONS = {"max": "upper", "min": "lower"}
READS = ("facts", "arrays", "exit")


def _row_values(metric: str, subject: NDArray[np.generic], reference: NDArray[np.generic]) -> NDArray[np.float64]:
    if metric == "bit_equal":
        return np.array([a.tobytes() != b.tobytes() for a, b in zip(subject, reference, strict=True)], np.float64)
    a, b = subject.astype(np.float64), reference.astype(np.float64)
    tiny, norms = np.finfo(np.float64).tiny, np.linalg.norm(b, axis=1)
    values: NDArray[np.float64]
    if metric == "max_abs":
        values = np.abs(a - b).max(1)
    elif metric == "relative_frobenius":
        values = np.linalg.norm(a - b, axis=1) / np.maximum(norms, tiny)
    else:
        values = (a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * norms, tiny)
    return values


def extract(runs: Mapping[str, RawRun], params: JsonRecord, min_observations: int) -> JsonRecord:
    """Compute the metric of every row."""
    run = pick_run(runs, params.get("arm"))
    sources = run.facts.get("comparators", {}).get(params["array"], {})
    observation: dict[str, object] = {
        "subject_source": sources.get("subject"),
        "reference_source": sources.get("reference"),
        **run.ending,
        "rows": 0,
    }
    if not sources:
        return observation  # the run left no output to compare
    arrays = run.array(params["array"])
    subject, reference = arrays["subject"], arrays["reference"]
    observation |= {"subject_shape": list(subject.shape), "reference_shape": list(reference.shape)}
    if subject.shape != reference.shape or subject.size == 0 or subject.ndim == 0:
        return observation
    subject, reference = subject.reshape(len(subject), -1), reference.reshape(len(reference), -1)
    finite_rows = np.isfinite(subject).all(1)
    observation |= {
        "rows": len(subject),
        "reference_finite": bool(np.isfinite(reference).all()),
        "reference_distinct_values": int(np.unique(reference).size),
        "first_bad_row": None if finite_rows.all() else int(np.argmin(finite_rows)),
        "same_bytes": subject.astype(np.float64).tobytes() == reference.astype(np.float64).tobytes(),
    }
    if finite_rows.all() and observation["reference_finite"]:
        values = _row_values(params["metric"], subject, reference)
        worst = int(values.argmin() if params["metric"] == "cosine" else values.argmax())
        observation |= {"worst": float(values[worst]), "worst_row": worst, "rows_differing": int((values > 0).sum())}
    return observation


def _bound(params: JsonRecord) -> str:
    metric = str(params["metric"]).replace("_", " ")
    if params["metric"] == "bit_equal":
        return "every row bit-equal"
    limit = f"≥ {params['min']:g}" if params["metric"] == "cosine" else f"≤ {params['max']:g}"
    return f"{metric} {limit} in every row"


def judge(observation: JsonRecord, params: JsonRecord, min_observations: int) -> Judgement:
    """One row out of bounds, another shape, or a value that is not finite falsifies the claim."""
    bound, metric = _bound(params), params["metric"]
    ended = f"run ended: {observation['cause']}, exit code {observation['returncode']}"
    if not observation["subject_source"] or not observation["reference_source"]:
        return inconclusive("run incomplete", ended, bound)
    if observation["subject_source"] == observation["reference_source"]:
        return inconclusive("self comparison", f"both from {observation['subject_source']}", bound)
    if observation["subject_shape"] != observation["reference_shape"]:
        shapes = f"shape {observation['subject_shape']} for {observation['reference_shape']}"
        return Judgement.falsified(shapes, bound, shapes)
    if not observation["rows"]:
        return inconclusive("too few observations", "no rows", bound)
    if not observation["reference_finite"]:
        return inconclusive("reference not finite", "the reference holds NaN or infinity", bound)
    if observation["first_bad_row"] is not None:
        return Judgement.falsified("not finite", bound, f"row {observation['first_bad_row']} holds NaN or infinity")
    worst, row = float(observation["worst"]), observation["worst_row"]
    label = metric.replace("_", " ")
    if metric == "bit_equal":
        differing = observation["rows_differing"]
        measured = f"{differing} of {observation['rows']} rows differ"
        failed, margin = differing > 0, None
        counterexample = f"row {row} differs from {observation['reference_source']}"
    else:
        measured = f"worst {label} {worst:.{6 if metric == 'cosine' else 3}g} over {observation['rows']} rows"
        failed = worst < params["min"] if metric == "cosine" else worst > params["max"]
        margin = None if metric == "cosine" or not params["max"] else worst / params["max"]
        counterexample = f"row {row}: {label} {worst:.6g} against {observation['reference_source']}"
    if failed:
        return Judgement.falsified(measured, bound, counterexample, margin)
    if observation["rows"] < min_observations:
        return inconclusive("too few observations", measured, bound)
    if observation["reference_distinct_values"] < 2 and metric != "max_abs":
        return inconclusive("constant", measured, bound)
    # Two different float programs never agree to the last bit everywhere; if they do, one was copied from the other.
    if metric in ("relative_frobenius", "cosine") and observation["same_bytes"]:
        return inconclusive("self comparison", measured, bound)
    return Judgement.corroborated(measured, bound, margin)


def mutate(observation: JsonRecord, params: JsonRecord, min_observations: int) -> list[Mutation]:
    """Move the worst row just out of bounds; compare with itself, a constant, another shape, too few rows or none."""
    worst: dict[str, dict[str, float]] = {
        "cosine": {"worst": just_under(params["min"])} if "min" in params else {},
        "bit_equal": {"worst": 1.0, "rows_differing": 1},
    }
    mutations: list[Mutation] = [
        ("one row just out of bounds", worst.get(params["metric"]) or {"worst": just_over(params["max"])}),
        ("compared with itself", {"reference_source": observation["subject_source"]}),
        ("no source named", {"subject_source": None}),
        ("another shape", {"subject_shape": [*observation["reference_shape"], 1]}),
        ("no rows", {"rows": 0}),
        ("one row too few", {"rows": min_observations - 1}),
        ("reference not finite", {"reference_finite": False}),
        ("a row that is not finite", {"first_bad_row": 0}),
    ]
    if params["metric"] != "max_abs":
        mutations.append(("a constant reference", {"reference_distinct_values": 1}))
    if params["metric"] in ("relative_frobenius", "cosine"):
        mutations.append(("the reference's own bytes", {"same_bytes": True}))
    return [(name, {**observation, **changed}) for name, changed in mutations]
