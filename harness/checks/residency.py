"""K-quant tensors stay packed: what the teacher says it holds, the file's own types, and the process seen from outside.

The teacher's account alone proves nothing: a fault may dequantise and keep silent. The supervisor's samples must agree.
"""

from collections.abc import Mapping
from functools import partial

from q4kd.harness.checks.judgement import Judgement, Mutation, inconclusive, just_over, pick_run
from q4kd.harness.checks.params import arm_params
from q4kd.harness.checks.run_facts import baseline_memory, completion, describe_exit
from q4kd.harness.records.json_types import JsonRecord
from q4kd.harness.records.raw_run import RawRun

NAME = "residency"
MAX_EDGE_S = 0.5
PARAMS = arm_params(
    ["max_dense_bytes", "max_ratio", "outside"],
    max_dense_bytes={"type": "integer", "minimum": 0, "description": "Decoded bytes of K-quant tensors allowed."},
    max_ratio={"type": "number", "exclusiveMinimum": 0, "description": "Resident bytes / tensor bytes of the file."},
    outside={
        "type": "object",
        "additionalProperties": False,
        "required": ["times", "plus_bytes"],
        "description": "The process may grow, after its imports, by times x tensor bytes + plus_bytes.",
        "properties": {
            "times": {"type": "number", "exclusiveMinimum": 0},
            "plus_bytes": {"type": "number", "minimum": 0},
            "until": {
                "type": "string",
                "pattern": "^[a-z_]{1,40}$",
                "description": "Event after which growth no longer counts; without it the end of the run.",
            },
        },
    },
)
DIRECTIONS = {"max_dense_bytes": "upper", "max_ratio": "upper", "outside.times": "upper", "outside.plus_bytes": "upper"}
READS = ("events", "memory", "facts", "exit")


def extract(runs: Mapping[str, RawRun], params: JsonRecord, min_observations: int) -> JsonRecord:
    """Put the teacher's account, the harness's reading of the file and the outside samples side by side."""
    run = pick_run(runs, params.get("arm"))
    ready, baseline = run.event("teacher_ready"), baseline_memory(run)
    after = [sample for sample in run.memory if ready and sample["t"] >= ready["t"]]
    # As a process ends, libraries touch pages of their own files: 100 MB of them in some runs, none in others.
    last = run.event(params["outside"].get("until", ""))
    after = [sample for sample in after if last is None or sample["t"] <= last["t"]]
    done = run.event("done")
    return completion(run) | {
        "resident_bytes": dict(ready["resident_bytes"]) if ready else None,
        "dense_bytes": ready["dense_bytes_of_quantised"] if ready else None,
        "scratch_bytes": ready["scratch_bytes"] if ready else None,
        "file_bytes_by_type": run.facts.get("gguf_bytes_by_type"),
        "tensor_bytes": run.facts.get("gguf_tensor_bytes"),
        "outside_growth": max(float(sample["rss"]) for sample in after) - baseline
        if after and baseline is not None
        else None,
        "late_start_s": float(after[0]["t"]) - float(ready["t"]) if after and ready else None,
        "early_end_s": float(done["t"]) - float(after[-1]["t"]) if after and done else None,
        "samples": len(after),
    }


def judge(observation: JsonRecord, params: JsonRecord, min_observations: int) -> Judgement:
    """Dense bytes, a type that is not held as in the file, or growth seen from outside falsify the claim."""
    tensor_bytes, held = observation["tensor_bytes"], observation["resident_bytes"]
    bound = (
        f"≤ {params['max_dense_bytes']} dense bytes, ≤ {params['max_ratio']} x the file's tensors, "
        f"growth ≤ {params['outside']['times']} x + {params['outside']['plus_bytes'] / 1e6:.0f} MB"
    )
    if not tensor_bytes or held is None:
        reason = "evidence unreadable" if observation["completed"] else "run incomplete"
        return inconclusive(reason, describe_exit(observation), bound)
    resident = sum(held.values())
    dense, growth = observation["dense_bytes"], observation["outside_growth"]
    measured = (
        f"{dense} dense bytes, {resident / tensor_bytes:.3f} x, growth {growth / 1e6:.1f} MB"
        if growth is not None
        else f"{dense} dense bytes, no outside sample"
    )
    refuted = partial(Judgement.falsified, measured, bound)
    if dense > params["max_dense_bytes"]:
        return refuted(f"{dense} bytes of K-quant tensors are held decoded")
    if resident > params["max_ratio"] * tensor_bytes:
        return refuted(f"{resident} bytes resident for {tensor_bytes} in the file", resident / tensor_bytes)
    for name, count in (observation["file_bytes_by_type"] or {}).items():
        if name.endswith("_K") and held.get(name, 0) != count:
            return refuted(f"{name}: {held.get(name, 0)} bytes held of {count} in the file")
    limit = params["outside"]["times"] * tensor_bytes + params["outside"]["plus_bytes"]
    if growth is not None and growth > limit:
        return refuted(
            f"the teacher reports {resident / 1e6:.1f} MB, but the process grew by {growth / 1e6:.1f} MB "
            f"(limit {limit / 1e6:.1f} MB)",
            growth / limit,
        )
    if resident < 0.98 * tensor_bytes:
        return inconclusive("accounting incomplete", measured, bound)
    if not observation["completed"]:
        return inconclusive("run incomplete", describe_exit(observation), bound)
    if growth is None or observation["samples"] < min_observations:
        return inconclusive("too few observations", measured, bound)
    if max(observation["late_start_s"], observation["early_end_s"]) > MAX_EDGE_S:
        return inconclusive("phase not covered", measured, bound)
    return Judgement.corroborated(measured, bound, growth / limit)


def mutate(observation: JsonRecord, params: JsonRecord, min_observations: int) -> list[Mutation]:
    """Hold one byte too many or too few of each kind; grow just over the limit; uncover the phase; do not end."""
    tensor_bytes, held = observation["tensor_bytes"], observation["resident_bytes"]
    over = int(params["max_ratio"] * tensor_bytes) + 1 - sum(held.values())
    limit = params["outside"]["times"] * tensor_bytes + params["outside"]["plus_bytes"]
    mutations: list[Mutation] = [
        ("one dense byte over the bound", {"dense_bytes": params["max_dense_bytes"] + 1}),
        ("one resident byte over the bound", {"resident_bytes": {**held, "F32": held.get("F32", 0) + over}}),
        ("growth just over the limit", {"outside_growth": just_over(limit)}),
        ("nothing held", {"resident_bytes": {}}),
        ("no account", {"resident_bytes": None}),
        ("the file was not measured", {"tensor_bytes": None}),
        ("no sample from outside", {"outside_growth": None, "samples": 0}),
        ("one sample too few", {"samples": min_observations - 1}),
        ("samples begin late", {"late_start_s": just_over(MAX_EDGE_S)}),
        ("samples end early", {"early_end_s": just_over(MAX_EDGE_S)}),
        ("not completed", {"completed": False}),
    ]
    for name in observation["file_bytes_by_type"] or {}:
        if name.endswith("_K"):
            fewer = {**held, name: held.get(name, 0) - 1}
            mutations.append((f"one byte of {name} less", {"resident_bytes": fewer}))
    return [(name, {**observation, **changed}) for name, changed in mutations]
