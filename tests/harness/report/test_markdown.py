import json
from pathlib import Path

import pytest
from example_bundle import register
from markdown_it import MarkdownIt
from markdown_it.token import Token
from report_bundles import TEXTS, build_hostile, build_mixed

from q4kd.harness.__main__ import main
from q4kd.harness.bundle.writer import MANIFEST, seal
from q4kd.harness.records.store import DirectoryStore, MemoryStore, snapshot
from q4kd.harness.report.markdown import MAX_BYTES, code, render_markdown


@pytest.fixture(autouse=True)
def checks(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)


def tokens(text: str) -> list[Token]:
    """Return the blocks and the pieces of text that a CommonMark reader with tables sees."""
    blocks = MarkdownIt("commonmark").enable("table").parse(text)
    return [token for block in blocks for token in (block, *(block.children or []))]


def test_a_comment_says_what_fell_what_is_open_and_how_to_verify(tmp_path: Path) -> None:
    text = (build_mixed(tmp_path) / "findings.md").read_text()
    assert text.startswith("## ✗ Failed: 1 of 4 claims fell\n")
    assert "| `demo-v1` | 2 | 1 | 1 | 1 | 3 of 3 |" in text
    fell, undecided = text.index("### Fell"), text.index("### Could not be judged")
    assert "counterexample: `100.0 is over`" in text[fell:undecided]
    assert "most likely means: `it does not`" in text[fell:undecided]
    assert "`prose` (the claim has no executable falsifier): 1 claim\n  - `demo-v1::DEMO-003`" in text[undecided:]
    assert "1 claim: `needs cuda; profile cpu provides cpu`" in text
    assert "q4kd evidence verify BUNDLE --contracts DIR" in text


def test_text_of_a_bundle_makes_no_markup(tmp_path: Path) -> None:
    text = render_markdown(DirectoryStore(build_hostile(tmp_path)))
    found = tokens(text)
    kinds = {token.type for token in found}
    assert not kinds & {"html_inline", "html_block", "link_open", "image", "em_open", "autolink"}
    plain = " ".join(token.content for token in found if token.type == "text")
    assert "script" not in plain and "@user" not in plain and "http" not in plain
    assert any("<script>alert(1)</script>" in token.content for token in found if token.type == "code_inline")
    assert all(line.isprintable() for line in text.split("\n"))
    header, row = (line.count("|") for line in text.split("\n") if line.startswith("| "))
    assert header == row == 7


@pytest.mark.parametrize(
    "text", ["`", "``` a ```", "a`b``c", "\\`", " `x` ", "`" * 100, "|", "\n\n# b\n", "\x1b[0m", TEXTS]
)
def test_nothing_leaves_its_code_span(text: str) -> None:
    kinds = [token.type for token in tokens(f"a {code(text)} b") if token.type not in ("inline",)]
    assert kinds == ["paragraph_open", "text", "code_inline", "text", "paragraph_close"]
    cell = [token.type for token in tokens(f"| h |\n|---|\n| {code(text)} |")]
    assert cell.count("td_open") == cell.count("code_inline") == 1


def test_a_comment_of_any_bundle_fits(tmp_path: Path) -> None:
    files = snapshot(DirectoryStore(build_mixed(tmp_path)), "demo").files
    document = json.loads(files["findings.json"])
    row = document["findings"][2] | dict.fromkeys(("rule", "if_fails"), "漢" * 900)
    document["findings"] = [row] * 200
    text = render_markdown(MemoryStore(files | {"findings.json": json.dumps(document).encode()}, "demo"))
    assert len(text.encode()) < MAX_BYTES and "claims more, see `findings.json`" in text
    assert text.endswith("```\n")


def test_the_command_prints_it_and_an_old_bundle_without_it_still_verifies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = build_mixed(tmp_path)
    assert main(["evidence", "report", str(folder), "--format", "md"]) == 0
    assert capsys.readouterr().out == (folder / "findings.md").read_text()
    assert main(["evidence", "report", str(folder), "--format", "md", "--out", str(tmp_path / "c.md")]) == 0
    assert (tmp_path / "c.md").read_text() == (folder / "findings.md").read_text()
    assert "findings.md" in (folder / MANIFEST).read_text() and main(["evidence", "verify", str(folder)]) == 0
    (folder / "findings.md").write_text("all is well")
    assert main(["evidence", "verify", str(folder)]) == 1
    (folder / "findings.md").unlink()
    assert main(["evidence", "verify", str(folder)]) == 1
    seal(folder)
    assert main(["evidence", "verify", str(folder)]) == 0
