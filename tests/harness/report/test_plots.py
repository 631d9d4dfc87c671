import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from example_bundle import write_run
from report_bundles import findings_of
from typed_findings import check_result

from q4kd.harness.judging.results import Findings
from q4kd.harness.records.raw_run import RawRun, read_runs
from q4kd.harness.records.store import DirectoryStore
from q4kd.harness.report.plots import ceiling_bytes, memory_plots, thin, utilisation_plots
from q4kd.harness.report.training import loss_plots, step_plots


def write_arm(folder: Path, slope: float, seed: int) -> None:
    write_run(folder)
    rows = [{"v": 1, "event": "imports_done", "t": 100.4}]
    for step in range(50):
        loss = 5 * math.exp(-slope * step) + 0.01 * seed
        rows.append({"v": 1, "event": "step", "t": 101.0 + step, "step": step, "ce": loss, "loss": loss * 9})
        if step % 10 == 0:
            rows.append({"v": 1, "event": "eval", "t": 101.0 + step, "step": step, "loss": loss + 0.1})
    (folder / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def memory_finding(**observation: float) -> Findings:
    ceiling = {"times": 2.0, "of": "gguf_tensor_bytes", "plus_bytes": 50}
    params = {"series": "rss_above_baseline", "phase": ["a", "b"], "ceiling": ceiling}
    return findings_of(check_result("memory_ceiling", params=params, observation=observation))


def test_memory_is_drawn_above_its_baseline_with_the_ceiling_and_a_title(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "demo", peak=400_000_000)
    (plot,) = memory_plots(memory_finding(of_bytes=1e8), read_runs(DirectoryStore(tmp_path)))
    samples = RawRun(DirectoryStore(tmp_path), "demo").memory
    baseline = [row["rss"] for row in samples if row["t"] <= 100.4][-1]
    assert f"peak {(400_000_000 - baseline) / 1e6:.1f} MB" in plot.caption and "ceiling 200.0 MB" in plot.caption
    assert 'role="img"' in plot.svg and "<title>demo, MB above" in plot.svg and "currentColor" in plot.svg
    assert plot.svg.startswith("<svg") and "<script" not in plot.svg and "imports done" in plot.svg


def test_the_ceiling_drawn_is_the_one_judged_by() -> None:
    check = memory_finding(of_bytes=100).rows[0].checks[0]
    assert ceiling_bytes(check) == 250
    assert ceiling_bytes(replace(check, observation={})) is None
    assert ceiling_bytes(replace(check, params={"series": "rss", "ceiling": {"bytes": 5}})) == 5
    outside = {"outside": {"times": 3, "plus_bytes": 1}}
    assert ceiling_bytes(check_result("residency", params=outside, observation={"tensor_bytes": 10})) == 31


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


def test_all_ink_of_a_plot_follows_the_page_and_needs_no_style(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "demo", peak=400_000_000)
    for arm in ("kd", "ce"):
        write_arm(tmp_path / "runs" / f"x.{arm}-seed1", 0.1, 1)
    runs = read_runs(DirectoryStore(tmp_path))
    for plot in (*memory_plots(memory_finding(of_bytes=1e8), runs), *loss_plots(runs)):
        assert "#0102" not in plot.svg and "style" not in plot.svg and "var(--s1)" in plot.svg
        assert len(plot.svg) < 40_000
        for text in re.findall(r"<text [^>]*>", plot.svg):
            assert 'fill="' in text, text  # without a colour of its own, text is black on a dark page


def test_ids_are_a_plots_own(tmp_path: Path) -> None:
    for experiment in ("x", "y"):
        for arm in ("kd", "ce"):
            write_arm(tmp_path / "runs" / f"{experiment}.{arm}-seed1", 0.1, 1)
    plots = loss_plots(read_runs(DirectoryStore(tmp_path)))
    ids = [found for plot in plots for found in re.findall(r'\bid="([^"]*)"', plot.svg)]
    assert len(plots) == 4 and len(ids) == len(set(ids)) > 40
    for plot in plots:
        used = re.findall(r'(?:href="#|url\(#)([^")]*)', plot.svg)
        assert used and set(used) <= set(re.findall(r'\bid="([^"]*)"', plot.svg))


def write_samples(folder: Path, events: list[tuple[str, float]], rows: list[dict[str, Any]]) -> None:
    write_run(folder)
    lines = [json.dumps({"v": 1, "event": name, "t": t}) for name, t in events]
    (folder / "events.jsonl").write_text("\n".join(lines))
    (folder / "memory.jsonl").write_text("\n".join(json.dumps({"pid": 7, **row}) for row in rows))


def finding(check: str, params: dict[str, Any]) -> Findings:
    return findings_of(check_result(check, params=params))


def test_a_ceiling_holds_in_its_phase_and_nowhere_else(tmp_path: Path) -> None:
    rows = [{"t": t / 2, "rss": 1, "gpu_bytes": 9e9 if t > 60 else 5e9} for t in range(80)]
    events = [("imports_done", 1.0), ("hold_started", 10.0), ("held", 20.0), ("done", 35.0)]
    write_samples(tmp_path / "runs" / "demo", events, rows)
    params = {"series": "gpu_bytes", "phase": ["hold_started", "held"], "ceiling": {"bytes": 6e9}}
    (plot,) = memory_plots(finding("memory_ceiling", params), read_runs(DirectoryStore(tmp_path)))
    assert "peak 5000.0 MB from hold to held, ceiling 6000.0 MB" in plot.caption and "9000" not in plot.caption
    (line,) = re.findall(r'd="M ([\d.]+) [\d.]+ L ([\d.]+) [\d.]+"[^>]*stroke="var\(--bad\)"', plot.svg)
    (curve,) = re.findall(r'd="M ([\d.]+) [^"]*L ([\d.]+) [\d.]+"[^>]*stroke="var\(--s1\)"', plot.svg)
    drawn, whole = (float(end) - float(begin) for begin, end in (line, curve))
    assert 0.2 < drawn / whole < 0.3  # 10 s of 39


def test_memory_taken_from_the_machine_is_drawn_upwards(tmp_path: Path) -> None:
    rows = [{"t": t / 2, "rss": 1, "mem_available": 20e9 - (3e9 if t > 10 else 0)} for t in range(40)]
    write_samples(tmp_path / "runs" / "demo", [("imports_done", 2.0), ("done", 19.0)], rows)
    params = {"series": "mem_available_drop", "phase": ["imports_done", "done"], "ceiling": {"bytes": 4e9}}
    (plot,) = memory_plots(finding("memory_ceiling", params), read_runs(DirectoryStore(tmp_path)))
    assert "peak 3000.0 MB" in plot.caption and "taken from the machine" in plot.caption


def test_utilisation_is_drawn_where_it_was_claimed_and_recorded(tmp_path: Path) -> None:
    rows = [{"t": t / 2, "rss": 1, "gpu_sm": None if t % 2 else 97} for t in range(60)]
    write_samples(tmp_path / "runs" / "demo", [("imports_done", 2.0)], rows)
    runs = read_runs(DirectoryStore(tmp_path))
    (plot,) = utilisation_plots(finding("gpu_utilization", {"min_percent": 90}), runs)
    assert "30 samples, highest 97 %" in plot.caption and "at least 90 %" in plot.caption
    assert utilisation_plots(finding("residency", {}), runs) == []
    write_samples(tmp_path / "odd" / "runs" / "demo", [("imports_done", 2.0)], [{**row, "gpu_sm": 101} for row in rows])
    odd = read_runs(DirectoryStore(tmp_path / "odd"))
    assert utilisation_plots(finding("gpu_utilization", {"min_percent": 90}), odd) == []


def write_steps(folder: Path, count: int, **more: float) -> None:
    write_run(folder)
    rows = [
        {"v": 1, "event": "step", "t": 101.0 + step, "step": step, "data_s": 0.001, "teacher_s": 0.02,
         "student_s": 0.03, "optimizer_s": 0.004, "seconds": 9.0 if step < 2 else 0.06 + step / 1000, **more}
        for step in range(count)
    ]  # fmt: skip
    (folder / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_time_of_a_step_is_split_into_medians_that_add_up(tmp_path: Path) -> None:
    for seed in (1, 2):
        write_steps(tmp_path / "runs" / f"x.kd-seed{seed}", 10, teacher_s=0.01 * seed)
    write_steps(tmp_path / "runs" / "short", 7)
    write_steps(tmp_path / "runs" / "odd", 10, student_s=-1.0)
    (plot,) = step_plots(read_runs(DirectoryStore(tmp_path)))
    assert plot.rows == (("x.kd (2 seeds)", "1.00", "15.00", "30.00", "4.00", "15.50", "65.50"),)
    assert plot.columns == ("run", "data", "teacher", "student", "optimiser", "other", "in all")
    assert step_plots({}) == []
