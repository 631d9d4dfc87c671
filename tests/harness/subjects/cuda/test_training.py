"""Runs in turn in one process: what the GPU's experiments do, on the CPU, and how their evidence is read."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from q4kd.harness.__main__ import build_parser
from q4kd.harness.inputs.arrays import read_arrays
from q4kd.harness.runs.experiment import EXPERIMENTS, Inputs
from q4kd.harness.runs.user_inputs import GivenFiles
from q4kd.harness.subjects.cuda import training
from q4kd.trainer.cli.arguments import read_run_arguments
from q4kd.trainer.files import read_json, write_json

REPEATED = 2


def run_commands(folder: Path, commands: list[tuple[str, list[str]]], *words: str) -> subprocess.CompletedProcess[str]:
    write_json(folder / "cases.json", {"commands": commands})
    argv = [sys.executable, "-m", "q4kd.harness.child", "--", "probe", "commands", "--cases", "cases.json"]
    return subprocess.run(
        [*argv, "--out", "commands.json", *words],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_stopped_runs_are_resumed_to_the_bit_and_laid_beside_those_left_alone(tmp_path: Path) -> None:
    inputs = Inputs(tmp_path / "inputs", "cpu")
    run_dir = tmp_path / "cuda-resumed-runs"
    (run_dir / "arrays").mkdir(parents=True)
    commands = training.resume_commands(inputs, "cpu")
    done = run_commands(run_dir, commands, "--deterministic")
    assert done.returncode == 0, done.stderr
    assert read_json(run_dir / "commands.json")["commands"] == {name: {"exit code": 0} for name, _argv in commands}
    facts = training.collect_resumed(run_dir, inputs)
    equal = {"weights: final models are equal": True, "adapters: final models are equal": True}
    assert facts["tables"] == {"resumed": equal}
    for name in ("resumed", "again"):
        pair = read_arrays(run_dir / "arrays" / f"{name}.npz")
        assert pair["subject"].shape == (REPEATED * training.STEPS, 4)
        assert np.array_equal(pair["subject"], pair["reference"])
    (run_dir / "weights-whole" / "model" / "model.safetensors").write_bytes(b"other")
    spoilt = training.collect_resumed(run_dir, inputs)
    assert spoilt["tables"] == {"resumed": equal | {"weights: final models are equal": False}}
    (run_dir / "adapters-stopped" / "model" / "model.safetensors").unlink()
    spoilt = training.collect_resumed(run_dir, inputs)
    assert spoilt["tables"] == {"resumed": dict.fromkeys(equal, False)}
    lines = (run_dir / "weights-whole.jsonl").read_text().splitlines()
    (run_dir / "weights-whole.jsonl").write_text("\n".join(line for line in lines if '"step": 8' not in line) + "\n")
    assert training.collect_resumed(run_dir, inputs) == {"comparators": {}}


def test_commands_end_with_the_first_that_fails(tmp_path: Path) -> None:
    commands = [("one", ["contracts", "show", "no-such-contract"]), ("two", ["--version"])]
    done = run_commands(tmp_path, commands)
    assert done.returncode == 2, done.stderr
    assert read_json(tmp_path / "commands.json") == {"commands": {"one": {"exit code": 2}}}


def planned_run(folder: Path, *, driver: int | None) -> Path:
    """Write what a run of the plan's experiment leaves: 1,000 bytes planned, 1,050 allocated, 1,100 reserved."""
    run_dir = folder / "cuda-planned-runs"
    (run_dir / "arrays").mkdir(parents=True)
    commands, samples = {}, []
    for number, name in enumerate(training._PLANNED):
        start = 100.0 * number
        commands[name] = {"exit code": 0, "allocated": 1050, "reserved": 1100, "left before": 5}
        events = [
            {"event": "memory_plan", "t": start + 1, "peak_bytes": 1000, "phases": {"loss": 1000}},
            {"event": "step", "t": start + 5},
            {"event": "step", "t": start + 9},
        ]
        (run_dir / f"{name}.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
        # What lies before the plan and after the last step is not the run's.
        for after, size in ((0.5, 9000), (1.5, 600), (5, 1500), (8, driver), (9.5, 9000)):
            samples.append({"t": start + after, "gpu_bytes": size})
    (run_dir / "memory.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    write_json(run_dir / "commands.json", {"commands": commands})
    return run_dir


def test_plans_are_laid_beside_both_peaks_and_the_growth_seen_outside(tmp_path: Path) -> None:
    run_dir = planned_run(tmp_path, driver=1720)
    inputs = Inputs(tmp_path / "inputs", "cpu")
    facts = training.collect_planned(run_dir, inputs)
    assert facts["tables"] == {"planned bytes": {f"{name}, loss phase": 1000 for name in training._PLANNED}}
    comparators = facts["comparators"]
    assert isinstance(comparators, dict) and sorted(comparators) == ["allocated", "driver", "reserved"]
    for name, taken in (("allocated", 1050), ("reserved", 1100), ("driver", 1120)):
        pair = read_arrays(run_dir / "arrays" / f"{name}.npz")
        assert pair["subject"].tolist() == [[1000.0]] * 6 and pair["reference"].tolist() == [[float(taken)]] * 6


@pytest.mark.parametrize("missing", ["a sample of the driver", "a setting", "its events"])
def test_a_plan_is_not_judged_by_half_of_its_evidence(missing: str, tmp_path: Path) -> None:
    run_dir = planned_run(tmp_path, driver=None if missing == "a sample of the driver" else 1720)
    commands = read_json(run_dir / "commands.json")["commands"]
    if missing == "a setting":
        write_json(run_dir / "commands.json", {"commands": {**commands, "wide": {"exit code": 1}}})
    if missing == "its events":
        (run_dir / "wide.jsonl").unlink()
    assert training.collect_planned(run_dir, Inputs(tmp_path / "inputs", "cpu")) == {"comparators": {}}


def test_the_planned_runs_are_command_lines_of_runs_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "padded_teacher", lambda inputs, _rows: training.demo_teacher(inputs))
    commands = training.planned_commands(Inputs(tmp_path, "cpu"))
    assert [name for name, _argv in commands][2:] == list(training._PLANNED)
    for name, argv in commands:
        args = build_parser().parse_args(argv)
        config = read_run_arguments(args)
        assert (config.device, config.seq_len, config.max_steps, config.out) == ("cuda", 256, 3, Path(name))
        assert args.events == Path(f"{name}.jsonl")
    settings = dict(zip((name for name, _argv in commands), (argv for _name, argv in commands), strict=True))
    assert "gradient_checkpointing=true" in settings["checkpointing"] and "lora_rank=16" in settings["adapters"]


def test_experiments_on_a_gpu_say_so_and_the_others_see_none() -> None:
    for experiment in EXPERIMENTS.values():
        seen = [experiment.environment(arm).get("CUDA_VISIBLE_DEVICES") for arm in experiment.arms]
        on_gpu = "cuda" in experiment.needs
        assert seen == [None if on_gpu else ""] * len(experiment.arms), experiment.name
        assert on_gpu == any(word in experiment.name for word in ("cuda", "7b", "unified-allocation")), experiment.name


def test_the_wall_of_a_run_is_laid_beside_its_steps(tmp_path: Path) -> None:
    experiment, inputs = EXPERIMENTS["cuda-wall"], Inputs(tmp_path / "inputs", "cpu")
    (arm,) = experiment.arms
    words = arm.argv(inputs)
    assert words[0] == "distill" and {"steps=200", "eval_every=100", "checkpoint_every=100"} <= set(words)
    (tmp_path / "arrays").mkdir()
    # A step ends every 0.2 s, of which it took 0.16 s with its data; the process took 20 s more.
    steps = [{"event": "step", "t": 100 + 0.2 * n, "step": n, "seconds": 0.15, "data_s": 0.01} for n in range(1, 201)]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    assert experiment.collect(tmp_path, inputs) == {"comparators": {}}
    write_json(tmp_path / "exit.json", {"wall_s": 80.0, "start_t": 90.0})
    (tmp_path / "run").mkdir()
    write_json(tmp_path / "run" / "summary.json", {"wall_seconds": 79.0})
    facts = experiment.collect(tmp_path, inputs)
    assert set(facts["comparators"]) == {"wall"} and facts["figures"]["summary"] == {"wall_seconds": 79.0}
    assert facts["figures"]["seconds from the start to the first step"] == pytest.approx(10.04)
    with np.load(tmp_path / "arrays" / "wall.npz") as arrays:
        np.testing.assert_allclose(arrays["subject"], [[0.2 * 199 + 0.16], [0.2 * 100]])
        np.testing.assert_allclose(arrays["reference"], [[32.0], [0.16 * 100]])


def test_the_wall_of_a_given_pair_is_that_of_its_process(tmp_path: Path) -> None:
    given = GivenFiles(teacher=tmp_path / "t.gguf", student=tmp_path / "student", data=tmp_path / "text.txt")
    experiment, inputs = EXPERIMENTS["cuda-wall"], Inputs(tmp_path / "inputs", "cpu", given=given)
    (arm,) = experiment.arms
    assert {"steps=1000", str(tmp_path / "t.gguf")} <= set(arm.argv(inputs))
    (tmp_path / "arrays").mkdir()
    steps = [{"event": "step", "t": 100 + 0.2 * n, "step": n, "seconds": 0.15, "data_s": 0.01} for n in range(1, 1001)]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    write_json(tmp_path / "exit.json", {"wall_s": 240.0, "start_t": 90.0})
    (tmp_path / "run").mkdir()
    write_json(tmp_path / "run" / "summary.json", {"wall_seconds": 239.0})
    experiment.collect(tmp_path, inputs)
    with np.load(tmp_path / "arrays" / "wall.npz") as arrays:
        np.testing.assert_allclose(arrays["subject"], [[240.0], [0.2 * 900]])
        np.testing.assert_allclose(arrays["reference"], [[160.0], [0.16 * 900]])
