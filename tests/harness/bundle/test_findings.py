import copy
import itertools
import json
from dataclasses import replace
from typing import Any

import pytest
from example_bundle import CAUGHT, CONTRACT, PROSE, register
from jsonschema import Draft202012Validator
from typed_findings import check_result, finding

from q4kd.harness.bundle import findings as module
from q4kd.harness.bundle.findings import assemble, exit_code, headline, validate_findings
from q4kd.harness.claims.contract import parse_contract
from q4kd.harness.claims.model import Contract
from q4kd.harness.claims.plan import make_plan
from q4kd.harness.claims.profile import load_profile
from q4kd.harness.judging.kill_records import RECORDS_FORMAT, KillRecord, read_kill_records
from q4kd.harness.judging.results import ClaimResult, Findings, KillOutcome, KillStatus
from q4kd.trainer.errors import InputError

CHECK = check_result("peak", params={"limit": 1}, observation={"peak": 0.5}, measured="0.5", bound="<= 1", margin=0.5)
HELD = ClaimResult(
    verdict="corroborated",
    checks=(CHECK,),
    runs=("demo",),
    sabotage=(KillOutcome.from_json(CAUGHT),),
)


@pytest.fixture
def contracts(monkeypatch: pytest.MonkeyPatch) -> list[Contract]:
    register(monkeypatch)
    return [parse_contract("demo-v1", CONTRACT.encode(), "demo-v1.yaml")]


def make(contracts: list[Contract], results: dict[str, ClaimResult], select: str | None = None) -> Findings:
    plan = make_plan(contracts, load_profile("cpu"), select)
    return assemble(plan, contracts, results, judge_version=1, created="2026-11-23T12:00:00+00:00")


def test_every_required_claim_gets_a_finding(contracts: list[Contract]) -> None:
    document = make(contracts, {"demo-v1::DEMO-001": HELD})
    assert [row.key for row in document.rows] == ["demo-v1::DEMO-001"]
    assert document.exit_code == 0
    assert headline(document) == "1 claim corroborated on profile cpu; 1 out of scope"


def test_a_claim_without_a_result_is_inconclusive_and_not_green(contracts: list[Contract]) -> None:
    document = make(contracts, {})
    assert document.rows[0].reason == "not run" and document.exit_code == 2


def test_prose_is_inconclusive_whatever_result_is_handed_in(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)
    contract = parse_contract("demo-v1", (CONTRACT + PROSE).encode(), "demo-v1.yaml")
    document = make([contract], {"demo-v1::DEMO-001": HELD, "demo-v1::DEMO-003": HELD})
    assert document.rows[1].reason == "prose" and document.exit_code == 2


def test_a_partial_scope_cannot_pass(contracts: list[Contract]) -> None:
    document = make(contracts, {"demo-v1::DEMO-001": HELD}, "demo")
    assert document.exit_code == 2 and "partial" in headline(document)


def test_the_exit_code_over_every_set_of_verdicts() -> None:
    """An independent statement of the rule, over all multisets of up to three required verdicts."""
    for size in range(4):
        for verdicts in itertools.combinations_with_replacement(("corroborated", "falsified", "inconclusive"), size):
            for scope in ("full", "partial"):
                rows = [finding(verdict=verdict) for verdict in verdicts]
                rows.append(finding(verdict="falsified", scope="not_gating"))
                if verdicts.count("falsified"):
                    expected = 1
                elif scope == "full" and size and set(verdicts) == {"corroborated"}:
                    expected = 0
                else:
                    expected = 2
                assert exit_code(rows, scope) == expected


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("exit_code",), 3),
        (("extra",), 1),
        (("created",), "yesterday"),
        (("created",), "9999-99-99T00:00:00+00:00"),
        (("findings", 0, "seconds"), 1e300),
        (("findings", 0, "checks", 0, "observation"), json.loads('{"a":' * 70 + "1" + "}" * 70)),
        (("summary", "falsified"), -1),
        (("findings", 0, "verdict"), "proved"),
        (("findings", 0, "reason"), "because"),
        (("findings", 0, "checks"), []),
        (("findings", 0, "scope"), "out_of_scope"),
        (("findings", 0, "checks", 0, "verdict"), "passed"),
        (("findings", 0, "sabotage", 0, "caught"), "yes"),
    ],
)
def test_the_schema_refuses_what_is_not_a_finding(contracts: list[Contract], path: tuple[Any, ...], value: Any) -> None:
    document = make(contracts, {"demo-v1::DEMO-001": HELD})
    changed = copy.deepcopy(document.to_json())
    place: Any = changed
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    assert validate_findings(document.to_json(), "f") == document
    with pytest.raises(InputError):
        validate_findings(changed, "f")


def test_a_malformed_result_cannot_be_written(contracts: list[Contract]) -> None:
    with pytest.raises(InputError):
        make(contracts, {"demo-v1::DEMO-001": replace(HELD, verdict="inconclusive")})


def test_the_schema_is_one() -> None:
    Draft202012Validator.check_schema(module._schema().schema)


@pytest.mark.parametrize(
    ("caught", "detail", "status"),
    [
        (True, "caught: 300.0 is over", KillStatus.CAUGHT),
        (True, "misfire: of another program", KillStatus.CAUGHT),
        (False, "missed: 10", KillStatus.MISSED),
        (False, "misfire: run demo ended killed, code None", KillStatus.MISFIRE),
        (False, "VOID: the fault was not planted", KillStatus.VOID),
        (False, "kill record stale: this fault was never run", KillStatus.STALE),
        (False, "caught: trust me", KillStatus.MISSED),
        (False, None, KillStatus.MISSED),
    ],
)
def test_an_outcome_is_written_as_it_was_read_and_only_caught_counts_as_caught(
    caught: bool, detail: str | None, status: KillStatus
) -> None:
    entry = {"fault": "f", "caught": caught, "verdict": None, "record": None, "detail": detail}
    outcome = KillOutcome.from_json(entry)
    assert (outcome.status, outcome.caught, outcome.to_json()) == (status, caught, entry)


def test_kill_records_that_nothing_can_be_found_by_are_refused() -> None:
    good = {"contract": "c", "id": "i", "fault": "f", "experiment": "e", "raw": "f--e.tar.gz"}
    document = {"format": RECORDS_FORMAT, "records": {"k": {**good, "unknown": 1}}}
    assert read_kill_records(document, "kills.json") == {"k": KillRecord(**good)}
    lacking = {name: value for name, value in good.items() if name != "raw"}
    for records in ([], {"k": []}, {"k": {**good, "raw": 1}}, {"k": lacking}, {"k": {**good, "parts": []}}):
        with pytest.raises(InputError, match="kill records by key"):
            read_kill_records({**document, "records": records}, "kills.json")
    with pytest.raises(InputError, match="kill records by key"):
        read_kill_records({"format": RECORDS_FORMAT}, "kills.json")
    for other in ({**document, "format": "q4kd-kills/2"}, [], None):
        with pytest.raises(InputError, match="q4kd-kills/1"):
            read_kill_records(other, "kills.json")
