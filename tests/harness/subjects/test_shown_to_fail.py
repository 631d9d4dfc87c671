"""A check that is reverted to "always corroborated" must turn the suite red, by level 1 alone and by level 2 alone."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from good_runs import CASES, bad_runs, claim_of, good_runs

from q4kd.harness import session as sessions
from q4kd.harness.bundle.writer import open_bundle, pack_bytes
from q4kd.harness.checks import CHECKS
from q4kd.harness.checks.judgement import Judgement
from q4kd.harness.claims.contract import load_contracts
from q4kd.harness.claims.plan import make_plan
from q4kd.harness.claims.profile import load_profile
from q4kd.harness.judging.digests import parts_digest, record_parts
from q4kd.harness.judging.kill_records import KillRecord
from q4kd.harness.judging.kills import Kills, KillStore, judge_faulted
from q4kd.harness.judging.results import Finding, KillOutcome, KillStatus
from q4kd.harness.records.raw_run import RawRun, read_runs, run_names, runs_of
from q4kd.harness.records.store import DirectoryStore, TarStore
from q4kd.harness.runs.cores import Cores
from q4kd.harness.runs.experiment import EXPERIMENTS, Arm, Experiment
from q4kd.harness.runs.faults import _FAULTS, Fault, all_faults
from q4kd.harness.runs.user_inputs import GivenFiles
from q4kd.harness.session import Session

FAULT = Fault("planted", "stands for the recorded fault", "loop", ("json:dumps",), lambda: None)
WORK = {"flops": 1.0e9, "bytes": 1.0e6}


def always(*_: Any) -> Judgement:
    return Judgement(verdict="corroborated", measured="as claimed", bound="as claimed")


def experiment_of(check: str) -> str:
    return f"exp-{check.replace('_', '-')}"


def entry(check: str) -> dict[str, Any]:
    params, least, _, _ = CASES[check]
    falsifier = {"check": check, "experiment": experiment_of(check), "params": params, "min_observations": least}
    if check == "latency":
        falsifier["work"] = WORK
    if check == "log_absent":  # refused alone
        falsifier["also"] = [{"check": "table", "params": CASES["table"][0]}]
    falsifier["sabotage"] = ["planted"]
    return {"id": f"FT-{check}", "rule": "r", "prediction": "p", "if_fails": "f", "falsifier": falsifier}


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[int, dict[str, Finding]]]:
    """Return a falsification over recorded runs, one claim for each check, every fault caught when it was recorded."""
    monkeypatch.setattr("os.fsync", lambda _: None)
    folder, bundle, kills = tmp_path / "contracts", tmp_path / "bundle", Kills(tmp_path / "kills")
    folder.mkdir()
    entries = [entry(check) for check in CASES]
    text = yaml.safe_dump({"metadata": {"status": "active"}, "falsification_tests": entries}, sort_keys=False)
    (folder / "meta.yaml").write_text(text)
    all_faults()
    monkeypatch.setitem(_FAULTS, FAULT.name, FAULT)
    assert len(EXPERIMENTS) > 0
    for check in CASES:
        name = experiment_of(check)
        good_runs(bundle, check, name, **(CASES["table"][2] if check == "log_absent" else {}))
        arms = [run.partition(".")[2] or None for run in run_names(DirectoryStore(bundle)) if run.startswith(name)]
        arms = [arm for arm in arms if arm] or [None]
        experiment = Experiment(name, "recorded", (), tuple(Arm(arm, lambda _: []) for arm in arms))
        monkeypatch.setitem(EXPERIMENTS._known, name, experiment)
        monkeypatch.setitem(EXPERIMENTS._modules, name, __name__)
    contracts = load_contracts(folder)
    for claim in contracts[0].claims:
        assert claim.falsifier is not None
        check, name = claim.falsifier.check, claim.falsifier.experiment
        faulted = tmp_path / "faulted" / check
        bad_runs(faulted, check, name, **(CASES["table"][2] if check == "log_absent" else {}))
        identity = {"contract": claim.contract, "id": claim.id, "fault": FAULT.name, "experiment": name}
        parts = record_parts(claim, FAULT, name, "cpu", "cpu")
        record = KillRecord(**identity, raw=f"planted--{name}.tar.gz", parts=parts)
        kills.at("cpu").add(parts_digest(parts), record, pack_bytes(faulted))

    plan = make_plan(contracts, load_profile("cpu", folder), None)

    def falsify() -> tuple[int, dict[str, Finding]]:
        runs = read_runs(DirectoryStore(bundle))
        runner = SimpleNamespace(run=lambda name, timeout_s=None: runs_of(name, runs))
        runner.inputs, runner.cores = SimpleNamespace(digests=dict, given=GivenFiles()), Cores(1)
        open_bundle(bundle, folder, "cpu", plan, {})
        monkeypatch.setattr(sessions, "close_bundle", lambda _: None)
        session = Session(folder, "cpu", contracts, plan, bundle, kills, runner, True, False)  # type: ignore[arg-type]
        for claim in contracts[0].claims:
            session.evaluate(claim)
        code = session.finish()
        assert session.findings is not None
        return code, {row.id.removeprefix("FT-"): row for row in session.findings.rows}

    return falsify


def test_the_recorded_falsification_is_green(recorded: Callable[[], tuple[int, dict[str, Finding]]]) -> None:
    code, rows = recorded()
    assert {check: row.reason for check, row in rows.items() if row.verdict != "corroborated"} == {}
    assert (code, set(rows)) == (0, set(CHECKS))
    assert all(row.mutations and row.mutations.tried > 10 and row.sabotage[0].caught for row in rows.values())


@pytest.mark.parametrize("level", ["both levels", "level 1", "level 2"])
@pytest.mark.parametrize("check", CASES)
def test_a_check_that_always_passes_turns_the_suite_red(
    recorded: Callable[[], tuple[int, dict[str, Finding]]], monkeypatch: pytest.MonkeyPatch, check: str, level: str
) -> None:
    monkeypatch.setattr(CHECKS[check], "judge", always)
    if level == "level 1":
        caught = KillOutcome.of("planted", KillStatus.CAUGHT, "x")
        monkeypatch.setattr(sessions, "rejudge", lambda *_: [caught])
    if level == "level 2":
        monkeypatch.setattr(sessions, "apply_mutation_rule", lambda *given: given[-1])
    code, rows = recorded()
    assert code == 2
    unsure = {name for name, row in rows.items() if row.verdict != "corroborated"}
    # Its second check is not what catches the fault of log_absent.
    assert unsure == ({check, "log_absent"} if check == "table" and level != "level 2" else {check})
    assert (rows[check].verdict, rows[check].reason) == ("inconclusive", "not shown to fail")
    if level != "level 2":
        mutations = rows[check].mutations
        assert mutations is not None and any(name.startswith(f"{check}: ") for name in mutations.missed)
        assert f"not shown to fail: not noticed: {mutations.missed[0]}" == rows[check].message
    if level != "level 1":
        assert rows[check].sabotage[0].status is KillStatus.MISSED


@pytest.mark.parametrize("check", CASES)
def test_a_recorded_fault_is_caught_by_the_check_and_by_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: str
) -> None:
    runs: Mapping[str, RawRun] = bad_runs(tmp_path, check, "exp")
    arms = tuple(Arm(name.partition(".")[2] or None, lambda _: []) for name in runs)
    monkeypatch.setitem(EXPERIMENTS._known, "exp", Experiment("exp", "recorded", (), arms))
    assert judge_faulted(claim_of(check), FAULT, "cpu", runs).caught
    monkeypatch.setattr(CHECKS[check], "judge", always)
    assert not judge_faulted(claim_of(check), FAULT, "cpu", runs).caught


def test_every_kill_record_that_is_shipped_notices_checks_that_always_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the records' age: a sabotaged run is never counted as caught by checks that see nothing."""
    import q4kd.evidence

    root = Path(next(iter(q4kd.evidence.__path__))) / "kills"
    claims = {claim.key: claim for contract in load_contracts(contracts_folder()) for claim in contract.claims}
    for check in CHECKS.values():
        monkeypatch.setattr(check, "judge", always)
    judged = 0
    for place in sorted(path for path in root.iterdir() if (path / "records.json").is_file()):
        store, archives = KillStore(place), {}
        for record in store.records.values():
            claim = claims.get(record.claim)
            if claim is None or claim.falsifier is None or record.fault not in all_faults():
                continue
            if record.raw not in archives:
                archives[record.raw] = read_runs(TarStore((place / record.raw).read_bytes()))
            fault = dataclasses.replace(all_faults()[record.fault])
            experiment = EXPERIMENTS.get(claim.falsifier.experiment)
            if experiment is not None:
                judged += 1
                assert not judge_faulted(claim, fault, record.profile or "cpu", archives[record.raw]).caught, record
    assert judged > 0


def contracts_folder() -> Path:
    from q4kd.harness.claims.folder import default_contracts_folder

    return default_contracts_folder()
