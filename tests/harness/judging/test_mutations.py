"""Level 1: what was recorded is spoilt and judged again, and every corroborated claim must turn."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from good_runs import CASES, claim_of, good_runs

from q4kd.harness.checks import CHECKS
from q4kd.harness.checks.judgement import READABLE, Judgement, inconclusive
from q4kd.harness.judging.judge import judge_claim, unsupporting
from q4kd.harness.judging.mutations import NOT_SHOWN, apply_mutation_rule, reads, spoil
from q4kd.harness.judging.results import ClaimResult
from q4kd.harness.records.raw_run import RawRun

EVERYTHING = set(READABLE)


def level_one(check: str, runs: Mapping[str, RawRun]) -> ClaimResult:
    claim = claim_of(check)
    return apply_mutation_rule(claim, runs, "cpu", judge_claim(claim, runs, "cpu"))


def test_every_check_has_a_case() -> None:
    assert set(CASES) == set(CHECKS)


@pytest.mark.parametrize("check", CASES)
def test_every_mutation_of_good_evidence_turns(tmp_path: Path, check: str) -> None:
    result = level_one(check, good_runs(tmp_path, check))
    assert result.verdict == "corroborated" and result.mutations is not None and result.mutations.missed == ()
    assert result.mutations.caught == result.mutations.tried > 10


@pytest.mark.parametrize("check", CASES)
def test_a_check_reads_what_it_declares_and_nothing_else(tmp_path: Path, check: str) -> None:
    seen = reads(claim_of(check), good_runs(tmp_path, check), "cpu")[check]
    assert set().union(*seen.values()) == set(CHECKS[check].READS) <= EVERYTHING


@pytest.mark.parametrize("check", CASES)
def test_mutations_of_a_check_have_names_of_their_own_and_change_something(tmp_path: Path, check: str) -> None:
    runs, claim = good_runs(tmp_path, check), claim_of(check)
    assert claim.falsifier is not None
    (found,) = judge_claim(claim, runs, "cpu").checks
    least = claim.falsifier.min_observations
    mutations = CHECKS[check].mutate(found.observation, found.params, least)
    assert len({name for name, _ in mutations}) == len(mutations) >= 5
    for name, observation in mutations:
        assert observation != found.observation, name


class Deaf:
    """A check with some of its ears stopped: it sees only whether ``listens`` holds of the observation."""

    def __init__(self, check: str, **changed: Any) -> None:
        real = CHECKS[check]
        names = ("NAME", "PARAMS", "DIRECTIONS", "READS", "extract", "judge", "mutate")
        vars(self).update({name: getattr(real, name) for name in names} | changed)


def put(monkeypatch: pytest.MonkeyPatch, check: str, **changed: Any) -> None:
    checks = {**CHECKS, check: Deaf(check, **changed)}
    monkeypatch.setattr("q4kd.harness.judging.judge.CHECKS", checks)
    monkeypatch.setattr("q4kd.harness.judging.mutations.CHECKS", checks)


def missed(check: str, runs: Mapping[str, RawRun]) -> list[str]:
    result = level_one(check, runs)
    assert (result.verdict, result.reason) == ("inconclusive", NOT_SHOWN)
    assert result.mutations is not None
    names = list(result.mutations.missed)
    assert result.mutations.caught == result.mutations.tried - len(names)
    return names


def test_a_looser_bound_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = CHECKS["latency"]

    def judge(observation: Mapping[str, Any], params: Mapping[str, Any], least: int) -> Judgement:
        return real.judge(observation, {**params, "max_s": params["max_s"] * 1.001}, least)

    put(monkeypatch, "latency", judge=judge)
    assert missed("latency", good_runs(tmp_path, "latency")) == ["latency: median just over the bound"]


def test_a_check_that_does_not_mind_a_short_record_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = CHECKS["residency"]

    def judge(observation: Mapping[str, Any], params: Mapping[str, Any], least: int) -> Judgement:
        whole = {"late_start_s": 0.0, "early_end_s": 0.0, "samples": max(observation["samples"], least)}
        return real.judge({**observation, **whole}, params, least)

    put(monkeypatch, "residency", judge=judge)
    names = missed("residency", good_runs(tmp_path, "residency"))
    assert "residency: samples end early" in names and "residency: one sample too few" in names


def test_a_check_that_reads_what_it_does_not_declare_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(monkeypatch, "table", READS=("exit",))
    assert missed("table", good_runs(tmp_path, "table")) == ["table reads facts, which it does not declare"]


def test_a_check_that_reads_nothing_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, "table", extract=lambda *_: {"table": {"x": 1, "y": True}, "cause": "exited", "returncode": 0})
    assert missed("table", good_runs(tmp_path, "table")) == ["table reads no run"]


def test_a_check_without_mutations_of_its_own_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, "table", mutate=lambda *_: [])
    assert missed("table", good_runs(tmp_path, "table")) == ["table has no mutations of its own"]


def test_a_mutation_that_only_breaks_the_judge_shows_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, "table", mutate=lambda *_: [("rubbish", {})])
    assert missed("table", good_runs(tmp_path, "table")) == ["table: rubbish: KeyError"]


@pytest.mark.parametrize(
    ("guard", "expected"),
    [
        ("foreign", {"ended in another boot", "samples of another process", "the exit of another process"}),
        ("unsupporting", {"made with a planted fault", "a fault among its arguments", "killed"}),
    ],
)
def test_without_a_universal_guard_its_mutations_are_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guard: str, expected: set[str]
) -> None:
    runs = good_runs(tmp_path, "log_absent")
    monkeypatch.setattr(f"q4kd.harness.judging.judge.{guard}", lambda _run: None)
    assert {name.partition(": ")[2] for name in missed("log_absent", runs)} >= expected


def test_each_arm_that_is_read_is_spoilt_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def watch(claim: Any, runs: Mapping[str, RawRun], profile: str) -> ClaimResult:
        tried.append(next(name for name, run in runs.items() if type(run) is not RawRun))
        return ClaimResult.inconclusive("constant")

    runs = good_runs(tmp_path, "improves")
    claim = claim_of("improves")
    result = judge_claim(claim, runs, "cpu")
    monkeypatch.setattr("q4kd.harness.judging.mutations.judge_claim", watch)
    apply_mutation_rule(claim, runs, "cpu", result)
    assert set(tried) == set(runs) and len(runs) == 6


def test_spoiling_leaves_the_evidence_alone(tmp_path: Path) -> None:
    runs = good_runs(tmp_path, "parity")
    run = next(iter(runs.values()))
    before = [run.argv, run.exit, run.facts, run.events, run.memory, run.stdout, run.array("x")["subject"].shape]
    kept = repr(before)
    names = [name for name, _ in spoil(run, EVERYTHING, 4)]
    after = [run.argv, run.exit, run.facts, run.events, run.memory, run.stdout, run.array("x")["subject"].shape]
    assert repr(after) == kept
    assert len(set(names)) == len(names)
    cut = dict(spoil(run, EVERYTHING, 4))["arrays cut short"]
    assert cut.array("x")["subject"].shape == (3, 50)


@pytest.mark.parametrize("verdict", ["falsified", "inconclusive"])
def test_what_is_not_corroborated_is_not_spoilt(verdict: Any) -> None:
    result = ClaimResult(verdict=verdict)
    judged = apply_mutation_rule(claim_of("table"), {}, "cpu", result)
    assert judged == result and judged.mutations is None


GUARDED = [
    ({"ending": {"boot_id_end": "c"}}, "machine restarted"),
    ({"ending": {"pid": 8}}, "another process"),
    ({"ending": {"boot_id": None}}, "evidence unreadable"),
    ({"events": [{"event": "process_start", "t": 0.0, "pid": 8}]}, "another process"),
    ({"ending": {"cause": "killed_cause_unknown", "returncode": None}}, "run incomplete"),
    ({"ending": {"returncode": 1}}, "run incomplete"),
    ({"fault": "ballast"}, "faulted run"),
    ({"argv": ["python", "-m", "q4kd.harness.child", "--fault", "x", "--", "distill"]}, "faulted run"),
]


@pytest.mark.parametrize(("options", "reason"), GUARDED)
def test_guards_hold_whatever_a_check_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], reason: str
) -> None:
    held = SimpleNamespace(judge=lambda *_: Judgement(verdict="corroborated", measured="", bound=""))
    held.extract = lambda *_: {}
    monkeypatch.setattr("q4kd.harness.judging.judge.CHECKS", {"table": held})
    runs = good_runs(tmp_path, "table", **options)
    assert judge_claim(claim_of("table"), runs, "cpu").reason == reason
    assert judge_claim(claim_of("table"), good_runs(tmp_path / "good", "table"), "cpu").verdict == "corroborated"


@pytest.mark.parametrize(("options", "reason"), GUARDED)
def test_a_foreign_run_refutes_nothing_and_a_faulted_one_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], reason: str
) -> None:
    refuted = SimpleNamespace(extract=lambda *_: {})
    refuted.judge = lambda *_: Judgement(verdict="falsified", measured="", bound="", counterexample="x")
    monkeypatch.setattr("q4kd.harness.judging.judge.CHECKS", {"table": refuted})
    result = judge_claim(claim_of("table"), good_runs(tmp_path, "table", **options), "cpu")
    may = reason in ("faulted run", "run incomplete")
    assert (result.verdict, result.reason) == (("falsified", None) if may else ("inconclusive", reason))


TIMES = {"wall_s": 100.0, "timeout_s": 60.0, "cause": "timeout"}


@pytest.mark.parametrize(
    ("check", "ending", "busy"),
    [
        ("table", TIMES | {"waited_s": 50.0, "cpu_s": 9.0}, True),  # only with the wait was it longer than its limit
        ("table", TIMES | {"waited_s": 39.0, "cpu_s": 9.0}, False),
        ("table", TIMES | {"waited_s": 0.0, "cpu_s": 9.0}, False),
        ("table", TIMES, False),  # recorded before waits were
        ("table", {"waited_s": 50.0, "cpu_s": 9.0}, False),  # its result does not depend on its time
        ("ratio", {"waited_s": 1.1, "cpu_s": 9.0}, True),
        ("latency", {"waited_s": 1.1, "cpu_s": 9.0}, True),
        ("ratio", {"waited_s": 0.9, "cpu_s": 9.0}, False),
        ("ratio", {}, False),
    ],
)
def test_what_a_busy_machine_may_have_caused_refutes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: str, ending: dict[str, Any], busy: bool
) -> None:
    refuted = SimpleNamespace(extract=lambda *_: {})
    refuted.judge = lambda *_: Judgement(verdict="falsified", measured="", bound="", counterexample="x")
    monkeypatch.setattr("q4kd.harness.judging.judge.CHECKS", {check: refuted})
    result = judge_claim(claim_of(check), good_runs(tmp_path, check, ending=ending), "cpu")
    assert (result.verdict, result.reason) == (("inconclusive", "machine too busy") if busy else ("falsified", None))


def test_waiting_takes_no_corroboration_away(tmp_path: Path) -> None:
    runs = good_runs(tmp_path, "ratio", ending={"waited_s": 50.0, "cpu_s": 9.0})
    assert judge_claim(claim_of("ratio"), runs, "cpu").verdict == "corroborated"


def test_an_exit_code_that_the_arm_declares_is_normal(tmp_path: Path) -> None:
    (run,) = good_runs(tmp_path, "table", ending={"returncode": 2}).values()
    assert unsupporting(run) == "run incomplete"
    run.argv["exits"] = [2]
    assert unsupporting(run) is None


def test_an_unknown_stays_the_unknown_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = SimpleNamespace(extract=lambda *_: {}, judge=lambda *_: inconclusive("constant", "", ""))
    monkeypatch.setattr("q4kd.harness.judging.judge.CHECKS", {"table": unknown})
    runs = good_runs(tmp_path, "table", fault="ballast")
    assert judge_claim(claim_of("table"), runs, "cpu").reason == "constant"


def test_the_profile_decides_how_far_arrays_are_cut(tmp_path: Path) -> None:
    claim = claim_of("parity")
    assert claim.falsifier is not None
    fewer = dataclasses.replace(claim, falsifier=dataclasses.replace(claim.falsifier, min_observations=1))
    runs = good_runs(tmp_path, "parity")
    result = apply_mutation_rule(fewer, runs, "cpu", judge_claim(fewer, runs, "cpu"))
    assert result.mutations is not None and result.mutations.missed == ()
