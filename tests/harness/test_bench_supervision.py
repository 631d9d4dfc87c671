"""The bench of supervision: what it reads of a run, that both ways run the same command, and what it writes."""

import json
import sys
from pathlib import Path

import pytest

from q4kd.harness import bench_supervision as bench

# Writes what a run writes: one more event than are skipped, steps that take longer and longer.
FAKE = """
import json, os, sys
with open("events.jsonl", "w") as file:
    for step in range(1, int(sys.argv[1]) + 1):
        event = {"event": "step", "step": step, "seconds": step * 1.0, "data_s": 0.5}
        file.write(json.dumps(event) + "\\n")
        file.write(json.dumps({"event": "evaluation", "seconds": 1e9, "data_s": 0.0}) + "\\n")
print("threads", os.environ["OMP_NUM_THREADS"])
"""


def fake_command(steps: int) -> list[str]:
    return [sys.executable, "-c", FAKE, str(steps)]


def test_seconds_of_a_step_are_the_median_of_those_after_the_first(tmp_path: Path) -> None:
    events = [{"event": "step", "seconds": float(seconds), "data_s": 0.25} for seconds in (9, 9, 9, 9, 9, 1, 2, 30)]
    events.insert(3, {"event": "checkpoint"})  # type: ignore[arg-type]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    assert bench.step_seconds(tmp_path) == 2.25


def test_both_ways_run_the_command_in_its_folder(tmp_path: Path) -> None:
    bare, watched = tmp_path / "bare", tmp_path / "watched"
    bare.mkdir()
    watched.mkdir()
    # Steps 6 to 8 count: 6.5, 7.5 and 8.5 seconds.
    assert bench.run_bare(fake_command(8), bare) == 7.5
    seconds, share = bench.run_watched(fake_command(8), watched)
    assert seconds == 7.5
    assert 0 < share < 10
    assert (bare / "stdout.log").read_text() == (watched / "stdout.log").read_text() == "threads 1\n"


def test_arguments_and_pairs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    words: list[str] = []

    def run_bare(command: list[str], folder: Path) -> float:
        order.append("bare")
        words[:] = command
        return 2.0

    def run_watched(command: list[str], folder: Path) -> tuple[float, float]:
        order.append("watched")
        assert folder.is_dir()
        return 2.02 if order.count("watched") == 1 else 2.1, 0.03

    monkeypatch.setattr(bench, "run_bare", run_bare)
    monkeypatch.setattr(bench, "run_watched", run_watched)
    assert bench.main(["--pairs", "3", "--steps", "17", "--out", str(tmp_path / "out")]) == 0
    # Who goes first changes: a machine that warms up favours neither.
    assert order == ["watched", "bare", "bare", "watched", "watched", "bare"]
    assert "steps=17" in words
    assert words[1:5] == ["-P", "-m", "q4kd.harness.child", "--"]
    found = json.loads((tmp_path / "out" / "supervision.json").read_text())
    assert found["ratio"] == {"median": 1.05, "least": 1.01, "greatest": 1.05}
    assert found["supervisor_share_of_a_core"] == 0.03
    assert found["steps"] == 17
    assert len(found["pairs"]) == 3
    assert "median of 3 pairs: 1.0500" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--pairs", "many"])
