"""What watching a run costs the run: the same short distillation, bare and supervised, in turn.

    python -m q4kd.harness.bench_supervision [--pairs 7] [--steps 60] [--out DIR]

Both are the same command of the demo teacher, with one thread, so that the supervisor has a core of its own, as it has
on any machine with two. Compared is the median time of a step, from the run's own events; start-up is left out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from q4kd.harness.inputs.command_lines import distill_words
from q4kd.harness.inputs.demo import demo_student, demo_teacher, training_text
from q4kd.harness.runs.experiment import Inputs
from q4kd.harness.runs.supervise import child_environment, run_supervised
from q4kd.trainer.files import write_json

SAMPLE_INTERVAL_S = 0.05
SKIPPED_STEPS = 5
_LIMIT_S = 300.0


def step_seconds(folder: Path) -> float:
    """Return the median seconds of a step, data included, by the events in ``folder``."""
    lines = (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [event for event in map(json.loads, lines) if event["event"] == "step"][SKIPPED_STEPS:]
    return statistics.median(float(step["seconds"] + step["data_s"]) for step in steps)


def run_bare(command: list[str], folder: Path) -> float:
    """Run the command without anybody watching; return the median seconds of a step."""
    environment = child_environment(folder, {**os.environ, "OMP_NUM_THREADS": "1"})
    with (folder / "stdout.log").open("wb") as out:
        subprocess.run(command, cwd=folder, env=environment, stdout=out, stderr=out, check=True, timeout=_LIMIT_S)
    return step_seconds(folder)


def run_watched(command: list[str], folder: Path) -> tuple[float, float]:
    """Run the command supervised; return the median seconds of a step and the supervisor's share of one core."""
    before, started = time.process_time(), time.monotonic()
    run_supervised(
        command,
        run_dir=folder,
        cwd=folder,
        timeout_s=_LIMIT_S,
        stall_s=60.0,
        interval_s=SAMPLE_INTERVAL_S,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return step_seconds(folder), (time.process_time() - before) / (time.monotonic() - started)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and write ``supervision.json`` where asked."""
    parser = argparse.ArgumentParser(prog="python -m q4kd.harness.bench_supervision", description=__doc__)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, help="folder for supervision.json")
    options = parser.parse_args(arguments)
    pairs: list[tuple[float, float]] = []
    shares: list[float] = []
    with tempfile.TemporaryDirectory(prefix="q4kd-supervision-") as name:
        inputs = Inputs(Path(name) / "inputs", "cpu")
        words = ("--set", f"steps={options.steps}", "--set", "batch_size=16", "--set", "log_every=1")
        data = training_text(inputs, 40)
        distill = distill_words(demo_teacher(inputs), demo_student(inputs), data, *words)
        command = [sys.executable, "-P", "-m", "q4kd.harness.child", "--", *distill]
        for pair in range(options.pairs):
            found: dict[str, float] = {}
            for arm in ("bare", "watched") if pair % 2 else ("watched", "bare"):
                folder = Path(name) / f"{arm}-{pair}"
                folder.mkdir()
                if arm == "bare":
                    found[arm] = run_bare(command, folder)
                else:
                    found[arm], share = run_watched(command, folder)
                    shares.append(share)
            pairs.append((found["watched"], found["bare"]))
            print(
                f"pair {pair + 1}/{options.pairs}: watched {found['watched'] * 1e3:.2f} ms, bare "
                f"{found['bare'] * 1e3:.2f} ms",
                flush=True,
            )
    ratios = [watched / bare for watched, bare in pairs]
    result = {
        "ratio": {"median": statistics.median(ratios), "least": min(ratios), "greatest": max(ratios)},
        "supervisor_share_of_a_core": statistics.median(shares),
        "pairs": pairs,
        "steps": options.steps,
    }
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        write_json(options.out / "supervision.json", result)
    print(
        f"supervised over bare, median of {len(ratios)} pairs: {statistics.median(ratios):.4f} "
        f"({min(ratios):.4f}..{max(ratios):.4f}); the supervisor took {statistics.median(shares):.2%} of a core"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
