import json
import re
from pathlib import Path

import pytest
from example_bundle import CONTRACT, PROSE, build, register
from report_bundles import build_history, build_hostile

from q4kd.harness.__main__ import main
from q4kd.harness.bundle.writer import pack
from q4kd.harness.claims.waivers import Waiver
from q4kd.harness.report import site as index
from q4kd.harness.report.site import write_site
from q4kd.trainer.errors import InputError

STEADY = [0.80, 0.81, 0.79, 0.80]


@pytest.fixture(autouse=True)
def checks(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)


def section(page: str, name: str) -> str:
    (found,) = re.findall(rf'<section aria-labelledby="{name}">(.*?)</section>', page, re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", found).split())


def site_of(root: Path) -> dict[str, str]:
    write_site(root / "bundles", root / "site")
    return {path.name: path.read_text() for path in (root / "site").glob("*.html")}


def test_a_regression_is_marked_on_its_run(tmp_path: Path) -> None:
    list(build_history(tmp_path, [*STEADY, 0.95]))
    pages = site_of(tmp_path)
    assert sorted(pages) == ["index.html", "profile-cpu.html"]
    rows = section(pages["profile-cpu.html"], "regressions")
    assert "2026-10-05 02:00 newest DEMO-001 demo-v1 peak 80 % ▲ 95 %" in rows
    assert "▲ regression" in section(pages["profile-cpu.html"], "trends")
    assert section(pages["index.html"], "bundles").count("▲ 1 regression") == 1


def test_a_waived_claim_is_counted_as_such(tmp_path: Path) -> None:
    waiver = Waiver(claim="demo-v1::DEMO-003", owner="Jo", reason="it is being written", expires="2026-11-23")
    build(tmp_path / "bundles", text=CONTRACT + PROSE, waivers=(waiver,))
    rows = section(site_of(tmp_path)["index.html"], "bundles")
    assert "✓ Passed: 1 of 2 claims survived, 1 undecided and waived cpu 1 0 0, 1 waived" in rows


def test_a_verdict_that_fell_is_worse_and_changed_claims_come_first(tmp_path: Path) -> None:
    list(build_history(tmp_path, [0.8, 2.0]))
    pages = site_of(tmp_path)
    assert "▼ 1 worse" in section(pages["index.html"], "bundles")
    assert "Failed: 1 of 1 claim fell" in pages["profile-cpu.html"]
    history = section(pages["profile-cpu.html"], "history")
    assert history.index("DEMO-001") < history.index("DEMO-002")
    assert "✓ survived ✗ fell" in history and "- out of scope - out of scope" in history


def test_a_bound_that_was_loosened_between_two_runs_is_named(tmp_path: Path) -> None:
    folders = list(build_history(tmp_path, [0.8, 0.8, 0.8]))
    contract = folders[1] / "contracts" / "demo-v1.yaml"
    contract.write_text(contract.read_text().replace("limit: 100.5", "limit: 900"))
    pages = site_of(tmp_path)
    loosened = section(pages["profile-cpu.html"], "loosened")
    assert loosened.count("→") == 1
    assert "2026-10-01 02:00 2026-10-02 02:00 DEMO-001 demo-v1 ! peak: limit: 100.5 → 900" in loosened
    assert "! 1 loosened" in section(pages["index.html"], "bundles")
    contract.write_text("a: [")
    assert "contracts cannot be compared" in section(site_of(tmp_path)["profile-cpu.html"], "loosened")


def test_each_profile_has_its_page_and_runs_on_others_are_not_compared(tmp_path: Path) -> None:
    list(build_history(tmp_path, STEADY))
    other = list(build_history(tmp_path / "other", [0.95], profile="../h 200"))
    other[0].rename(tmp_path / "bundles" / "other")
    pages = site_of(tmp_path)
    assert sorted(pages) == ["index.html", "profile-cpu.html", "profile-h-200.html"]
    assert "None." in section(pages["profile-h-200.html"], "regressions")
    assert 'href="profile-h-200.html">../h 200<' in pages["index.html"]


def test_what_is_broken_is_listed_with_its_reason_and_stops_nothing(tmp_path: Path) -> None:
    (good,) = build_history(tmp_path, [0.8])
    bundles = tmp_path / "bundles"
    (bundles / "cut.tar.gz").write_bytes(b"\x1f\x8b nothing")
    (bundles / "odd<b>").mkdir()
    (bundles / "odd<b>" / "findings.json").write_text('{"a": NaN}')
    (bundles / "linked").mkdir()
    (bundles / "linked" / "findings.json").write_bytes((good / "findings.json").read_bytes())
    (bundles / "linked" / "environment.json").symlink_to("/etc/passwd")
    hostile = build_hostile(tmp_path / "hostile")
    hostile.rename(bundles / "hostile")
    (bundles / "notes.txt").write_text("not a bundle")
    assert write_site(bundles, tmp_path / "site") == (2, 3)
    page = (tmp_path / "site" / "index.html").read_text()
    assert "root:" not in page and "<b>" not in page and "<script" not in page
    told = section(page, "unreadable")
    assert "cut.tar.gz" in told and "odd&lt;b&gt;" in told
    assert "linked" in told and "expected the file environment.json" in told
    assert str(tmp_path) not in page  # a site is published; where it was made is nobody's affair


def test_an_environment_of_other_types_is_that_bundles_affair(tmp_path: Path) -> None:
    folders = list(build_history(tmp_path, [0.8, 0.8, 0.8]))
    for folder, odd in zip(
        folders[:2], ({"gpu": [1], "cpu": "x", "memory_bytes": []}, {"gpu": {"names": [{}]}}), strict=True
    ):
        environment = json.loads((folder / "environment.json").read_text())
        (folder / "environment.json").write_text(json.dumps(environment | odd))
    assert sum(write_site(tmp_path / "bundles", tmp_path / "site")) == 3


def test_reports_are_rendered_once_and_those_of_gone_bundles_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = list(build_history(tmp_path, [0.8, 0.8]))
    (folders[0] / "report.html").write_text("<script>not ours</script>")
    site_of(tmp_path)
    reports = tmp_path / "site" / "reports"
    first = {path.name for path in reports.iterdir()}
    assert len(first) == 2 and "not ours" not in "".join(path.read_text() for path in reports.iterdir())
    (reports / "mine.html").write_text("kept")
    monkeypatch.setattr(index, "render", lambda *_: pytest.fail("rendered again"))
    site_of(tmp_path)
    monkeypatch.undo()
    register(monkeypatch)
    for path in sorted(folders[1].rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folders[1].rmdir()
    (folders[0] / "inputs.json").write_text('{"another.gguf": {"sha256": "00", "bytes": 1}}')
    site_of(tmp_path)
    left = {path.name for path in reports.iterdir()}
    assert "mine.html" in left and len(left) == 2 and not left & first


def test_the_command_takes_folders_and_archives_and_says_what_it_wrote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack(build(tmp_path), tmp_path / "one.tar.gz")
    assert main(["evidence", "index", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/index.html: 2 bundles\n"
    page = (tmp_path / "index.html").read_text()
    assert re.search(r'href="reports/bundle-[0-9a-f]{12}\.html"', page) and 'href="reports/one-' in page
    folder_report = next((tmp_path / "reports").glob("bundle-*.html")).read_text()
    assert 'href="../bundle/runs/demo/memory.jsonl"' in folder_report
    assert main(["evidence", "index", str(tmp_path)]) == 0  # the site itself is no bundle
    assert capsys.readouterr().out.endswith("2 bundles\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    here = str(tmp_path)
    wrong = [[f"{here}/empty"], [f"{here}/none"], [here, "--out", f"{here}/file"], [here, "--out", f"{here}/a/b"]]
    for arguments in wrong:
        assert main(["evidence", "index", *arguments]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and "Traceback" not in told


def test_more_bundles_than_anybody_reads_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    list(build_history(tmp_path, [0.8, 0.8]))
    monkeypatch.setattr(index, "MAX_BUNDLES", 1)
    with pytest.raises(InputError, match="at most 1 bundles"):
        write_site(tmp_path / "bundles", tmp_path / "site")


def test_pages_and_reports_of_somebody_are_left(tmp_path: Path) -> None:
    list(build_history(tmp_path, [0.8]))
    site = tmp_path / "site"
    site.mkdir()
    for name in ("index.html", "profile-cpu.html"):
        (site / name).write_text("mine")
        with pytest.raises(InputError, match="that q4kd did not make"):
            write_site(tmp_path / "bundles", site)
        assert (site / name).read_text() == "mine"
        (site / name).unlink()
    (site / "reports" / "cpu-0123456789ab.html").write_text("mine")
    assert write_site(tmp_path / "bundles", site) == write_site(tmp_path / "bundles", site) == (1, 0)
    assert (site / "reports" / "cpu-0123456789ab.html").read_text() == "mine"
