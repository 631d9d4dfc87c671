import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from example_bundle import CONTRACT, PROSE, build, register, write_run

from q4kd.harness.__main__ import main
from q4kd.harness.plots import ceiling_bytes, loss_plots, memory_plots, thin
from q4kd.harness.raw import DirectoryStore, RawRun, read_runs
from q4kd.harness.report import render

NASTY = "<script>alert(1)</script>"


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


def write_arm(folder: Path, slope: float, seed: int) -> None:
    write_run(folder)
    rows = [{"v": 1, "event": "imports_done", "t": 100.4}]
    for step in range(50):
        loss = 5 * math.exp(-slope * step) + 0.01 * seed
        rows.append({"v": 1, "event": "step", "t": 101.0 + step, "step": step, "ce": loss, "loss": loss * 9})
        if step % 10 == 0:
            rows.append({"v": 1, "event": "eval", "t": 101.0 + step, "step": step, "loss": loss + 0.1})
    (folder / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_page_leads_with_the_verdict_and_loads_nothing(tmp_path: Path) -> None:
    folder = build(tmp_path, text=CONTRACT + PROSE)
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert "1 claim corroborated, 1 inconclusive on profile cpu; 1 out of scope" in page.words
    policy = [attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
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


def memory_finding(**observation: float) -> dict[str, object]:
    ceiling = {"times": 2.0, "of": "gguf_tensor_bytes", "plus_bytes": 50}
    params = {"series": "rss_above_baseline", "phase": ["a", "b"], "ceiling": ceiling}
    check = {"check": "memory_ceiling", "params": params, "observation": observation}
    return {"findings": [{"runs": ["demo"], "checks": [check]}]}


def test_memory_is_drawn_above_its_baseline_with_the_ceiling_and_a_title(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "demo", peak=400_000_000)
    (plot,) = memory_plots(memory_finding(of_bytes=1e8), read_runs(DirectoryStore(tmp_path)))
    samples = RawRun(DirectoryStore(tmp_path), "demo").memory
    baseline = [row["rss"] for row in samples if row["t"] <= 100.4][-1]
    assert f"peak {(400_000_000 - baseline) / 1e6:.1f} MB" in plot.caption and "ceiling 200.0 MB" in plot.caption
    assert 'role="img"' in plot.svg and "<title>demo: memory" in plot.svg and "currentColor" in plot.svg
    assert plot.svg.startswith("<svg") and "<script" not in plot.svg and "imports done" in plot.svg


def test_the_ceiling_drawn_is_the_one_judged_by() -> None:
    check = memory_finding(of_bytes=100)["findings"][0]["checks"][0]  # type: ignore[index]
    assert ceiling_bytes(check) == 250
    assert ceiling_bytes({**check, "observation": {}}) is None
    assert ceiling_bytes({**check, "params": {"series": "rss", "ceiling": {"bytes": 5}}}) is None
    outside = {"outside": {"times": 3, "plus_bytes": 1}}
    assert ceiling_bytes({"check": "residency", "params": outside, "observation": {"tensor_bytes": 10}}) == 31


def test_too_few_samples_or_none_draw_nothing(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "demo", samples=19)
    runs = read_runs(DirectoryStore(tmp_path))
    assert memory_plots(memory_finding(of_bytes=1), runs) == []
    (tmp_path / "runs" / "demo" / "memory.jsonl").write_text("{")
    assert memory_plots(memory_finding(of_bytes=1), read_runs(DirectoryStore(tmp_path))) == []


def test_losses_are_means_over_seeds_of_both_arms(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        write_arm(tmp_path / "runs" / f"kd-vs-control.kd-seed{seed}", 0.05, seed)
        write_arm(tmp_path / "runs" / f"kd-vs-control.ce-seed{seed}", 0.02, seed)
    held_out, training = loss_plots(read_runs(DirectoryStore(tmp_path)))
    kd, ce = (5 * math.exp(-slope * 40) + 0.02 + 0.1 for slope in (0.05, 0.02))
    assert f"ce {ce:.4f} (3 seeds), kd {kd:.4f} (3 seeds)" in held_out.caption and "held-out" in held_out.caption
    assert f"kd {5 * math.exp(-0.05 * 49) + 0.02:.4f}" in training.caption  # ce, not the blended loss


def test_hostile_run_names_and_values_stay_text(tmp_path: Path) -> None:
    for arm in ("a$\\frac$<b>", "c"):
        write_arm(tmp_path / "runs" / "plain", 0.1, 1)
        (tmp_path / "runs" / "plain").rename(tmp_path / "runs" / f"x.{arm}-seed1".replace("\\", ""))
    plots = loss_plots(read_runs(DirectoryStore(tmp_path)))
    assert plots and all("<b>" not in plot.svg for plot in plots)


def test_thinning_keeps_the_peak() -> None:
    points = [(float(i), 1.0) for i in range(10_000)]
    points[7321] = (7321.0, 9.0)
    assert (7321.0, 9.0) in thin(points) and len(thin(points)) <= 1500


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = build(tmp_path / "a")
    bad = build(tmp_path / "b", text=CONTRACT.replace("100.5", "500.5"), peak=1800)
    assert main(["evidence", "report", str(good)]) == 0
    assert (tmp_path / "a" / "bundle-report.html").read_text() == (good / "report.html").read_text()
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
    assert main(["evidence", "index", str(tmp_path / "a")]) == 0
    assert "bundle/report.html" in (tmp_path / "a" / "index.html").read_text()
    (tmp_path / "empty").mkdir()
    assert main(["evidence", "index", str(tmp_path / "empty")]) == 2


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


def test_all_ink_of_a_plot_follows_the_page(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "demo", peak=400_000_000)
    for arm in ("kd", "ce"):
        write_arm(tmp_path / "runs" / f"x.{arm}-seed1", 0.1, 1)
    runs = read_runs(DirectoryStore(tmp_path))
    for plot in (*memory_plots(memory_finding(of_bytes=1e8), runs), *loss_plots(runs)):
        assert "#010203" not in plot.svg
        for text in re.findall(r"<text [^>]*>", plot.svg):
            assert "fill: " in text, text  # without a colour of its own, text is black on a dark page
