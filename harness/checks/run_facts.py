"""What several checks take from a run: how it ended, and the memory it had after its imports."""

from q4kd.harness.records.json_types import JsonRecord
from q4kd.harness.records.raw_run import RawRun


def completion(run: RawRun) -> dict[str, object]:
    """Return ``{"completed", "cause", "returncode"}``; completed means exit code 0 and a ``done`` event."""
    normal = run.ending == {"cause": "exited", "returncode": 0}
    return {"completed": normal and run.event("done") is not None, **run.ending}


def describe_exit(ending: JsonRecord) -> str:
    """Say how a run ended, in words."""
    return f"ended: {str(ending['cause']).replace('_', ' ')}, exit code {ending['returncode']}"


def baseline_memory(run: RawRun, field: str = "rss") -> float | None:
    """Return the bytes of a sample's field last seen before the imports were done (None when there is no such sample).

    ``rss`` is what the process held, ``mem_available`` what the machine had left. A run of the trainer imports
    transformers later than the rest and says so: 115 MB in one environment, 310 MB in another, which are not the run's.
    """
    marker = run.event("imports_done")
    if marker is None:
        return None
    phases = [event for event in run.events if event["event"] == "phase"]
    late = [event for event in phases if event.get("what") == "transformers imported"]
    ended = max(float(event["t"]) for event in (marker, *late))
    samples = [sample for sample in run.memory if sample["t"] <= ended]
    # Every sample must have the process's bytes; the machine's are absent where it does not state them.
    before = [float(sample[field]) for sample in samples if field == "rss" or sample.get(field) is not None]
    return before[-1] if before else None
