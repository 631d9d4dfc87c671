"""A small bundle with a check of its own, for the tests of everything that reads bundles."""

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from q4kd.harness.bundle import writer as bundle
from q4kd.harness.bundle.findings import assemble
from q4kd.harness.bundle.recheck import KillReplay
from q4kd.harness.checks import Judgement
from q4kd.harness.claims.contract import load_contracts
from q4kd.harness.claims.model import Claim
from q4kd.harness.claims.plan import make_plan
from q4kd.harness.claims.profile import find_extras, load_profile
from q4kd.harness.claims.waivers import Waiver
from q4kd.harness.judging.judge import JUDGE_VERSION, judge_claim
from q4kd.harness.judging.kills import apply_kill_rule
from q4kd.harness.judging.mutations import apply_mutation_rule
from q4kd.harness.judging.results import KillOutcome, KillStatus
from q4kd.harness.records.raw_run import read_runs, runs_of
from q4kd.harness.records.store import DirectoryStore
from q4kd.harness.runs.experiment import Arm, Experiment
from q4kd.harness.runs.faults import Fault
from q4kd.harness.session import close_bundle

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
PAIR = """\
  - id: DEMO-004
    rule: the peak stays low in both arms
    prediction: peak <= limit
    if_fails: look at the arms
    falsifier:
      check: peak
      experiment: pair
      params: {limit: 100.5}
      min_observations: 3
      sabotage: [ballast]
  - id: DEMO-005
    rule: the peak stays very low
    prediction: peak <= limit
    if_fails: it does not
    falsifier:
      check: peak
      experiment: pair
      params: {limit: 50}
      sabotage: [ballast]
"""
BOOT = "b"
CAUGHT = {"fault": "ballast", "caught": True, "verdict": "falsified", "record": "r1", "detail": "caught: 300.0 is over"}
EXPERIMENTS = {
    name: Experiment(name=name, title=name, needs=(), arms=tuple(Arm(arm, lambda _: []) for arm in arms))
    for name, arms in {"demo": (None,), "demo-gpu": (None,), "pair": ("a", "b")}.items()
}
BALLAST = Fault("ballast", "holds memory", "memory", (), lambda: None)


def _extract(runs: Any, params: Any, minimum: int) -> dict[str, Any]:
    rows = [row["rss"] for run in runs.values() for row in run.memory]
    taken = sum(run.facts.get("samples", 10**6) for run in runs.values())
    return {"peak": max(rows, default=0) / 3, "samples": len(rows), "taken": taken}


def _judge(observation: Any, params: Any, minimum: int) -> Judgement:
    measured, bound = f"{observation['peak']:.1f}", f"<= {params['limit']}"
    if observation["samples"] < max(minimum, observation["taken"]):
        return Judgement(verdict="inconclusive", reason="too few observations", measured=measured, bound=bound)
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
        "properties": {
            "limit": {"type": "number"},
            "floor": {"type": "number", "default": 0},
            "unit": {"type": "string"},
        },
    },
    DIRECTIONS={"limit": "upper", "floor": "lower"},
    extract=_extract,
    READS=("memory", "facts"),
    judge=_judge,
    mutate=lambda observation, params, minimum: [
        ("peak just over the limit", {**observation, "peak": math.nextafter(params["limit"], math.inf)}),
        ("too few samples", {**observation, "samples": minimum - 1}),
    ],
)


def register(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the check ``peak`` beside two names of real ones, and the experiments and the fault where they are sought."""
    checks = {"peak": PEAK, "log_absent": PEAK, "log_present": PEAK}
    monkeypatch.setattr("q4kd.harness.checks.CHECKS", checks)
    monkeypatch.setattr("q4kd.harness.judging.judge.CHECKS", checks)
    monkeypatch.setattr("q4kd.harness.judging.mutations.CHECKS", checks)
    monkeypatch.setattr("os.fsync", lambda _: None)  # these bundles need not outlive a power cut
    monkeypatch.setattr("q4kd.harness.runs.experiment.EXPERIMENTS", EXPERIMENTS)
    monkeypatch.setattr("q4kd.harness.runs.faults.get_fault", {"ballast": BALLAST}.__getitem__)


def write_run(folder: Path, *, peak: int = 300, fault: str | None = None, samples: int = 40) -> None:
    """Write the raw files of one run whose check measures ``peak / 3``."""
    (folder / "arrays").mkdir(parents=True)
    files = {"argv.json": {"argv": ["q4kd", "inspect"], "fault": fault, "cwd": "run"}}
    files["facts.json"] = {"samples": samples}
    files["exit.json"] = {"returncode": 0, "cause": "exited", "pid": 7, "boot_id": BOOT, "boot_id_end": BOOT}
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value))
    (folder / "stdout.log").write_text("done\n")
    (folder / "stderr.log").write_text("")
    events = [{"v": 1, "event": "imports_done", "t": 100.4}, {"v": 1, "event": "done", "t": 102.0}]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    rows = [
        {"t": 100 + i / 20, "pid": 7, "rss": round(peak * math.sin((i + 1) / samples * math.pi / 2))}
        for i in range(samples)
    ]
    (folder / "memory.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_kills(folder: Path, claims: list[Claim], samples: int) -> dict[str, str]:
    """Write a kill record and its archive for every claim into ``folder``; return claim key → record key."""
    records: dict[str, Any] = {}
    for number, claim in enumerate(claims, 1):
        assert claim.falsifier is not None
        experiment = EXPERIMENTS[claim.falsifier.experiment]
        faulted = folder.parent.parent / f"faulted-{experiment.name}"
        raw = f"ballast--{experiment.name}.tar.gz"
        if not faulted.exists():
            for arm in experiment.arms:
                write_run(faulted / "runs" / experiment.run_name(arm), peak=900, fault="ballast", samples=samples)
            (folder / raw).write_bytes(bundle.pack_bytes(faulted))
        record = {"contract": claim.contract, "id": claim.id, "fault": "ballast", "experiment": experiment.name}
        record |= {"raw": raw, "raw_sha256": hashlib.sha256((folder / raw).read_bytes()).hexdigest()}
        records[f"r{number}"] = record
    (folder / "kills.json").write_text(json.dumps({"format": "q4kd-kills/1", "records": records}))
    return {f"{record['contract']}::{record['id']}": key for key, record in records.items()}


def build(
    root: Path,
    *,
    text: str = CONTRACT,
    peak: int = 300,
    select: str | None = None,
    samples: int = 40,
    waivers: tuple[Waiver, ...] = (),
) -> Path:
    """Write contracts to ``root/contracts`` and a sealed bundle to ``root/bundle``; return the bundle."""
    contracts = root / "contracts"
    contracts.mkdir(parents=True)
    (contracts / "demo-v1.yaml").write_text(text)
    loaded = load_contracts(contracts)
    plan = make_plan(loaded, load_profile("cpu", contracts), select, waivers=waivers, extras=find_extras(given=()))
    folder = root / "bundle"
    bundle.open_bundle(folder, contracts, "cpu", plan, {"teacher.gguf": {"sha256": "ab" * 32, "bytes": 5}})
    environment = json.loads((folder / "environment.json").read_text())
    (folder / "environment.json").write_text(json.dumps(environment | {"boot_id": BOOT}))
    judged = [
        claim
        for claim in loaded[0].claims
        if claim.falsifier and (entry := plan.entry(claim.key)) is not None and entry.scope == "required"
    ]
    for experiment in dict.fromkeys(claim.falsifier.experiment for claim in judged if claim.falsifier):
        for arm in EXPERIMENTS[experiment].arms:
            write_run(folder / "runs" / EXPERIMENTS[experiment].run_name(arm), peak=peak, samples=samples)
    keys = write_kills(folder / "sabotage", judged, samples)
    store = DirectoryStore(folder)
    runs, replay = read_runs(store), KillReplay(store)
    results = {}
    for claim in judged:
        assert claim.falsifier is not None
        mine = runs_of(claim.falsifier.experiment, runs)
        filed = KillOutcome(fault="ballast", status=KillStatus.CAUGHT, detail=None, record=keys[claim.key])
        kills = replay.judge_again(claim, "cpu", [filed])
        result = apply_mutation_rule(claim, mine, "cpu", judge_claim(claim, mine, "cpu"))
        results[claim.key] = replace(apply_kill_rule(result, kills), seconds=1.25)
    created = "2026-11-23T12:00:00+00:00"
    bundle.write_findings(folder, assemble(plan, loaded, results, judge_version=JUDGE_VERSION, created=created))
    close_bundle(folder)
    return folder
