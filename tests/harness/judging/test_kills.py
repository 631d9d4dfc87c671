import dataclasses
import hashlib
import json
import lzma
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from edited_sources import edited
from fakeworld import plugin as world

from q4kd.harness import kill_matrix as matrix
from q4kd.harness.claims.model import Claim, Falsifier
from q4kd.harness.claims.profile import load_profile
from q4kd.harness.judging import digests
from q4kd.harness.judging import kills as kills_module
from q4kd.harness.judging.kill_records import KillRecord
from q4kd.harness.judging.kills import (
    Kills,
    KillStore,
    apply_kill_rule,
    default_kills,
    judge_faulted,
    recorded_seconds,
    rejudge,
)
from q4kd.harness.judging.results import ClaimResult, KillOutcome, KillStatus
from q4kd.harness.kill_matrix import kill_matrix, show
from q4kd.harness.records.raw_run import RawRun
from q4kd.harness.records.store import TarStore
from q4kd.harness.runs.cores import Cores
from q4kd.harness.runs.experiment import Inputs
from q4kd.harness.runs.faults import get_fault
from q4kd.harness.runs.runner import ExperimentRunner
from q4kd.trainer.errors import InputError


@pytest.fixture
def runner(tmp_path, monkeypatch):
    world.install(monkeypatch.setattr)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2] / "support"))
    return ExperimentRunner(tmp_path / "work", Inputs(tmp_path / "inputs", "cpu"), "cpu")


@pytest.fixture
def store(tmp_path):
    return Kills(tmp_path / "kills")


def claim(*faults, experiment="measure", ceiling=50.0, claim_id="FT-1", **more):
    falsifier = Falsifier(
        check="fake", experiment=experiment, params={"ceiling": ceiling}, profiles={}, sabotage=faults, **more
    )
    texts = {"rule": "r", "prediction": "p", "if_fails": "f"}
    return Claim(contract="c", id=claim_id, line=1, falsifier=falsifier, prose={}, **texts)


def marks(cells):
    return {(cell.claim.partition("::")[2], cell.fault): cell.mark for cell in cells}


@pytest.mark.parametrize("workers", [1, 4])
def test_the_matrix_tells_caught_from_missed_misfire_and_void(runner, store, workers):
    one = claim("inflate", "harmless", "crash", "absent", "forgets", "die", "die-undeclared")
    runner.cores = Cores(workers)
    cells = kill_matrix([one], "cpu", store, runner, changed=False)
    assert marks(cells) == {
        ("FT-1", "inflate"): "caught",
        ("FT-1", "harmless"): "missed",
        ("FT-1", "crash"): "misfire",
        ("FT-1", "absent"): "VOID",
        ("FT-1", "forgets"): "VOID",
        ("FT-1", "die"): "caught",
        ("FT-1", "die-undeclared"): "misfire",
    }
    again = {entry.fault: entry for entry in rejudge(one, "cpu", Kills(store.folder))}
    assert {name for name, entry in again.items() if entry.caught} == {"inflate", "die"}
    assert again["inflate"].verdict == "falsified"
    assert again["inflate"].detail == "caught: measure measured 100"
    assert again["harmless"].detail.startswith("missed: ")
    assert again["absent"].detail == "kill record stale: this fault was never run"
    assert all("VOID" not in record.detail for record in KillStore(store.folder / "cpu").records.values())


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupt_ends_the_runs_that_are_under_way(runner, store, workers):
    main = threading.main_thread().ident
    timer = threading.Timer(3.0, signal.pthread_kill, (main, signal.SIGINT))
    one, started = claim("inflate", "harmless", experiment="asleep"), time.monotonic()
    runner.cores = Cores(workers)
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            kill_matrix([one], "cpu", store, runner, changed=False)
    finally:
        timer.cancel()  # where the matrix has failed before, a later interruption would end every other test
    assert time.monotonic() - started < 30  # each run would take a minute
    assert not KillStore(store.folder / "cpu").records


def test_a_verdict_that_a_faulted_run_supports_is_still_missed(runner, store):
    cells = kill_matrix([claim("inflate", ceiling=1000.0)], "cpu", store, runner, changed=False)
    assert [cell.mark for cell in cells] == ["missed"]


def test_claims_share_a_faulted_experiment_and_its_clean_arm(runner, store):
    claims = [claim("inflate-b", experiment="compare", claim_id=f"FT-{n}", ceiling=40.0 + n) for n in range(3)]
    cells = kill_matrix(claims, "cpu", store, runner, changed=False)
    assert set(marks(cells).values()) == {"caught"}
    ran = {path.name: len(path.read_text()) for path in runner.inputs.folder.glob(".ran-*")}
    assert ran == {".ran-compare.a": 1, ".ran-compare.b": 1}
    assert [path.name for path in store.folder.rglob("*.xz")] == ["inflate-b--compare.tar.xz"]


def test_changed_runs_only_what_has_no_valid_record(runner, store):
    one = claim("inflate", "harmless")
    kill_matrix([one], "cpu", store, runner, changed=False)
    fresh = {cell.fault: cell.fresh for cell in kill_matrix([one], "cpu", store, runner, changed=True)}
    assert fresh == {"inflate": False, "harmless": True}
    looser = claim("inflate", ceiling=60.0)
    assert [cell.fresh for cell in kill_matrix([looser], "cpu", store, runner, changed=True)] == [True]


def test_an_unknown_fault_stops_the_matrix_before_anything_runs(runner, store):
    with pytest.raises(InputError, match="did you mean inflate"):
        kill_matrix([claim("inflate", "inflat")], "cpu", store, runner, changed=False)
    assert not runner.bundle_dir.exists()


def test_the_archive_is_deterministic_and_holds_only_raw_files(runner, store, tmp_path):
    one = claim("inflate")
    kill_matrix([one], "cpu", store, runner, changed=False)
    data = (store.folder / "cpu" / "inflate--measure.tar.xz").read_bytes()
    root = runner.faulted_root("measure", "inflate")
    assert matrix._archive(root, set()) == data
    assert b"checkpoint.bin" not in lzma.decompress(data)
    archive, _ = KillStore(store.folder / "cpu").archive("inflate--measure.tar.xz")
    assert "runs/measure/exit.json" in archive.names()


def test_an_archive_keeps_the_arrays_that_its_verdicts_rest_on(runner, store, monkeypatch):
    run, judge = runner.run, matrix.judge_faulted

    def run_with_arrays(*arguments, **options):
        runs = run(*arguments, **options)
        folder = runner.faulted_root("measure", "inflate") / "runs" / "measure" / "arrays"
        folder.mkdir(exist_ok=True)
        for name in ("first", "second", "unread"):
            np.savez(folder / f"{name}.npz", subject=np.arange(3.0))
        return runs

    def judge_reading(one, fault, profile, runs):
        assert len(runs["measure"].array({"FT-1": "first", "FT-2": "second"}[one.id])["subject"]) == 3
        return judge(one, fault, profile, runs)

    monkeypatch.setattr(runner, "run", run_with_arrays)
    monkeypatch.setattr(matrix, "judge_faulted", judge_reading)

    def kept_after(*claims):
        assert {cell.mark for cell in kill_matrix(claims, "cpu", store, runner, changed=False)} == {"caught"}
        names = KillStore(store.folder / "cpu").archive("inflate--measure.tar.xz")[0].names()
        return {Path(name).stem for name in names if name.endswith(".npz")}

    one, other = claim("inflate"), claim("inflate", claim_id="FT-2")
    assert kept_after(one) == {"first"}
    # Whoever is not asked this time keeps what its record rests on.
    assert kept_after(other) == {"first", "second"}
    assert kept_after(one, other) == {"first", "second"}


def stale(one, store):
    (entry,) = rejudge(one, "cpu", store)
    assert entry.caught is False
    assert entry.record is None
    assert entry.detail.startswith("kill record stale: ")
    return entry.detail.removeprefix("kill record stale: ")


def test_a_record_goes_stale_with_each_part_that_made_it(runner, store, monkeypatch):
    one = claim("inflate")
    assert stale(one, store) == "this fault was never run"
    kill_matrix([one], "cpu", store, runner, changed=False)
    assert rejudge(one, "cpu", store)[0].caught

    assert stale(claim("inflate", ceiling=51.0), store) == "changed since: falsifier"
    assert stale(claim("inflate", min_observations=2), store) == "changed since: falsifier"
    for module, old, new, part in [
        ("fakeworld.check", 'worst] > params["ceiling"]', 'worst] >= params["ceiling"]', "check fake"),
        ("q4kd.harness.checks.judgement", "just_over(limit", "just_above(limit", None),
        ("q4kd.harness.judging.judge", "worst = min(", "worst = max(", "judge"),
        ("fakeworld.experiments", '"seed.txt"', '"seeds.txt"', "experiment"),
        ("fakeworld.experiments", "# Count how", "# Say how", None),
        ("fakeworld.experiments", '"never ends"', '"does not end"', None),
    ]:
        monkeypatch.setattr(digests, "TREES", edited(module, old, new))
        if part is None:
            assert rejudge(one, "cpu", store)[0].caught, (module, new)
        else:
            assert stale(one, store) == f"changed since: {part}"
    monkeypatch.setattr(digests, "TREES", digests.SyntaxTrees())

    fault = get_fault("inflate")
    for other in (
        dataclasses.replace(fault, declared_exit=("signalled",)),
        dataclasses.replace(fault, apply=lambda: None),
    ):
        monkeypatch.setattr(kills_module, "get_fault", lambda name, f=other: f)
        assert stale(one, store) == "changed since: fault"
    monkeypatch.setattr(kills_module, "get_fault", lambda name: fault)

    # What does not bear on the catch does not age it.
    assert rejudge(claim("inflate", timeout_s=9.0), "cpu", store)[0].caught
    assert rejudge(dataclasses.replace(one, rule="reworded"), "cpu", store)[0].caught


def test_records_are_not_believed(runner, store):
    one = claim("inflate", "harmless")
    kill_matrix([one], "cpu", store, runner, changed=False)
    path = store.folder / "cpu" / "records.json"
    value = json.loads(path.read_text())
    for record in value["records"].values():
        record |= {"caught": True, "verdict": "falsified", "detail": "caught: trust me"}
    path.write_text(json.dumps(value))
    assert [entry.caught for entry in rejudge(one, "cpu", Kills(store.folder))] == [True, False]
    # The archive of another fault in its place: the digest, and failing that argv.json, give it away.
    (store.folder / "cpu" / "harmless--measure.tar.xz").write_bytes(
        (store.folder / "cpu" / "inflate--measure.tar.xz").read_bytes()
    )
    assert "not the one recorded" in rejudge(one, "cpu", Kills(store.folder))[1].detail
    for record in value["records"].values():
        record["raw_sha256"] = KillStore(store.folder / "cpu").archive("inflate--measure.tar.xz")[1]
    path.write_text(json.dumps(value))
    entry = rejudge(one, "cpu", Kills(store.folder))[1]
    assert (entry.caught, entry.detail) == (False, "misfire: run measure names another fault")


def test_a_clean_run_is_never_a_catch(runner):
    one = claim("inflate", ceiling=1.0)  # falsified by the clean program too
    outcome = judge_faulted(one, get_fault("inflate"), "cpu", runner.run("measure"))
    assert not outcome.caught
    assert judge_faulted(one, get_fault("inflate"), "cpu", {}).detail.startswith("misfire")


def test_a_missing_or_unsafe_archive_is_stale_not_an_error(runner, store):
    one = claim("inflate")
    kill_matrix([one], "cpu", store, runner, changed=False)
    (key,) = KillStore(store.folder / "cpu").records
    (store.folder / "cpu" / "inflate--measure.tar.xz").unlink()
    assert "inflate--measure.tar.xz" in stale(one, Kills(store.folder))
    again = Kills(store.folder)
    mine = again.of(one).records
    mine[key] = dataclasses.replace(mine[key], raw="../../etc/x.tar.xz")
    assert "a plain *.tar.xz name" in stale(one, again)


def test_an_archive_over_two_megabytes_is_refused(store):
    record = KillRecord(contract="c", id="i", fault="f", experiment="e", raw="f--e.tar.xz")
    with pytest.raises(InputError, match="at most"):
        KillStore(store.folder / "cpu").add("k", record, b"x" * ((2 << 20) + 1))
    assert KillStore(store.folder / "cpu").records == {}


def test_another_format_is_refused(tmp_path):
    (tmp_path / "records.json").write_text('{"format": "q4kd-kills/2", "records": {}}')
    with pytest.raises(InputError, match="q4kd-kills/1"):
        KillStore(tmp_path)


CAUGHT = KillOutcome.of("a", KillStatus.CAUGHT, "x")
MISSED = KillOutcome.of("b", KillStatus.MISSED, "x")
STALE = KillOutcome.of("c", KillStatus.STALE, "never run")


@pytest.mark.parametrize(
    ("verdict", "kills", "result"),
    [
        ("corroborated", [CAUGHT], ("corroborated", None)),
        ("corroborated", [], ("inconclusive", "not shown to fail")),
        ("corroborated", [MISSED], ("inconclusive", "not shown to fail")),
        ("corroborated", [CAUGHT, MISSED], ("inconclusive", "not shown to fail")),
        ("corroborated", [CAUGHT, STALE], ("inconclusive", "kill record stale")),
        ("corroborated", [MISSED, STALE], ("inconclusive", "kill record stale")),
        ("falsified", [], ("falsified", None)),
        ("falsified", [STALE], ("falsified", None)),
    ],
)
def test_the_kill_rule(verdict, kills, result):
    ruled = apply_kill_rule(ClaimResult(verdict=verdict), kills)
    assert (ruled.verdict, ruled.reason) == result
    assert ruled.sabotage == tuple(kills)


def test_the_kill_rule_keeps_the_reason_of_an_inconclusive_finding():
    assert apply_kill_rule(ClaimResult.inconclusive("prose"), [STALE]).reason == "prose"


def test_a_bundle_gets_the_records_it_used(runner, store, tmp_path):
    one, two = claim("inflate"), claim("harmless", claim_id="FT-2")
    kill_matrix([one, two], "cpu", store, runner, changed=False)
    key = rejudge(one, "cpu", store)[0].record
    store.copy_to(tmp_path / "sabotage", [key])
    assert {path.name for path in (tmp_path / "sabotage").iterdir()} == {"kills.json", "inflate--measure.tar"}
    record = json.loads((tmp_path / "sabotage" / "kills.json").read_text())["records"][key]
    copied = (tmp_path / "sabotage" / record["raw"]).read_bytes()
    assert hashlib.sha256(copied).hexdigest() == record["raw_sha256"]
    assert TarStore(copied).files == store.at("cpu").archive("inflate--measure.tar.xz")[0].files


def test_the_matrix_is_printed(capsys):
    cell = matrix.Cell("c::FT-1", "measure", "inflate", KillStatus.MISSED, "missed: 10 \x1b[31m", True)
    show([cell], "cpu")
    out = capsys.readouterr().out
    assert "FT-1" in out
    assert "1 missed" in out
    assert "\x1b[31m" not in out


def test_installed_records_lie_in_the_evidence_package():
    assert default_kills().parts[-2:] == ("evidence", "kills")


def test_a_cpu_claim_shown_to_fail_counts_on_a_machine_with_a_gpu(runner, store):
    one = claim("inflate")
    kill_matrix([one], "cpu", store, runner, changed=False)
    gpu = Kills.for_profile(load_profile("h200"), store.folder)
    assert [entry.caught for entry in rejudge(one, "h200", gpu)] == [True]


def test_a_cuda_claim_is_shown_to_fail_by_the_kind_of_gpu_and_not_by_its_name(runner, store):
    one = claim("inflate", needs=("cuda",))
    discrete = Kills.for_profile(load_profile("h200"), store.folder)
    kill_matrix([one], "h200", discrete, runner, changed=False)
    assert (store.folder / "cuda" / "records.json").is_file()
    assert [entry.caught for entry in rejudge(one, "h100-of-ours", Kills(store.folder, "cuda"))] == [True]
    unified = Kills.for_profile(load_profile("gb10"), store.folder)
    assert stale(one, unified) == "this fault was never run"


def test_a_bound_that_a_profile_changes_needs_a_record_of_its_own(runner, store):
    one = claim("inflate")
    assert one.falsifier is not None
    overridden = dataclasses.replace(one.falsifier, profiles={"h200": {"params": {"ceiling": 51.0}}})
    other = dataclasses.replace(one, falsifier=overridden)
    kill_matrix([other], "cpu", store, runner, changed=False)
    assert rejudge(other, "cpu", store)[0].caught
    (entry,) = rejudge(other, "h200", Kills(store.folder, "cuda"))
    assert entry.detail == "kill record stale: changed since: falsifier"


def test_records_of_an_earlier_layout_are_refused_with_the_way_out(tmp_path):
    (tmp_path / "records.json").write_text('{"format": "q4kd-kills/1", "records": {}}')
    with pytest.raises(InputError, match="one folder for each place"):
        Kills.for_profile(load_profile("cpu"), tmp_path)


def test_recorded_seconds_are_the_shortest_of_the_archives_and_skip_what_cannot_be_read(runner, store):
    kill_matrix([claim("inflate", "harmless")], "cpu", store, runner, changed=False)
    stores = [store.at("cpu").archive(f"{name}--measure.tar.xz")[0] for name in ("inflate", "harmless")]
    walls = [RawRun(kept, "measure").exit["wall_s"] for kept in stores]
    assert recorded_seconds(store, ["measure", "compare"]) == {"measure": min(walls)}
    (store.folder / "cpu" / "inflate--measure.tar.xz").write_bytes(b"not an archive")
    assert recorded_seconds(Kills(store.folder), ["measure"]) == {"measure": walls[1]}
    assert recorded_seconds(Kills(store.folder / "nothing"), ["measure"]) == {}
