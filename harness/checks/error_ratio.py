"""One program rounds no worse than another: their errors against the same exact reference, position by position.

Two arms each leave ``arrays/<array>.npz`` with ``subject`` (what the program computed) and ``reference`` (the exact
values, the same in both), ``[sequences, positions, columns]``; ``facts.json`` names the sources under ``comparators``.
A position's error is the root mean square, over sequences, of ``‖subject - reference‖ / ‖reference‖``: rounding moves a
single sample of two equally precise programs apart by a factor of 1.5 and more. The position with the worst ratio
counts.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from q4kd.harness.checks.judgement import Judgement, Mutation, inconclusive, just_over, pick_run
from q4kd.harness.checks.params import closed
from q4kd.harness.records.json_types import JsonRecord
from q4kd.harness.records.raw_run import RawRun

NAME = "error_ratio"
_ARM = {"type": "string", "pattern": "^[a-z0-9_-]{1,40}$"}
PARAMS = closed(
    ["subject", "peer", "array", "max", "peer_max", "min_sequences"],
    subject={**_ARM, "description": "Arm of the program under test."},
    peer={**_ARM, "description": "Arm of the program it is held against, of the same precision."},
    array={**_ARM, "description": "Name of the npz in the arrays/ of both arms."},
    max={"type": "number", "exclusiveMinimum": 0, "description": "Largest ratio of errors at any position."},
    peer_max={
        "type": "number",
        "exclusiveMinimum": 0,
        "description": "Largest error of the peer at any position; a worse one computes something else.",
    },
    min_sequences={"type": "integer", "minimum": 2, "description": "Sequences behind each position's error."},
)
DIRECTIONS = {"max": "upper", "peer_max": "upper", "min_sequences": "lower"}
READS = ("facts", "arrays", "exit")
# A program this many times more exact than its peer computes in another precision: bfloat16 has 16 bits less than
# float32, and nothing between an eighth and one was seen between two programs in bfloat16.
_OTHER_PRECISION = 8.0


def _sides(runs: Mapping[str, RawRun], params: JsonRecord) -> dict[str, RawRun]:
    return {side: pick_run(runs, params[side]) for side in ("subject", "peer")}


def extract(runs: Mapping[str, RawRun], params: JsonRecord, min_observations: int) -> JsonRecord:
    """Reduce both arms to their errors by position; ``shapes`` is None when a run left nothing to compare."""
    sides = _sides(runs, params)
    sources = {side: run.facts.get("comparators", {}).get(params["array"], {}) for side, run in sides.items()}
    observation: dict[str, object] = {
        "ended": {side: run.ending for side, run in sides.items()},
        "sources": {side: source.get("subject") for side, source in sources.items()},
        "reference_sources": [source.get("reference") for source in sources.values()],
        "shapes": None,
    }
    if not all(sources.values()):
        return observation
    arrays = {side: run.array(params["array"]) for side, run in sides.items()}
    mine, theirs = arrays["subject"]["subject"], arrays["peer"]["subject"]
    reference, other_reference = arrays["subject"]["reference"], arrays["peer"]["reference"]
    observation |= {
        "shapes": [list(array.shape) for array in (mine, theirs, reference)],
        "same_reference": reference.tobytes() == other_reference.tobytes(),
        "same_bytes": mine.tobytes() == theirs.tobytes(),
        "sequences": 0,
        "positions": 0,
    }
    if reference.ndim != 3 or not reference.size or not mine.shape == theirs.shape == reference.shape:
        return observation
    finite = np.isfinite(mine).all((0, 2))
    observation |= {
        "sequences": reference.shape[0],
        "positions": reference.shape[1],
        "distinct_values": int(np.unique(reference).size),
        "exact_finite": bool(np.isfinite(reference).all() and np.isfinite(theirs).all()),
        "first_bad_position": None if finite.all() else int(np.argmin(finite)),
    }
    if finite.all() and observation["exact_finite"]:
        observation |= _compare(_errors(mine, reference), _errors(theirs, reference))
    return observation


def _errors(found: NDArray[np.generic], exact: NDArray[np.generic]) -> NDArray[np.float64]:
    """Return the root mean square over sequences of the relative error at each position, float64 ``[positions]``."""
    wide = exact.astype(np.float64)
    norms = np.maximum(np.linalg.norm(wide, axis=-1), np.finfo(np.float64).tiny)
    relative = np.linalg.norm(found.astype(np.float64) - wide, axis=-1) / norms
    result: NDArray[np.float64] = np.sqrt((relative**2).mean(0))
    return result


def _compare(mine: NDArray[np.float64], theirs: NDArray[np.float64]) -> dict[str, object]:
    ratios = mine / np.maximum(theirs, np.finfo(np.float64).tiny)
    worst = int(ratios.argmax())
    return {
        "worst_ratio": float(ratios[worst]),
        "worst_position": worst,
        "median_ratio": float(np.median(ratios)),
        "rms": float(np.sqrt((mine**2).mean())),
        "peer_rms": float(np.sqrt((theirs**2).mean())),
        "peer_worst": float(theirs.max()),
        "peer_least": float(theirs.min()),
    }


def judge(observation: JsonRecord, params: JsonRecord, min_observations: int) -> Judgement:
    """One position whose error is too many times the peer's, or a value that is not finite, falsifies the claim."""
    bound = f"error at every position ≤ {params['max']:g} x the peer's"
    if observation["shapes"] is None:
        ended = "; ".join(
            f"{side} ended: {end['cause']}, exit code {end['returncode']}" for side, end in observation["ended"].items()
        )
        return inconclusive("run incomplete", ended, bound)
    names = [*observation["sources"].values(), *set(observation["reference_sources"])]
    if None in names or len(names) != 3 or len(set(names)) != 3:
        return inconclusive("self comparison", f"sources {', '.join(map(str, names))}", bound)
    if not observation["same_reference"]:
        return inconclusive("unequal budget", "the arms were held against different references", bound)
    if observation["same_bytes"]:
        return inconclusive("self comparison", "subject and peer gave the same bytes", bound)
    mine, theirs, exact = observation["shapes"]
    if mine != exact and theirs == exact:
        shapes = f"shape {mine} for {exact}"
        return Judgement.falsified(shapes, bound, shapes)
    if not observation["positions"]:
        return inconclusive("too few observations", f"shapes {mine}, {theirs}, {exact}", bound)
    if not observation["exact_finite"]:
        return inconclusive("reference not finite", "the reference or the peer holds NaN or infinity", bound)
    if (bad := observation["first_bad_position"]) is not None:
        return Judgement.falsified("not finite", bound, f"position {bad} holds NaN or infinity")
    return _judge_errors(observation, params, min_observations, bound)


def _judge_errors(observation: JsonRecord, params: JsonRecord, min_observations: int, bound: str) -> Judgement:
    worst, rms, peer = float(observation["worst_ratio"]), float(observation["rms"]), float(observation["peer_rms"])
    measured = (
        f"worst {worst:.3g} x, median {observation['median_ratio']:.3g} x "
        f"(rms {rms:.3g} to {peer:.3g}) over {observation['positions']} positions"
    )
    if observation["positions"] < min_observations or observation["sequences"] < params["min_sequences"]:
        return inconclusive("too few observations", f"{measured} of {observation['sequences']} sequences", bound)
    if observation["distinct_values"] < 2:
        return inconclusive("constant", measured, bound)
    if observation["peer_least"] <= 0:
        return inconclusive("self comparison", f"{measured}: the peer has no error at some position", bound)
    if observation["peer_worst"] > params["peer_max"]:
        wrong = f"the peer's error is {observation['peer_worst']:.3g} at one position, over {params['peer_max']:g}"
        return inconclusive("unequal budget", f"{measured}: {wrong}", bound)
    if rms * _OTHER_PRECISION < peer:
        return inconclusive("unequal budget", f"{measured}: the subject computes in another precision", bound)
    margin = worst / params["max"]
    if worst > params["max"]:
        at = f"position {observation['worst_position']}: {worst:.4g} x the error of the peer"
        return Judgement.falsified(measured, bound, at, margin)
    return Judgement.corroborated(measured, bound, margin)


def mutate(observation: JsonRecord, params: JsonRecord, min_observations: int) -> list[Mutation]:
    """Move the worst ratio just over; a peer that is wrong, exact or the subject itself; too little of anything."""
    subject, peer = observation["sources"]["subject"], observation["sources"]["peer"]
    shape = observation["shapes"][2]
    mutations: list[Mutation] = [
        ("worst ratio just over", {"worst_ratio": just_over(params["max"])}),
        ("one position too few", {"positions": min_observations - 1}),
        ("no positions", {"positions": 0}),
        ("one sequence too few", {"sequences": params["min_sequences"] - 1}),
        ("a peer just over its own bound", {"peer_worst": just_over(params["peer_max"])}),
        ("a peer without error", {"peer_least": 0.0}),
        ("a subject in another precision", {"rms": observation["peer_rms"] / (_OTHER_PRECISION * 2)}),
        ("a constant reference", {"distinct_values": 1}),
        ("compared with itself", {"sources": {"subject": subject, "peer": subject}}),
        ("the peer's own bytes", {"same_bytes": True}),
        ("held against the peer", {"reference_sources": [peer, peer]}),
        ("no source named", {"sources": {"subject": None, "peer": peer}}),
        ("two references by name", {"reference_sources": ["one", "another"]}),
        ("two references by content", {"same_reference": False}),
        ("another shape", {"shapes": [[*shape, 1], shape, shape]}),
        ("a value that is not finite", {"first_bad_position": 0}),
        ("a peer that is not finite", {"exact_finite": False}),
        ("nothing left by a run", {"shapes": None}),
    ]
    return [(name, {**observation, **changed}) for name, changed in mutations]
