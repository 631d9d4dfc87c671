import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from example_bundle import CAUGHT, CONTRACT, PAIR, PROSE, build, register, write_run

from q4kd.harness.bundle.recheck import difference
from q4kd.harness.bundle.verify import verify_bundle
from q4kd.harness.bundle.writer import pack, pack_bytes, seal
from q4kd.harness.session import close_bundle
from q4kd.trainer.errors import InputError


@pytest.fixture(autouse=True)
def checks(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return build(tmp_path)


def edit(path: Path, change: Callable[[Any], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_a_bundle_is_consistent_and_says_what_that_leaves_open(bundle: Path) -> None:
    result = verify_bundle(bundle)
    assert (result.status, result.exit_code, result.problems, result.recomputed) == ("consistent", 0, (), 1)
    assert "authenticity not established" in result.caveats[0]
    assert result.headline == "1 claim corroborated on profile cpu; 1 out of scope"


def test_an_archive_is_verified_without_unpacking(bundle: Path, tmp_path: Path) -> None:
    archive = pack(bundle)
    before = sorted(tmp_path.rglob("*"))
    assert verify_bundle(archive).status == "consistent"
    assert sorted(tmp_path.rglob("*")) == before
    for suffix, mode in ((".tar.gz", "w:gz"), (".tar.xz", "w:xz"), (".tar", "w")):
        tar = tmp_path / f"wrapped{suffix}"
        with tarfile.open(tar, mode) as file:
            file.add(bundle, "bundle")
        assert verify_bundle(tar).status == "consistent"


@pytest.mark.parametrize("name", ["runs/demo/memory.jsonl", "findings.json", "report.html", "contracts/demo-v1.yaml"])
def test_a_changed_file_is_found(bundle: Path, name: str) -> None:
    path = bundle / name
    path.write_bytes(path.read_bytes() + b"\n")
    result = verify_bundle(bundle)
    assert result.exit_code == 1 and f"changed file: {name}" in result.problems


def test_missing_and_added_files_are_found(bundle: Path) -> None:
    (bundle / "runs" / "demo" / "facts.json").unlink()
    (bundle / "runs" / "demo" / "note.txt").write_text("x")
    problems = verify_bundle(bundle).problems
    assert "missing file: runs/demo/facts.json" in problems and "added file: runs/demo/note.txt" in problems


def falsify_measurement(bundle: Path) -> None:
    path = bundle / "runs" / "demo" / "memory.jsonl"
    path.write_text(path.read_text().replace('"rss": 300', '"rss": 999'))


def drop_finding(bundle: Path) -> None:
    edit(bundle / "findings.json", lambda d: d["findings"].clear())


def drop_plan_entry(bundle: Path) -> None:
    edit(bundle / "plan.json", lambda d: d["entries"].pop(0))


def rescope(bundle: Path) -> None:
    edit(bundle / "plan.json", lambda d: d["entries"][0].update(scope="not_gating", reason="because"))


def flip(bundle: Path) -> None:
    edit(bundle / "findings.json", lambda d: d["findings"][0].update(verdict="falsified"))


def hide_refutation(bundle: Path) -> None:
    """The raw files refute the claim; the record says that it was never run."""
    falsify_measurement(bundle)
    row = {"verdict": "inconclusive", "reason": "not run", "checks": [], "runs": [], "sabotage": []}
    edit(bundle / "findings.json", lambda d: d["findings"][0].update(row))
    edit(bundle / "findings.json", lambda d: d.update(exit_code=2))


def improve_measured(bundle: Path) -> None:
    edit(bundle / "findings.json", lambda d: d["findings"][0]["checks"][0].update(measured="1.0"))


def improve_observation(bundle: Path) -> None:
    edit(bundle / "findings.json", lambda d: d["findings"][0]["checks"][0]["observation"].update(peak=1.0))


def improve_exit(bundle: Path) -> None:
    edit(bundle / "findings.json", lambda d: d.update(exit_code=2))


def recount(bundle: Path) -> None:
    edit(bundle / "findings.json", lambda d: d["summary"].update(corroborated=9))


def reword(bundle: Path) -> None:
    edit(bundle / "findings.json", lambda d: d["findings"][0].update(prediction="peak <= 5"))


def invent_catch(bundle: Path) -> None:
    edit(bundle / "findings.json", lambda d: d["findings"][0]["sabotage"].append({**CAUGHT, "fault": "other"}))


def loosen_contract(bundle: Path) -> None:
    path = bundle / "contracts" / "demo-v1.yaml"
    path.write_text(path.read_text().replace("limit: 100.5", "limit: 200.5"))


def faulted_run(bundle: Path) -> None:
    edit(bundle / "runs" / "demo" / "argv.json", lambda d: d.update(fault="ballast"))


def edit_junit(bundle: Path) -> None:
    path = bundle / "junit.xml"
    path.write_text(path.read_text().replace('errors="0"', 'errors="1"'))


def edit_statement(bundle: Path) -> None:
    edit(bundle / "statement.intoto.json", lambda d: d["predicate"].update(result="FAILED"))


def another_machine(bundle: Path) -> None:
    edit(bundle / "environment.json", lambda d: d.update(profile="gb10"))


def another_experiment(bundle: Path) -> None:
    edit(bundle / "findings.json", lambda d: d["findings"][0].update(experiment="other"))


def plan_with_a_note(bundle: Path) -> None:
    edit(bundle / "plan.json", lambda d: d.update(note="approved"))


def damage_run(bundle: Path) -> None:
    (bundle / "runs" / "demo" / "memory.jsonl").write_text("{\n")


def extra_run(bundle: Path) -> None:
    write_run(bundle / "runs" / "demo.again")


@pytest.mark.parametrize(
    ("tamper", "said"),
    [
        (falsify_measurement, "recorded"),
        (drop_finding, "without a finding"),
        (drop_plan_entry, "plan: demo-v1::DEMO-001 is missing"),
        (rescope, "recorded as not_gating, expected required"),
        (hide_refutation, 'verdict: recorded "inconclusive", recomputed "falsified"'),
        (improve_measured, "measured: recorded"),
        (improve_observation, "observation.peak: recorded 1.0"),
        (improve_exit, "exit code recorded as 2, recomputed 0"),
        (recount, "summary recorded"),
        (reword, "prediction differs from the contract"),
        (invent_catch, "sabotage: 2 recorded, 1 recomputed"),
        (loosen_contract, 'recorded "<= 100.5", recomputed "<= 200.5"'),
        (faulted_run, "made with the fault ballast"),
        (edit_junit, "junit.xml: differs"),
        (edit_statement, "statement.intoto.json: differs"),
        (another_machine, "made on another profile"),
        (another_experiment, "experiment differs from the contract"),
        (plan_with_a_note, "plan: unknown field note"),
        (damage_run, "evidence unreadable"),
        (extra_run, "the bundle holds"),
    ],
)
def test_tampering_is_found_even_after_sealing_again(bundle: Path, tamper: Callable[[Path], None], said: str) -> None:
    tamper(bundle)
    seal(bundle)
    result = verify_bundle(bundle)
    assert result.status == "mismatch" and any(said in problem for problem in result.problems), result.problems


def test_an_impossible_findings_file_is_not_judged(bundle: Path) -> None:
    flip(bundle)
    edit(bundle / "findings.json", lambda d: d["findings"][0].update(reason="x"))
    seal(bundle)
    assert verify_bundle(bundle).exit_code == 2


def test_a_resealed_loosened_bound_is_caught_by_the_contracts_only(tmp_path: Path) -> None:
    loose = build(tmp_path / "loose", text=CONTRACT.replace("100.5", "500.5"))
    build(tmp_path / "strict")
    strict = tmp_path / "strict" / "contracts"
    assert verify_bundle(loose).status == "consistent"
    result = verify_bundle(loose, contracts=strict)
    assert result.exit_code == 1 and "contracts/demo-v1.yaml: differs from the one given" in result.problems
    right = verify_bundle(loose, contracts=tmp_path / "loose" / "contracts")
    assert right.status == "consistent" and not any("authenticity" in caveat for caveat in right.caveats)


def test_contracts_that_were_left_out_are_named(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "contracts" / "more-v1.yaml").write_text(CONTRACT)
    problems = verify_bundle(bundle, contracts=tmp_path / "contracts").problems
    assert problems == ("contracts/more-v1.yaml: not in the bundle",)


def test_a_public_key_on_an_unsigned_bundle_fails(bundle: Path, tmp_path: Path) -> None:
    result = verify_bundle(bundle, public_keys=[tmp_path / "key.pub"])
    assert result.exit_code == 1 and "not signed" in result.problems[0]


def test_an_unknown_judge_version_is_unverifiable(bundle: Path) -> None:
    edit(bundle / "findings.json", lambda d: d.update(judge_version=99))
    seal(bundle)
    result = verify_bundle(bundle)
    assert result.status == "unverifiable" and result.exit_code == 2 and "99" in result.problems[0]


def test_what_is_not_a_bundle_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "x.tar.gz").write_bytes(b"no")
    for path in (tmp_path, tmp_path / "none", tmp_path / "x.tar.gz"):
        with pytest.raises(InputError):
            verify_bundle(path)


def test_a_partial_bundle_and_a_prose_claim_verify_as_what_they_are(tmp_path: Path) -> None:
    partial = verify_bundle(build(tmp_path / "a", select="DEMO-001"))
    prose = verify_bundle(build(tmp_path / "b", text=CONTRACT + PROSE))
    assert (partial.status, prose.status) == ("consistent", "consistent")
    edit(tmp_path / "a" / "bundle" / "plan.json", lambda d: d.update(select=None, scope="full"))
    seal(tmp_path / "a" / "bundle")
    assert verify_bundle(tmp_path / "a" / "bundle").exit_code == 1


def test_a_falsified_bundle_is_consistent_too(tmp_path: Path) -> None:
    folder = build(tmp_path, peak=900)
    assert json.loads((folder / "findings.json").read_text())["exit_code"] == 1
    assert verify_bundle(folder).status == "consistent"


def test_a_run_that_the_harness_broke_supports_no_verdict(bundle: Path) -> None:
    (bundle / "runs" / "demo" / "harness_error.json").write_text('{"stage": "collect", "error": "e"}')
    seal(bundle)
    assert any("never run to the end" in problem for problem in verify_bundle(bundle).problems)


def test_an_interrupted_claim_stays_inconclusive_and_consistent(bundle: Path) -> None:
    """Its experiment got as far as raw files that cannot be judged; then the session was stopped."""
    damage_run(bundle)
    row = {"verdict": "inconclusive", "reason": "not run", "checks": [], "runs": [], "sabotage": []}
    counts = {"corroborated": 0, "falsified": 0, "inconclusive": 1, "out_of_scope": 1, "not_gating": 0}
    edit(bundle / "findings.json", lambda d: d["findings"][0].update(row))
    edit(bundle / "findings.json", lambda d: d.update(exit_code=2, summary=counts))
    close_bundle(bundle)
    assert verify_bundle(bundle).problems == ()


def test_control_characters_of_a_bundle_never_reach_the_terminal(bundle: Path) -> None:
    edit(bundle / "findings.json", lambda d: d["findings"][0].update(key="demo\x1b[31m\n"))
    seal(bundle)
    assert all(problem.isprintable() for problem in verify_bundle(bundle).problems)


def test_numbers_may_differ_by_rounding_only() -> None:
    assert difference({"a": [1.0, 2]}, {"a": [1.0 + 1e-12, 2]}) is None
    assert difference({"a": 1.0}, {"a": 1.0001}) == ".a: recorded 1.0, recomputed 1.0001"
    assert difference({"a": 1}, {"a": True}) is not None
    assert difference({"a": 1}, {"b": 1}) == ".a: only in the record"
    assert difference([1], [1, 2]) == ": 1 recorded, 2 recomputed"


STANDALONE = """
import socket, sys
ABSENT = ("torch", "transformers", "accelerate", "safetensors", "pynvml", "cupy", "matplotlib")
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
def no_network(*_, **__): raise OSError("no network")
class NoSocket(socket.socket):  # a class still, from which modules derive theirs
    __init__ = no_network
socket.socket, socket.create_connection = NoSocket, no_network
from q4kd.harness.__main__ import main
sys.exit(main(["evidence", "verify", sys.argv[1]]))
"""


def test_the_reference_bundle_verifies_with_a_base_install_and_nothing_else(tmp_path: Path) -> None:
    """No torch, no GPU library, no network, nothing but the bundle."""
    newest = sorted((Path(__file__).parents[3] / "evidence" / "bundles").glob("*-cpu.tar.*"))[-1]
    bundle = str(shutil.copy(newest, tmp_path))
    command = [sys.executable, "-c", STANDALONE, bundle]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verdicts recomputed from raw files, all as recorded" in done.stdout


def test_a_bundle_can_be_read_only(bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    for path in [copy, *copy.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    assert verify_bundle(copy).status == "consistent"


@pytest.mark.parametrize("name", ["environment.json", "inputs.json", "plan.json", "findings.json", "ctrf.json"])
@pytest.mark.parametrize("text", ["[]", "{}", '{"packages": 3, "x": {"sha256": []}}', '{"a": NaN}', "[" * 90_000])
def test_hostile_json_is_a_result_and_never_a_crash(bundle: Path, name: str, text: str) -> None:
    (bundle / name).write_text(text)
    seal(bundle)
    assert verify_bundle(bundle).exit_code in (1, 2)


def edit_record(bundle: Path, **fields: str) -> None:
    edit(bundle / "sabotage" / "kills.json", lambda d: d["records"]["r1"].update(fields))
    seal(bundle)


def replace_archive(bundle: Path, **run: Any) -> None:
    faulted = bundle.parent / "other"
    write_run(faulted / "runs" / "demo", **run)
    raw = pack_bytes(faulted)
    (bundle / "sabotage" / "ballast--demo.tar.gz").write_bytes(raw)
    edit_record(bundle, raw_sha256=hashlib.sha256(raw).hexdigest())


def test_a_kill_record_is_judged_again(bundle: Path) -> None:
    edit_record(bundle, id="DEMO-002")
    assert any("expected a record of" in problem for problem in verify_bundle(bundle).problems)
    edit_record(bundle, id="DEMO-001", raw_sha256="0" * 64)
    assert any("the archive recorded" in problem for problem in verify_bundle(bundle).problems)


def test_a_fault_that_is_not_caught_on_rejudging_is_a_mismatch(bundle: Path) -> None:
    replace_archive(bundle, peak=300, fault="ballast")
    problems = verify_bundle(bundle).problems
    assert any('verdict: recorded "corroborated", recomputed "inconclusive"' in problem for problem in problems)
    assert any("sabotage[0].caught: recorded true, recomputed false" in problem for problem in problems)


def test_a_clean_run_does_not_pass_for_a_sabotaged_one(bundle: Path) -> None:
    replace_archive(bundle, peak=900)
    assert any("sabotage[0].caught" in problem for problem in verify_bundle(bundle).problems)


def test_archives_of_sabotaged_runs_are_bounded_together(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("q4kd.harness.bundle.recheck.MAX_UNPACKED", 4096)
    assert any("bounded archive" in problem for problem in verify_bundle(bundle).problems)


def drop_record(bundle: Path) -> None:
    (bundle / "sabotage" / "kills.json").unlink()
    seal(bundle)


def test_a_catch_without_its_record_is_a_mismatch(bundle: Path) -> None:
    drop_record(bundle)
    assert any("kills.json" in problem for problem in verify_bundle(bundle).problems)


def test_a_verdict_on_fewer_arms_than_the_experiment_has_is_a_mismatch(tmp_path: Path) -> None:
    folder = build(tmp_path, text=CONTRACT + PAIR)
    shutil.rmtree(folder / "runs" / "pair.b")
    edit(folder / "findings.json", lambda d: [row.update(runs=["pair.a"]) for row in d["findings"][1:]])
    seal(folder)
    assert any("without the runs ['pair.b']" in problem for problem in verify_bundle(folder).problems)


def test_a_run_of_no_experiment_is_a_mismatch(bundle: Path) -> None:
    write_run(bundle / "runs" / "other")
    seal(bundle)
    assert any("runs/other: of no experiment" in problem for problem in verify_bundle(bundle).problems)


def test_a_claim_that_was_not_judged_may_rest_on_good_runs(bundle: Path) -> None:
    """Two claims share an experiment and the session was stopped between them."""
    row = {"verdict": "inconclusive", "reason": "not run", "checks": [], "runs": [], "sabotage": []}
    counts = {"corroborated": 0, "falsified": 0, "inconclusive": 1, "out_of_scope": 1, "not_gating": 0}
    edit(bundle / "findings.json", lambda d: d["findings"][0].update(row))
    edit(bundle / "findings.json", lambda d: d.update(exit_code=2, summary=counts))
    close_bundle(bundle)
    assert verify_bundle(bundle).problems == ()
    edit(bundle / "findings.json", lambda d: d["findings"][0].update(sabotage=[CAUGHT]))
    close_bundle(bundle)
    assert any("all the same" in problem for problem in verify_bundle(bundle).problems)


def test_what_a_plan_counts_on_is_laid_beside_the_environment(bundle: Path) -> None:
    edit(bundle / "environment.json", lambda d: d.update(gpu={"names": ["NVIDIA H200"] * 2}, packages={}))
    edit(bundle / "plan.json", lambda d: d.pop("extras", None))  # what the machine of this test has
    seal(bundle)
    result = verify_bundle(bundle)
    assert not any("plan" in problem for problem in result.problems)
    left = "environment.json shows two_gpus; the plan leaves claims that need it out of scope"
    assert left in result.caveats
    edit(bundle / "plan.json", lambda d: d.update(extras=["bitsandbytes", "two_gpus"]))
    seal(bundle)
    result = verify_bundle(bundle)
    assert result.exit_code == 1
    assert "plan: counts on bitsandbytes, which environment.json does not show" in result.problems
    assert not any("two_gpus" in line for line in (*result.problems, *result.caveats))
