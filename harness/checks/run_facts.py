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


def baseline_rss(run: RawRun) -> float | None:
    """Return the resident bytes last sampled before the imports were done (None when there is no such sample)."""
    marker = run.event("imports_done")
    if marker is None:
        return None
    before = [float(sample["rss"]) for sample in run.memory if sample["t"] <= marker["t"]]
    return before[-1] if before else None
