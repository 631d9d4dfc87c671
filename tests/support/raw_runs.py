"""Write raw evidence by hand, so that a check can be shown every way in which evidence is thin, wrong or missing."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from q4kd.harness.records.raw_run import RawRun
from q4kd.harness.records.store import DirectoryStore

ENDING = {
    "returncode": 0, "signal": None, "pid": 7, "boot_id": "b", "boot_id_end": "b", "start_t": 0.0, "end_t": 10.0,
    "wall_s": 10.0, "cause": "exited", "cause_evidence": {},
}  # fmt: skip


def event(name: str, t: float = 0.0, **fields: Any) -> dict[str, Any]:
    return {"v": 1, "event": name, "t": t, "unix": t, **fields}


def samples(*points: tuple[float, float], **fields: Any) -> list[dict[str, Any]]:
    return [{"t": t, "rss": rss, "pid": 7, **fields} for t, rss in points]


def write_run(
    root: Path,
    name: str = "exp",
    *,
    events: list[dict[str, Any]] | None = None,
    memory: list[dict[str, Any]] | None = None,
    stdout: str = "",
    ending: dict[str, Any] | None = None,
    facts: dict[str, Any] | None = None,
    arrays: dict[str, dict[str, Any]] | None = None,
    fault: str | None = None,
    argv: list[str] | None = None,
) -> RawRun:
    folder = root / "runs" / name
    (folder / "arrays").mkdir(parents=True)
    (folder / "argv.json").write_text(json.dumps({"argv": argv or [], "fault": fault, "cwd": "run"}))
    (folder / "stdout.log").write_text(stdout)
    (folder / "stderr.log").write_text("")
    for file, lines in (("events.jsonl", events), ("memory.jsonl", memory)):
        (folder / file).write_text("".join(json.dumps(line) + "\n" for line in lines or []))
    (folder / "exit.json").write_text(json.dumps(ENDING | (ending or {})))
    (folder / "facts.json").write_text(json.dumps(facts or {}))
    for array, values in (arrays or {}).items():
        np.savez(folder / "arrays" / f"{array}.npz", **values)
    return RawRun(DirectoryStore(root), name)


KILLED = {"returncode": None, "signal": 9, "cause": "killed_cause_unknown"}
