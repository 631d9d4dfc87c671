import copy
import json
import xml.etree.ElementTree as ElementTree
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import xmlschema
from example_bundle import CONTRACT, PROSE, build, register
from jsonschema import Draft202012Validator, FormatChecker

from q4kd.harness.bundle.exporters import ctrf, intoto_statement, junit
from q4kd.harness.claims.waivers import Waiver
from q4kd.harness.judging.results import Findings

SCHEMAS = Path(__file__).parents[2] / "schemas"


@pytest.fixture(params=[300, 900], ids=["held", "falsified"])
def findings(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    register(monkeypatch)
    folder = build(tmp_path, text=CONTRACT + PROSE, peak=request.param)
    value: dict[str, Any] = json.loads((folder / "findings.json").read_text())
    value["folder"] = folder
    return value


def typed(findings: dict[str, Any]) -> Findings:
    return Findings.from_json({name: value for name, value in findings.items() if name != "folder"})


def test_junit_has_no_skips_and_unknown_is_an_error(findings: dict[str, Any]) -> None:
    root = ElementTree.fromstring((findings["folder"] / "junit.xml").read_bytes())
    cases = {case.get("name"): case for case in root.iter("testcase")}
    assert set(cases) == {"DEMO-001", "DEMO-003"}  # the claim out of scope is not emitted
    assert cases["DEMO-003"].find("error") is not None and root.find(".//skipped") is None
    failed = findings["findings"][0]["verdict"] == "falsified"
    assert (cases["DEMO-001"].find("failure") is not None) == failed
    suite = root.find("testsuite")
    assert suite is not None
    counts = [suite.get(name) for name in ("tests", "failures", "errors", "skipped")]
    assert counts == ["2", str(int(failed)), "1", "0"]


def test_junit_survives_text_that_xml_cannot_hold(findings: dict[str, Any]) -> None:
    findings["findings"][0].update(verdict="falsified", id="a\x00\ud800<&", if_fails="\x1b[31m]]>")
    ElementTree.fromstring(junit(typed(findings)))


def test_ctrf_says_other_with_the_raw_status(findings: dict[str, Any]) -> None:
    report = json.loads((findings["folder"] / "ctrf.json").read_text())
    assert report["reportFormat"] == "CTRF" and report["specVersion"] == "1.0.0"
    summary, tests = report["results"]["summary"], report["results"]["tests"]
    assert summary["tests"] == len(tests) == summary["passed"] + summary["failed"] + summary["other"]
    assert tests[1]["status"] == "other" and tests[1]["rawStatus"] == "inconclusive(prose)"


def ctrf_schema() -> Draft202012Validator:
    schema = json.loads((SCHEMAS / "ctrf.schema.json").read_text())
    Draft202012Validator.check_schema(schema)
    formats = FormatChecker()
    formats.checks("date-time", ValueError)(lambda text: datetime.fromisoformat(text).tzinfo is not None)
    return Draft202012Validator(schema, format_checker=formats)


def test_both_formats_fit_their_schemas(findings: dict[str, Any]) -> None:
    junit_schema = xmlschema.XMLSchema(str(SCHEMAS / "junit.xsd"))
    junit_schema.validate(str(findings["folder"] / "junit.xml"))
    report = json.loads((findings["folder"] / "ctrf.json").read_text())
    ctrf_schema().validate(report)
    for name in ("DEMO-003", 'a "b" <c>&', "é\u2028"):
        findings["findings"][1]["id"] = name
        junit_schema.validate(junit(typed(findings)).decode())


def test_both_formats_of_a_waived_claim_fit_their_schemas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)
    waiver = Waiver(claim="demo-v1::DEMO-003", owner="Jo", reason="it is being written", expires="2026-11-23")
    folder = build(tmp_path, text=CONTRACT + PROSE, waivers=(waiver,))
    xmlschema.XMLSchema(str(SCHEMAS / "junit.xsd")).validate(str(folder / "junit.xml"))
    report = json.loads((folder / "ctrf.json").read_text())
    ctrf_schema().validate(report)
    (waived,) = (test for test in report["results"]["tests"] if test["name"].endswith("DEMO-003"))
    assert waived["status"] == "other" and "waived by Jo until 2026-11-23" in waived["message"]


def test_an_inconclusive_claim_is_neither_passed_nor_skipped_in_any_format(findings: dict[str, Any]) -> None:
    for row in findings["findings"]:
        row.update(verdict="inconclusive", reason="not run")
    document = junit(typed(findings)).decode()
    assert document.count("<error ") == len(findings["findings"]) and "<skipped" not in document
    report = ctrf(typed(findings), {})["results"]
    assert {test["status"] for test in report["tests"]} == {"other"}
    assert report["summary"]["skipped"] == report["summary"]["passed"] == report["summary"]["pending"] == 0
    predicate = intoto_statement(typed(findings), {}, {}, "f" * 64)["predicate"]
    assert predicate["passedTests"] == predicate["warnedTests"] == []
    assert len(predicate["failedTests"]) == len(findings["findings"])


def test_the_schemas_can_refuse(findings: dict[str, Any]) -> None:
    junit_schema = xmlschema.XMLSchema(str(SCHEMAS / "junit.xsd"))
    good = junit(typed(findings)).decode()
    for old, new in (
        ('tests="2"', 'tests="many"'),
        ('name="DEMO-003"', 'title="DEMO-003"'),
        ("<error ", '<error colour="red" '),
        ('time="', 'time="-'),
        ("testcase", "testcast"),
        ("+00:00", " o'clock"),
    ):
        assert old in good
        assert not junit_schema.is_valid(good.replace(old, new)), new
    report = ctrf(typed(findings), {})
    for path, value in (
        (("reportFormat",), "JUnit"),
        (("specVersion",), "1"),
        (("timestamp",), "yesterday"),
        (("results", "tests", 0, "status"), "inconclusive"),
        (("results", "tests", 0, "duration"), 1.5),
        (("results", "tests", 0, "suite"), []),
        (("results", "summary", "passed"), "1"),
        (("results", "summary", "unknown"), 1),
        (("results", "environment", "profile"), "cpu"),
    ):
        changed: Any = copy.deepcopy(report)
        place = changed
        for part in path[:-1]:
            place = place[part]
        place[path[-1]] = value
        assert not ctrf_schema().is_valid(changed), path


def test_the_statement_passes_only_with_exit_code_zero(findings: dict[str, Any]) -> None:
    statement = json.loads((findings["folder"] / "statement.intoto.json").read_text())
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["predicateType"] == "https://in-toto.io/attestation/test-result/v0.1"
    assert statement["predicate"]["result"] == "FAILED"  # one claim is prose
    assert statement["predicate"]["warnedTests"] == []  # some policies accept a warned test
    assert "demo-v1::DEMO-003" in statement["predicate"]["failedTests"]
    assert {subject["name"] for subject in statement["subject"]} >= {"findings.json", "teacher.gguf"}
    good = {**findings, "exit_code": 0}
    clean = {"commit": "c" * 40, "dirty": False}
    made = intoto_statement(typed(good), clean, {}, "f" * 64)
    assert made["predicate"]["result"] == "PASSED"
    assert {"name": "q4kd", "digest": {"gitCommit": "c" * 40}} in made["subject"]
    dirty = intoto_statement(typed(good), {**clean, "dirty": True}, {}, "f" * 64)
    assert all("gitCommit" not in subject["digest"] for subject in dirty["subject"])


def test_the_message_says_why(findings: dict[str, Any]) -> None:
    first, prose = typed(findings).rows
    expected = "300.0 is over" if first.verdict == "falsified" else "measured 100.0, bound <= 100.5"
    assert (first.message, prose.message) == (expected, "prose")
    assert ctrf(typed(findings), {})["results"]["tests"][0]["message"] == expected
