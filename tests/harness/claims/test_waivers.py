"""Waivers: whose they are and until when; never of what is falsified; and no bundle can be given one unnoticed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from example_bundle import CONTRACT, PROSE, build, register
from typed_findings import finding

from q4kd.harness.bundle.diff import compare_bundles
from q4kd.harness.bundle.exporters import write_interchange
from q4kd.harness.bundle.findings import exit_code, headline, parse_findings
from q4kd.harness.bundle.verify import VerifyResult, verify_bundle
from q4kd.harness.bundle.writer import seal
from q4kd.harness.claims.waivers import Waiver, load_waivers
from q4kd.harness.judging.results import Findings
from q4kd.harness.records.store import DirectoryStore, open_store
from q4kd.harness.report.html import render
from q4kd.harness.report.markdown import render_markdown
from q4kd.trainer.errors import InputError

CLAIM = "demo-v1::DEMO-003"
GOOD = {"claim": CLAIM, "owner": "Jo", "reason": "its experiment is being written", "expires": "2026-11-23"}
KEYS = {CLAIM, "demo-v1::DEMO-001"}


def text(*entries: dict[str, Any]) -> str:
    return "waivers:\n" + "".join(f"- {json.dumps(entry)}\n" for entry in entries)


def load(tmp_path: Path, data: str) -> tuple[Waiver, ...]:
    path = tmp_path / "w.yaml"
    path.write_text(data)
    return load_waivers(path, KEYS)


def test_a_waiver_says_who_why_and_until_when(tmp_path: Path) -> None:
    (waiver,) = load(tmp_path, text(GOOD))
    assert str(waiver) == "waived by Jo until 2026-11-23: its experiment is being written"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("waivers: []\n", "w.yaml:1"),
        ("claims: []\n", "w.yaml:1"),
        (text(GOOD, {**GOOD, "owner": ""}), "w.yaml:3"),
        (text({**GOOD, "reason": "later"}), "too short"),
        (text({**GOOD, "forever": True}), "'forever' was unexpected"),
        (text({key: value for key, value in GOOD.items() if key != "expires"}), "'expires' is a required"),
        (text({**GOOD, "expires": "next year"}), "does not match"),
        (text({**GOOD, "expires": "2026-02-30"}), "a day of the calendar"),
        (text({**GOOD, "claim": "demo-v1::DEMO-03"}), "contract::id of a claim"),
        (text(GOOD, GOOD), "one waiver for each claim"),
        (text(GOOD).replace('"owner"', '"owner": "Al", "owner"'), "w.yaml:2"),
    ],
)
def test_anything_else_is_refused_with_its_line(tmp_path: Path, data: str, said: str) -> None:
    with pytest.raises(InputError, match=r"w\.yaml:") as caught:
        load(tmp_path, data)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("created", "holds"),
    [
        ("2026-11-23T00:00:00+00:00", True),
        ("2026-11-23T23:59:59+00:00", True),
        ("2026-11-24T00:00:00+00:00", False),
        ("2026-11-23T23:30:00-01:00", False),  # already tomorrow in UTC
        ("2026-11-24T00:30:00+01:00", True),
        ("2026-11-24T00:00:00", False),
    ],
)
def test_it_holds_to_the_end_of_its_last_day(created: str, holds: bool) -> None:
    assert Waiver(**GOOD).holds_on(created) is holds


@pytest.mark.parametrize(
    ("verdicts", "code"),
    [
        ((("corroborated", False), ("inconclusive", True)), 0),
        ((("corroborated", False), ("inconclusive", False)), 2),
        ((("corroborated", False), ("inconclusive", True), ("inconclusive", False)), 2),
        ((("inconclusive", True),), 2),  # nothing held
        ((("corroborated", False), ("falsified", True)), 1),
        ((("falsified", False), ("inconclusive", True)), 1),
    ],
)
def test_the_exit_code_forgives_only_what_is_inconclusive(verdicts: Any, code: int) -> None:
    rows = [finding(verdict=verdict, waiver=Waiver(**GOOD) if waived else None) for verdict, waived in verdicts]
    assert exit_code(rows, "full") == code
    assert exit_code(rows, "partial") == max(code, 2) if code != 1 else exit_code(rows, "partial") == 1


# --- bundles ---


@pytest.fixture(autouse=True)
def demo(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)


def made(root: Path, **changes: Any) -> Path:
    return build(root, text=CONTRACT + PROSE, waivers=(Waiver(**{**GOOD, **changes}),))


def findings_of(bundle: Path) -> Findings:
    return parse_findings((bundle / "findings.json").read_bytes(), "findings.json")


def test_a_waived_bundle_verifies_and_says_so_everywhere(tmp_path: Path) -> None:
    bundle = made(tmp_path)
    findings = findings_of(bundle)
    rows = {row.id: row.to_json() for row in findings.rows}
    assert (findings.exit_code, findings.summary["waived"], findings.summary["inconclusive"]) == (0, 1, 0)
    assert rows["DEMO-003"]["waiver"] == GOOD and "waiver" not in rows["DEMO-001"]
    assert "1 inconclusive and waived" in headline(findings)
    predicate = json.loads((bundle / "statement.intoto.json").read_text())["predicate"]
    assert (predicate["result"], predicate["warnedTests"], predicate["failedTests"]) == ("WARNED", [CLAIM], [])
    assert b"<error" in (bundle / "junit.xml").read_bytes()
    assert b"waived by Jo until 2026-11-23" in (bundle / "junit.xml").read_bytes()
    result = verify_bundle(bundle, tmp_path / "contracts")
    assert (result.status, result.problems) == ("consistent", ())
    assert f"{CLAIM} may be inconclusive: {Waiver(**GOOD)}" in result.caveats


def test_report_and_comment_say_who_waived_what_until_when(tmp_path: Path) -> None:
    store = DirectoryStore(made(tmp_path))
    page, comment = render(store), render_markdown(store)
    title = "Passed: 1 of 2 claims survived, 1 undecided and waived"
    assert f"</span></span>{title}</h1>" in page and f"## ✓ {title}" in comment
    assert "? undecided, 1 of them waived" in page and "(waived)</span>" in page
    assert "by Jo until 2026-11-23: its experiment is being written" in page
    assert f"- `{CLAIM}`: `prose`" in comment and "### Could not be judged\n" not in comment
    assert "  - by `Jo` until 2026-11-23: `its experiment is being written`" in comment


def test_report_and_comment_tell_of_an_expired_waiver(tmp_path: Path) -> None:
    store = DirectoryStore(made(tmp_path, expires="2026-11-22"))
    page, comment = render(store), render_markdown(store)
    title = "Not passed: 1 of 2 claims could not be judged"
    assert f"</span></span>{title}</h1>" in page and f"## ? {title}" in comment
    for text in (page, comment):
        assert f"error: the waiver of {CLAIM} by Jo expired on 2026-11-22 and does not apply" in text
        assert "of them waived" not in text


def test_hostile_waivers_are_escaped_and_one_without_a_day_is_refused(tmp_path: Path) -> None:
    bundle = made(tmp_path, owner="<b>@jo</b>`")
    findings = json.loads((bundle / "findings.json").read_text())
    page, comment = render(DirectoryStore(bundle)), render_markdown(DirectoryStore(bundle))
    assert "<b>@jo" not in page and "&lt;b&gt;@jo&lt;/b&gt;" in page
    assert "by `<b>@jo</b>\\x60` until" in comment
    row_of(findings, CLAIM)["waiver"]["expires"] = "<i>"
    (bundle / "findings.json").write_text(json.dumps(findings))
    for reader in (render, render_markdown):
        with pytest.raises(InputError, match="waiver"):
            reader(DirectoryStore(bundle))


def test_an_expired_waiver_is_on_record_and_excuses_nothing(tmp_path: Path) -> None:
    bundle = made(tmp_path, expires="2026-11-22")
    findings = findings_of(bundle)
    assert (findings.exit_code, findings.summary["waived"], findings.summary["inconclusive"]) == (2, 0, 1)
    result = verify_bundle(bundle, tmp_path / "contracts")
    assert result.status == "consistent"
    assert any("expired on 2026-11-22 and does not apply" in caveat for caveat in result.caveats)


def test_a_waiver_of_a_falsified_claim_excuses_nothing(tmp_path: Path) -> None:
    waiver = Waiver(**{**GOOD, "claim": "demo-v1::DEMO-001"})
    bundle = build(tmp_path, peak=900, waivers=(waiver,))
    findings = findings_of(bundle)
    assert findings.exit_code == 1 and findings.rows[0].waiver is None
    assert verify_bundle(bundle).status == "consistent"


def edited(bundle: Path, plan: Callable[[Any], None], findings: Callable[[Any], None]) -> VerifyResult:
    for name, edit in (("plan.json", plan), ("findings.json", findings)):
        value = json.loads((bundle / name).read_text())
        edit(value)
        (bundle / name).write_text(json.dumps(value))
    write_interchange(bundle, DirectoryStore(bundle))
    seal(bundle)
    return verify_bundle(bundle)


def nothing(_value: Any) -> None:
    return None


def row_of(findings: Any, claim: str) -> Any:
    return next(row for row in findings["findings"] if row["key"] == claim)


@pytest.mark.parametrize(
    ("plan", "findings", "said"),
    [
        (lambda plan: plan.pop("waivers"), nothing, "waiver recorded is not what the plan gives"),
        (lambda plan: plan["waivers"][0].update(expires="2026-11-22"), nothing, "waiver recorded is not"),
        (lambda plan: plan["waivers"][0].update(owner="Al"), nothing, "waiver recorded is not"),
        (lambda plan: plan["waivers"].append({**GOOD, "expires": "2026-12-01"}), nothing, "waived twice"),
        (lambda plan: plan["waivers"].append({**GOOD, "claim": "a::b"}), nothing, "which is no claim"),
        (nothing, lambda found: row_of(found, CLAIM).pop("waiver"), "waiver recorded is not what the plan gives"),
        (nothing, lambda found: row_of(found, CLAIM)["waiver"].update(reason="because of reasons"), "waiver recorded"),
        (nothing, lambda found: found["summary"].pop("waived"), "summary recorded"),
        (nothing, lambda found: found.update(exit_code=2), "exit code recorded as 2"),
    ],
)
def test_edited_waivers_fail_by_recomputation(tmp_path: Path, plan: Any, findings: Any, said: str) -> None:
    result = edited(made(tmp_path), plan, findings)
    assert result.status == "mismatch"
    assert said in " ".join(result.problems)


@pytest.mark.parametrize(
    "waivers", [{"a": 1}, ["x"], [{**GOOD, "expires": "soon"}], [{**GOOD, "owner": 3}], [{"claim": CLAIM}], 7]
)
def test_a_hostile_plan_breaks_nothing(tmp_path: Path, waivers: Any) -> None:
    result = edited(made(tmp_path), lambda plan: plan.update(waivers=waivers), nothing)
    assert result.status in ("mismatch", "unverifiable")


def test_a_falsified_finding_with_a_waiver_is_no_finding(tmp_path: Path) -> None:
    bundle = made(tmp_path)
    value = json.loads((bundle / "findings.json").read_text())
    row_of(value, "demo-v1::DEMO-001")["waiver"] = GOOD
    with pytest.raises(InputError, match="findings"):
        parse_findings(json.dumps(value).encode(), "findings.json")


def test_a_new_waiver_makes_a_bundle_worse(tmp_path: Path) -> None:
    before, after = build(tmp_path / "a", text=CONTRACT + PROSE), made(tmp_path / "b")
    diff = compare_bundles(open_store(before), open_store(after))
    assert [(flip.key, flip.worse) for flip in diff.flips] == [(CLAIM, True)]
    assert diff.flips[0].new == "inconclusive(prose) [waived by Jo until 2026-11-23]"
    assert not compare_bundles(open_store(after), open_store(before)).worse
