import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from example_bundle import CONTRACT, PROSE, build, register
from markupsafe import Markup
from report_bundles import NASTY, TEXTS, build_mixed

from q4kd.harness.__main__ import main
from q4kd.harness.records.store import DirectoryStore, MemoryStore, snapshot
from q4kd.harness.report.claims import bar_of
from q4kd.harness.report.html import MAX_PAGE, render
from q4kd.harness.report.page import _environment, cut
from q4kd.harness.report.page import shown as spelt


@pytest.fixture(autouse=True)
def checks(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_data(self, data: str) -> None:
        self.words += data


def test_the_page_leads_with_the_verdict_and_loads_nothing(tmp_path: Path) -> None:
    folder = build(tmp_path, text=CONTRACT + PROSE)
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert "1 claim corroborated, 1 inconclusive on profile cpu; 1 out of scope" in page.words
    policies = [attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    digest = base64.b64encode(hashlib.sha256(text.split("<style>")[1].split("</style>")[0].encode()).digest()).decode()
    assert policies == [f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"]
    assert not [a for _, a in page.tags if "style" in a]
    assert not {"script", "link", "iframe", "img", "object", "form"} & {tag for tag, _ in page.tags}
    assert not [a for _, a in page.tags if any(key.startswith("on") for key in a)]
    assert not re.findall(r'(?:href|src|url)\s*[=(]\s*["\']?(?!#)\w+:', re.sub(r'xmlns(:\w+)?="[^"]*"', "", text))
    assert "needs cuda; profile cpu provides cpu" in page.words
    assert "prefers-color-scheme: dark" in text


def test_every_text_of_a_bundle_is_escaped(tmp_path: Path) -> None:
    folder = build(tmp_path, text=CONTRACT.replace("the peak stays low", f'"{NASTY}"'), peak=900)
    document = json.loads((folder / "findings.json").read_text())
    check = document["findings"][0]["checks"][0]
    check.update(measured=NASTY, bound=NASTY, counterexample=NASTY, observation={NASTY: "</pre>" + NASTY})
    document["findings"][0]["sabotage"][0].update(fault=NASTY, detail=NASTY)
    (folder / "findings.json").write_text(json.dumps(document))
    environment = json.loads((folder / "environment.json").read_text())
    (folder / "environment.json").write_text(json.dumps({**environment, "cpu": {"model": NASTY}}))
    text = render(DirectoryStore(folder))
    assert "<script" not in text.lower() and "alert(1)" in text and "<b>allocator" not in text
    assert [tag for tag, _ in Page(text).tags].count("html") == 1


def test_the_report_is_the_same_each_time(tmp_path: Path) -> None:
    folder = build(tmp_path)
    assert render(DirectoryStore(folder)) == (folder / "report.html").read_text()


def test_claims_stand_by_contract_with_what_fell_first_and_their_files_linked(tmp_path: Path) -> None:
    folder = build_mixed(tmp_path)
    text = (folder / "report.html").read_text()
    anchors = [attrs["id"] for tag, attrs in Page(text).tags if tag == "li" and "id" in attrs]
    assert anchors == ["claim-3", "claim-4", "claim-1", "claim-2"]
    assert text.count("<details open>") == 2  # fallen, undecided
    assert 'href="runs/pair.a/memory.jsonl"' in text and "look at the &lt;b&gt;allocator&lt;/b&gt;" in text
    assert "Every falsifier was shown able to fail" in text and "3 of 3 planted faults caught" in text
    words = " ".join(Page(text).words.split())
    assert "Failed: 1 of 4 claims fell" in words and "5 claims of 1 contract" in words
    assert "description: a demonstration" in words  # the contract as run
    assert "DEMO-00111/11✓caught" in words  # the kill matrix


def test_a_fault_that_was_missed_is_said_at_the_top_and_in_the_matrix(tmp_path: Path) -> None:
    folder = build_mixed(tmp_path)
    document = json.loads((folder / "findings.json").read_text())
    document["findings"][0]["sabotage"][0]["caught"] = False
    (folder / "findings.json").write_text(json.dumps(document))
    words = " ".join(Page(render(DirectoryStore(folder))).words.split())
    assert "Not every falsifier was shown able to fail: 1 unnoticed" in words and "✗ not caught" in words


def test_a_page_that_lies_elsewhere_links_there_or_not_at_all(tmp_path: Path) -> None:
    store = DirectoryStore(build_mixed(tmp_path))
    assert 'href="../a%20b/runs/pair.a/memory.jsonl"' in render(store, "../a b/")
    none = render(store, None)
    assert 'href="runs' not in none and "inside the bundle" in none


def test_a_bundle_of_any_size_gives_a_page_below_two_megabytes(tmp_path: Path) -> None:
    files = snapshot(DirectoryStore(build_mixed(tmp_path)), "demo").files
    document = json.loads(files["findings.json"])
    row = document["findings"][2]
    row |= dict.fromkeys(("rule", "prediction", "if_fails"), '"' * 3000)
    row["sabotage"] = [{**row["sabotage"][0], "detail": "<" * 3000}] * 20
    document["findings"] = [row] * 60
    files |= {"findings.json": json.dumps(document).encode()}
    page = render(MemoryStore(files, "demo"))
    assert len(page.encode()) < MAX_PAGE
    assert "too large to be shown whole" in page and page.rstrip().endswith("</html>")


def test_a_broken_contract_or_run_is_shown_as_it_is(tmp_path: Path) -> None:
    folder = build_mixed(tmp_path)
    (folder / "contracts" / "demo-v1.yaml").write_text("a: [<b>")
    (folder / "runs" / "demo" / "argv.json").write_text("[")
    text = render(DirectoryStore(folder))
    assert "a: [&lt;b&gt;" in text and "unreadable" in text


@pytest.mark.parametrize(
    ("margin", "filled", "over", "words"),
    [
        (0.5, 40.0, False, "50 % of the way to the bound"),
        (1.0, 80.0, False, "100 % of the way to the bound"),
        (1.1, 88.0, True, "past the bound, 1.1 x"),
        (50.0, 100.0, True, "past the bound, 50 x"),
        (1e-9, 0.8, False, "1e-07 % of the way to the bound"),
        (0.0, 0.0, False, "0 % of the way to the bound"),
    ],
)
def test_a_bar_shows_its_margin_against_the_bound(margin: float, filled: float, over: bool, words: str) -> None:
    bar = bar_of(margin)
    assert bar is not None and (bar.filled, bar.bound, bar.over, bar.words) == (filled, 80.0, over, words)


def test_a_margin_that_is_none_has_no_bar() -> None:
    assert [bar_of(margin) for margin in (None, float("nan"), float("inf"), -1.0)] == [None] * 4


def test_hidden_characters_are_spelt_out_and_texts_end_in_time() -> None:
    assert spelt("a\tb\nc é 漢") == "a\tb\nc é 漢"
    assert spelt("\x00\x1b\x9f\u202e\u2066\ufeff\ud800\U000e0041") == (
        r"\x00\x1b\x9f\u202e\u2066\ufeff\ud800\U000e0041"
    )
    assert cut("abcdef", 4) == "abc…" and cut("abcd", 4) == "abcd" and len(cut("\x1b" * 50, 10)) == 10
    assert spelt(TEXTS).isprintable()
    assert _environment().from_string("{{ x }} {{ y }}").render(x="\u202e<", y=Markup("<b>")) == "\\u202e&lt; <b>"


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = build(tmp_path / "a")
    bad = build(tmp_path / "b", text=CONTRACT.replace("100.5", "500.5"), peak=1800)
    assert main(["evidence", "report", str(good)]) == 0
    beside = (tmp_path / "a" / "bundle-report.html").read_text()
    assert beside.replace('href="bundle/', 'href="') == (good / "report.html").read_text() != beside
    assert main(["evidence", "diff", str(good), str(bad)]) == 1
    said = capsys.readouterr().out
    assert "falsified" in said and "limit: 100.5 → 500.5" in said and "loosened" in said
    assert main(["evidence", "diff", str(good), str(good)]) == 0
    assert main(["evidence", "verify", str(good)]) == 0
    capsys.readouterr()
    (good / "sabotage" / "kills.json").unlink()
    assert main(["evidence", "verify", str(good)]) == 1
    assert main(["evidence", "verify", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert "kills.json" in said.out and "Traceback" not in said.err and said.err.count("\n") == 1


def test_the_contract_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
        (folder / "demo-v1.yaml").write_text(CONTRACT)
    assert main(["contracts", "validate", str(old)]) == 0
    assert "2 claims: 2 executable, 0 prose; 0 failed" in capsys.readouterr().out
    assert main(["contracts", "diff", str(old), str(new)]) == 0
    assert main(["contracts", "show", "demo-v1::DEMO-002", "--contracts", str(old)]) == 0
    shown = capsys.readouterr().out
    assert "DEMO-002" in shown and "DEMO-001" not in shown and "needs: cuda" in shown
    assert main(["contracts", "show", "none", "--contracts", str(old)]) == 2
    (new / "broken.yaml").write_text("a: [")
    assert main(["contracts", "validate", str(new)]) == 2
    assert "broken.yaml:1" in capsys.readouterr().err
    (tmp_path / "prose.yaml").write_text("metadata: {}\n")
    assert main(["contracts", "validate", str(tmp_path / "prose.yaml")]) == 2
    assert main(["contracts", "validate", str(tmp_path)]) == 2


@pytest.mark.parametrize(
    ("before", "after", "kind", "code"),
    [
        ("limit: 100.5", "limit: 200", "loosened", 1),
        ("limit: 100.5", "limit: 50", "tightened", 0),
        ("limit: 100.5", "limit: 100.5, floor: 1", "tightened", 0),
        ("limit: 100.5", "limit: 100.5, unit: kg", "loosened", 1),
        ("min_observations: 3", "min_observations: 2", "loosened", 1),
        ("sabotage: [ballast]", "sabotage: [other]", "loosened", 1),
        ("min_observations: 3", "needs: [cuda]", "loosened", 1),
        ("version: 1.0.0", "status: demoted", "loosened", 1),
        ("DEMO-002", "DEMO-003", "loosened", 1),
        ("min_observations: 3", "min_observations: 3\n      profiles: {gb10: {params: {limit: 900}}}", "loosened", 1),
        ("check: peak", "check: peak\n      also: [{check: peak, params: {limit: 5}}]", "tightened", 0),
    ],
)
def test_the_diff_knows_which_way_a_bound_moved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], before: str, after: str, kind: str, code: int
) -> None:
    for name, text in (("old", CONTRACT), ("new", CONTRACT.replace(before, after, 1))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "demo-v1.yaml").write_text(text)
    assert main(["contracts", "diff", str(tmp_path / "old"), str(tmp_path / "new")]) == code
    assert kind in capsys.readouterr().out
