"""A small bundle with a check of its own, for the tests of everything that reads bundles."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from q4kd.harness import bundle
from q4kd.harness.checks import Judgement
from q4kd.harness.contract import load_contracts
from q4kd.harness.findings import assemble
from q4kd.harness.judge import JUDGE_VERSION, judge_claim
from q4kd.harness.plan import make_plan
from q4kd.harness.profile import load_profile
from q4kd.harness.raw import DirectoryStore, read_runs, runs_of

CONTRACT = """\
metadata:
  version: 1.0.0
  description: a demonstration
falsification_tests:
  - id: DEMO-001
    rule: the peak stays low
    prediction: peak <= limit
    if_fails: look at the <b>allocator</b>
    falsifier:
      check: peak
      experiment: demo
      params: {limit: 100.5}
      min_observations: 3
      sabotage: [ballast]
  - id: DEMO-002
    rule: the same on the GPU
    prediction: peak <= limit
    if_fails: look at the allocator
    falsifier:
      check: peak
      experiment: demo-gpu
      params: {limit: 100}
      needs: [cuda]
      sabotage: [ballast]
"""
PROSE = """\
  - id: DEMO-003
    rule: prose only
    prediction: nobody checks this
"""
CAUGHT = {"fault": "ballast", "caught": True, "verdict": "falsified", "record": "r1", "detail": "caught: 900"}


def _extract(runs: Any, params: Any, minimum: int) -> dict[str, Any]:
    run = next(iter(runs.values()))
    return {"peak": max(row["rss"] for row in run.memory) / 3, "samples": len(run.memory)}


def _judge(observation: Any, params: Any, minimum: int) -> Judgement:
    measured, bound = f"{observation['peak']:.1f}", f"<= {params['limit']}"
    if observation["peak"] > params["limit"]:
        over = f"{measured} is over"
        return Judgement(verdict="falsified", measured=measured, bound=bound, counterexample=over)
    return Judgement(verdict="corroborated", measured=measured, bound=bound)


PEAK = SimpleNamespace(
    NAME="peak",
    PARAMS={
        "type": "object",
        "additionalProperties": False,
        "required": ["limit"],
        "properties": {"limit": {"type": "number"}, "floor": {"type": "number"}, "unit": {"type": "string"}},
    },
    DIRECTIONS={"limit": "upper", "floor": "lower"},
    extract=_extract,
    judge=_judge,
)


def register(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the check ``peak`` beside two names of real ones, where the loader and the judge look."""
    checks = {"peak": PEAK, "log_absent": PEAK, "log_present": PEAK}
    monkeypatch.setattr("q4kd.harness.checks.CHECKS", checks)
    monkeypatch.setattr("q4kd.harness.judge.CHECKS", checks)


def write_run(folder: Path, *, peak: int = 300, fault: str | None = None, samples: int = 40) -> None:
    """Write the raw files of one run whose check measures ``peak / 3``."""
    (folder / "arrays").mkdir(parents=True)
    files = {"argv.json": {"argv": ["q4kd", "inspect"], "fault": fault, "cwd": "run"}, "facts.json": {}}
    files["exit.json"] = {"returncode": 0, "cause": "exited", "pid": 7}
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value))
    (folder / "stdout.log").write_text("done\n")
    (folder / "stderr.log").write_text("")
    events = [{"v": 1, "event": "imports_done", "t": 100.4}, {"v": 1, "event": "done", "t": 102.0}]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    rows = [{"t": 100 + i / 20, "rss": round(peak * math.sin((i + 1) / samples * math.pi / 2))} for i in range(samples)]
    (folder / "memory.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def rejudge(claim: Any, profile: str, store: Any, recorded: Any) -> list[dict[str, Any]]:
    """Stand in for the kill records: the one fault was caught."""
    return [dict(CAUGHT)]


def build(root: Path, *, text: str = CONTRACT, peak: int = 300, select: str | None = None) -> Path:
    """Write contracts to ``root/contracts`` and a sealed bundle to ``root/bundle``; return the bundle."""
    contracts = root / "contracts"
    contracts.mkdir(parents=True)
    (contracts / "demo-v1.yaml").write_text(text)
    loaded = load_contracts(contracts)
    plan = make_plan(loaded, load_profile("cpu", contracts), select)
    folder = root / "bundle"
    bundle.open_bundle(folder, contracts, "cpu", plan, {"teacher.gguf": {"sha256": "ab" * 32, "bytes": 5}})
    write_run(folder / "runs" / "demo", peak=peak)
    runs = read_runs(DirectoryStore(folder))
    results = {}
    for claim in loaded[0].claims:
        if claim.falsifier is not None and (mine := runs_of(claim.falsifier.experiment, runs)):
            judged = judge_claim(claim, mine, "cpu")
            results[claim.key] = {**judged, "runs": list(mine), "sabotage": [CAUGHT], "seconds": 1.25}
    created = "2026-11-23T12:00:00+00:00"
    bundle.write_findings(folder, assemble(plan, loaded, results, judge_version=JUDGE_VERSION, created=created))
    bundle.close(folder)
    return folder
