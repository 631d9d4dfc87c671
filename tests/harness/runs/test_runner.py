import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from fakeworld.plugin import install

from q4kd.harness.runs.cores import Cores
from q4kd.harness.runs.experiment import EXPERIMENTS, Arm, Experiment, Inputs, get_experiment
from q4kd.harness.runs.runner import RAW_FILES, ExperimentRunner, HarnessError, prune
from q4kd.trainer.errors import InputError

TESTS = str(Path(__file__).parents[2] / "support")


@pytest.fixture
def runner(tmp_path, monkeypatch):
    install(monkeypatch.setattr)
    monkeypatch.setenv("PYTHONPATH", TESTS)
    return ExperimentRunner(tmp_path / "bundle", Inputs(tmp_path / "inputs", "cpu"), "cpu")


def times_run(runner, name):
    mark = runner.inputs.folder / f".ran-{name}"
    return len(mark.read_text()) if mark.exists() else 0


def test_a_run_leaves_raw_evidence_and_nothing_else(runner):
    runs = runner.run("measure")
    run = runs["measure"]
    assert run.facts == {"value": 10}
    assert run.exit["cause"] == "exited"
    assert run.fault is None
    assert run.event("done")["args"] == ["{inputs}/seed.txt"]
    assert run.argv == {
        "argv": ["python", "-m", "q4kd.harness.child", "--", "probe", "fake", "{inputs}/seed.txt"],
        "fault": None,
        "cwd": "run",
        "env": {"CUDA_VISIBLE_DEVICES": ""},
    }
    folder = runner.bundle_dir / "runs" / "measure"
    names = {path.name for path in folder.iterdir()}
    assert names == {*RAW_FILES, "arrays"} - {"harness_error.json"}
    everything = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    for place in (runner.bundle_dir, runner.inputs.folder, Path.home()):
        assert str(place).encode() not in everything
    assert run.stdout == "measured 10 in {run}\n"


def test_an_experiment_runs_once_however_often_it_is_asked_for(runner):
    threads = [threading.Thread(target=runner.run, args=("compare",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(runner.run("compare")) == {"compare.a", "compare.b"}
    assert [times_run(runner, name) for name in ("compare.a", "compare.b")] == [1, 1]


def test_an_experiment_runs_once_for_several_processes(runner, tmp_path):
    code = f"""
import sys
sys.path.insert(0, {TESTS!r})
from pathlib import Path
from fakeworld.plugin import install
install()
from q4kd.harness.runs.runner import ExperimentRunner
from q4kd.harness.runs.experiment import Inputs
root = Path({str(tmp_path)!r})
print(ExperimentRunner(root / "bundle", Inputs(root / "inputs", "cpu"), "cpu").run("measure")["measure"].facts)
"""
    workers = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ)
        for _ in range(3)
    ]
    assert [worker.communicate(timeout=60)[0] for worker in workers] == ["{'value': 10}\n"] * 3
    assert times_run(runner, "measure") == 1


def test_what_a_dead_worker_left_is_run_again(runner):
    folder = runner.bundle_dir / "runs" / "measure"
    folder.mkdir(parents=True)
    (folder / "exit.json").write_text("{}")  # the program had ended, its outputs were not measured
    (folder / "events.jsonl").write_text("garbage")
    assert runner.run("measure")["measure"].facts == {"value": 10}


def test_a_faulted_run_never_lies_among_the_clean_ones(runner):
    faulted = runner.run("measure", fault="inflate")["measure"]
    assert faulted.fault == "inflate"
    assert faulted.argv["argv"][3:5] == ["--fault", "inflate"]
    assert faulted.facts == {"value": 100}
    assert not (runner.bundle_dir / "runs").exists()
    assert runner.run("measure")["measure"].facts == {"value": 10}
    assert times_run(runner, "measure") == 2


def test_an_arm_that_a_fault_leaves_alone_is_the_clean_one(runner):
    runs = runner.run("compare", fault="inflate-b")
    assert {name: (run.fault, run.facts["value"]) for name, run in runs.items()} == {
        "compare.a": (None, 10),
        "compare.b": ("inflate-b", 100),
    }
    assert times_run(runner, "compare.a") == 1
    runner.run("compare", fault="inflate-b")
    assert times_run(runner, "compare.a") == 1
    assert runner.run("compare")["compare.b"].facts == {"value": 10}
    assert times_run(runner, "compare.a") == 1


@pytest.mark.parametrize(("name", "stage"), [("unprepared", "prepare"), ("unmeasured", "collect")])
def test_a_failure_of_the_harness_is_recorded_and_is_no_evidence(runner, name, stage):
    for _ in range(2):  # also when somebody asks again
        with pytest.raises(HarnessError, match=f"^{stage}: RuntimeError") as caught:
            runner.run(name)
        assert caught.value.stage == stage
    folder = runner.bundle_dir / "runs" / name
    recorded = json.loads((folder / "harness_error.json").read_text())
    assert recorded["stage"] == stage
    assert str(runner.inputs.folder) not in recorded["error"]
    assert not (folder / "facts.json").exists()


def test_a_program_that_does_not_start_is_a_failure_of_the_harness(runner, monkeypatch):
    from q4kd.harness.runs import runner as module

    monkeypatch.setattr(module, "LAUNCHER", ("/no-such-interpreter",))
    with pytest.raises(HarnessError, match=r"^start: FileNotFoundError"):
        runner.run("measure")


def test_stall_and_timeout_reach_the_supervisor(runner):
    assert runner.run("hang")["hang"].exit["cause"] == "stalled"
    assert runner.run("compare", arms=["a"], timeout_s=0.01)["compare.a"].exit["cause"] == "timeout"


def test_an_exclusive_experiment_waits_for_the_accelerator(runner, monkeypatch, tmp_path):
    from filelock import FileLock

    lock = tmp_path / "lock"
    monkeypatch.setattr("q4kd.harness.runs.cores.accelerator_lock", lambda: lock)
    thread = threading.Thread(target=runner.run, args=("alone",))
    with FileLock(lock):
        thread.start()
        thread.join(1.0)
        assert thread.is_alive()
        assert times_run(runner, "alone") == 0
        runner.run("measure")  # others need not wait
    thread.join(30)
    assert times_run(runner, "alone") == 1


def test_what_may_share_the_accelerator_never_runs_beside_what_must_be_alone(monkeypatch, tmp_path):
    monkeypatch.setattr("q4kd.harness.runs.cores.accelerator_lock", lambda: tmp_path / "lock")
    entered, cores = [], Cores(2)

    def hold(alone):
        with cores.accelerator(alone=alone):
            entered.append(alone)

    with cores.accelerator(alone=False):
        hold(False)  # two that share it are there together
        waiting = threading.Thread(target=hold, args=(True,))
        waiting.start()
        waiting.join(0.5)
        assert entered == [False]
    waiting.join(30)
    assert entered == [False, True]
    with cores.accelerator(alone=True):
        waiting = threading.Thread(target=hold, args=(False,))
        waiting.start()
        waiting.join(0.5)
        assert entered == [False, True]
    waiting.join(30)
    assert entered == [False, True, False]


def test_unknown_names_are_refused(runner):
    with pytest.raises(InputError, match="did you mean measure"):
        runner.run("measur")
    with pytest.raises(InputError, match="expected a known fault"):
        runner.run("measure", fault="inflat")


def test_an_arm_may_set_only_the_variables_that_runs_may_have(runner, monkeypatch):
    arm = Arm(None, lambda inputs: ["probe", "fake"], env={"LD_PRELOAD": "x"})
    monkeypatch.setitem(EXPERIMENTS._known, "sets", Experiment("sets", "t", (), (arm,)))
    with pytest.raises(HarnessError, match="LD_PRELOAD"):
        runner.run("sets")


def test_prune_keeps_raw_files_and_follows_no_link(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "keep").write_text("k")
    run = tmp_path / "run"
    (run / "arrays" / "deep").mkdir(parents=True)
    (run / "out").mkdir()
    for name in ("exit.json", "arrays/a.npz", "arrays/b.txt", "arrays/deep/c.npz", "out/model", "notes"):
        (run / name).write_text("x")
    (run / "link").symlink_to(outside)
    (run / "stdout.log").symlink_to(outside / "keep")
    prune(run)
    assert sorted(p.relative_to(run).as_posix() for p in run.rglob("*")) == ["arrays", "arrays/a.npz", "exit.json"]
    assert (outside / "keep").exists()


def test_inputs_are_made_once_and_appear_whole(tmp_path):
    inputs = Inputs(tmp_path / "inputs", "cpu")
    calls = []

    def make(path):
        calls.append(path)
        path.write_text("half")
        assert not (inputs.folder / "models" / "a.gguf").exists()
        path.write_text("whole")

    def fails(path):
        path.write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        inputs.file("models/a.gguf", fails)
    threads = [threading.Thread(target=inputs.file, args=("models/a.gguf", make)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert calls[0].suffix == ".gguf"
    folder = inputs.file("student", lambda path: (path.mkdir(), (path / "config.json").write_text("{}")))
    assert folder.is_dir()
    digests = inputs.digests()
    assert set(digests) == {"models/a.gguf", "student/config.json"}
    assert digests["models/a.gguf"]["bytes"] == 5


@pytest.mark.parametrize("name", ["../a", "/etc/a", "", ".locks/a", "a/../../b"])
def test_an_input_cannot_leave_its_folder(tmp_path, name):
    with pytest.raises(ValueError, match="must be relative"):
        Inputs(tmp_path / "inputs", "cpu").file(name, lambda path: path.write_text("x"))


def test_experiments_are_checked_where_they_are_declared(runner):
    def arm(name):
        return Arm(name, lambda inputs: [])

    for arms in ((), (arm("a"), arm("a")), (arm(None), arm("a"))):
        with pytest.raises(ValueError, match="distinct names"):
            Experiment("x", "t", (), arms)
    for bad in ("../x", "X", "a.b", ""):
        with pytest.raises(ValueError, match="lower-case"):
            Experiment(bad, "t", (), (arm(None),))
    with pytest.raises(ValueError, match="twice"):
        EXPERIMENTS.add(Experiment(get_experiment("measure").name, "t", (), (arm(None),)))
    assert EXPERIMENTS.module("measure") == "fakeworld.experiments"
