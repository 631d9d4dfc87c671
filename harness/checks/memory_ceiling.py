"""A ceiling on memory, seen from outside the program, over a phase that the samples must span."""

from collections.abc import Mapping
from itertools import pairwise

from q4kd.harness.checks.judgement import Judgement, Mutation, inconclusive, just_over, pick_run
from q4kd.harness.checks.params import arm_params
from q4kd.harness.checks.run_facts import baseline_memory, completion, describe_exit
from q4kd.harness.records.json_types import JsonRecord
from q4kd.harness.records.raw_run import RawRun

NAME = "memory_ceiling"
MAX_EDGE_S = 0.5
MAX_GAP_S = 1.0
PARAMS = arm_params(
    ["series", "phase", "ceiling"],
    series={
        "enum": ["rss_above_baseline", "rss", "gpu_bytes", "mem_available_drop"],
        "description": "Bytes: resident on the host, as such or above the baseline after the imports; on the GPU; or "
        "taken from the machine's MemAvailable since the imports, the only truth where CPU and GPU share memory.",
    },
    phase={
        "type": "array",
        "items": {"type": "string"},
        "minItems": 2,
        "maxItems": 2,
        "description": "Names of the events between which the ceiling holds.",
    },
    ceiling={
        "type": "object",
        "additionalProperties": False,
        "description": "bytes, or times x a measured fact, plus a constant.",
        "properties": {
            "bytes": {"type": "number", "exclusiveMinimum": 0},
            "times": {"type": "number", "exclusiveMinimum": 0},
            "of": {"enum": ["gguf_tensor_bytes", "gguf_file_bytes"]},
            "plus_bytes": {"type": "number", "minimum": 0, "default": 0},
        },
        "oneOf": [{"required": ["bytes"]}, {"required": ["times", "of"]}],
    },
)
DIRECTIONS = {"ceiling.bytes": "upper", "ceiling.times": "upper", "ceiling.plus_bytes": "upper"}
READS = ("events", "memory", "facts", "exit")


def extract(runs: Mapping[str, RawRun], params: JsonRecord, min_observations: int) -> JsonRecord:
    """Take the samples of the phase."""
    run = pick_run(runs, params.get("arm"))
    first, last = (run.event(name) for name in params["phase"])
    series = params["series"]
    field = {"gpu_bytes": "gpu_bytes", "mem_available_drop": "mem_available"}.get(series, "rss")
    relative = series in ("rss_above_baseline", "mem_available_drop")
    baseline = baseline_memory(run, field) if relative else 0.0
    observation: dict[str, object] = completion(run) | {"baseline": baseline, "samples": 0}
    fact = params["ceiling"].get("of")
    observation["of_bytes"] = run.facts.get(fact) if fact else None
    if first is None or last is None or baseline is None:
        return observation
    start, end = float(first["t"]), float(last["t"])
    inside = [
        sample
        for sample in run.memory
        if start - MAX_EDGE_S <= sample["t"] <= end + MAX_EDGE_S and sample.get(field) is not None
    ]
    if not inside:
        return observation
    times = [float(sample["t"]) for sample in inside]
    return observation | {
        "samples": len([time for time in times if start <= time <= end]),
        "peak": _peak([float(sample[field]) for sample in inside], baseline, field),
        "late_start_s": times[0] - start,
        "early_end_s": end - times[-1],
        "largest_gap_s": max((b - a for a, b in pairwise(times)), default=0.0),
    }


def _peak(values: list[float], baseline: float, field: str) -> float:
    return baseline - min(values) if field == "mem_available" else max(values) - baseline


def _ceiling(observation: JsonRecord, ceiling: JsonRecord) -> float | None:
    if "bytes" in ceiling:
        return float(ceiling["bytes"]) + float(ceiling.get("plus_bytes", 0))
    if not observation["of_bytes"]:
        return None
    return float(ceiling["times"]) * float(observation["of_bytes"]) + float(ceiling.get("plus_bytes", 0))


def judge(observation: JsonRecord, params: JsonRecord, min_observations: int) -> Judgement:
    """Any sample over the ceiling falsifies the claim; only samples that span the phase corroborate it."""
    limit = _ceiling(observation, params["ceiling"])
    bound = f"≤ {limit / 1e6:.1f} MB" if limit else "unknown: the fact it refers to was not measured"
    if limit is None:
        return inconclusive("evidence unreadable", "no ceiling", bound)
    if "peak" not in observation:
        reason = "phase not covered" if observation["completed"] else "run incomplete"
        return inconclusive(reason, describe_exit(observation), bound)
    peak = float(observation["peak"])
    measured = f"peak {peak / 1e6:.1f} MB over {observation['samples']} samples"
    if peak > limit:
        over = f"{peak / 1e6:.1f} MB resident ({params['series']}), {peak / limit:.2f} x the ceiling"
        return Judgement.falsified(measured, bound, over, peak / limit)
    if not observation["completed"]:
        return inconclusive("run incomplete", describe_exit(observation), bound)
    if observation["samples"] < min_observations:
        return inconclusive("too few observations", measured, bound)
    edges = max(observation["late_start_s"], observation["early_end_s"])
    if edges > MAX_EDGE_S or observation["largest_gap_s"] > MAX_GAP_S:
        return inconclusive("phase not covered", measured, bound)
    return Judgement.corroborated(measured, bound, peak / limit)


def mutate(observation: JsonRecord, params: JsonRecord, min_observations: int) -> list[Mutation]:
    """Raise the peak just over the ceiling; uncover the phase; leave too few samples or none; let the run not end."""
    limit = _ceiling(observation, params["ceiling"])
    mutations: list[Mutation] = [
        ("peak just over the ceiling", {"peak": just_over(limit if limit is not None else 0.0)}),
        ("no samples", {"samples": 0}),
        ("one sample too few", {"samples": min_observations - 1}),
        ("samples begin late", {"late_start_s": just_over(MAX_EDGE_S)}),
        ("samples end early", {"early_end_s": just_over(MAX_EDGE_S)}),
        ("a gap between samples", {"largest_gap_s": just_over(MAX_GAP_S)}),
        ("not completed", {"completed": False}),
    ]
    if "of" in params["ceiling"]:
        mutations.append(("the ceiling's fact was not measured", {"of_bytes": None}))
    unphased = {key: value for key, value in observation.items() if key != "peak"}
    return [*((name, {**observation, **changed}) for name, changed in mutations), ("no phase", unphased)]
