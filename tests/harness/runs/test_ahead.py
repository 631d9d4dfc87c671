import functools
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from fakeworld.plugin import install
from filelock import FileLock

from q4kd.harness.judging.results import ClaimResult
from q4kd.harness.runs import ahead as module
from q4kd.harness.runs.ahead import Ahead
from q4kd.harness.runs.cores import Closed, Cores
from q4kd.harness.runs.experiment import Arm, Experiment, Inputs, register
from q4kd.harness.runs.runner import ExperimentRunner
from q4kd.harness.runs.supervise import end_all
from q4kd.harness.session import Session

SUPPORT = str(Path(__file__).parents[2] / "support")


@pytest.fixture
def runner(tmp_path, monkeypatch):
    install(monkeypatch.setattr)
    monkeypatch.setenv("PYTHONPATH", SUPPORT)
    return ExperimentRunner(tmp_path / "bundle", Inputs(tmp_path / "inputs", "cpu"), "cpu", workers=2)


def ahead(runner, *names):
    return Ahead(runner.cores, {name: functools.partial(runner.run, name) for name in names})


def seen(runner):
    """Return when each run began and ended, as the runner tells it."""
    times = {}
    runner.told = lambda run, _seconds: times.setdefault(run, []).append(time.monotonic())
    return times


def one_thread(name, **how):
    argv = lambda inputs: ["probe", "fake", "pause", str(inputs.file("seed.txt", lambda p: p.write_text("7")))]  # noqa: E731
    return register(Experiment(name, "", ("cpu",), (Arm(None, argv, 60, env={"OMP_NUM_THREADS": "1"}),), **how))


def overlap(times, one, other):
    return max(times[one][0], times[other][0]) < min(times[one][1], times[other][1])


def test_experiments_of_one_thread_run_side_by_side_and_those_without_a_number_alone(runner):
    times = seen(runner)
    for name in ("a", "b", "c"):
        one_thread(name)
    jobs = ahead(runner, "a", "b", "c", "measure")
    for name in ("a", "b", "c", "measure", "not there"):
        jobs.wait(name)
    assert sum(overlap(times, *pair) for pair in (("a", "b"), ("a", "c"), ("b", "c"))) >= 1
    # "measure" declares no number of threads, so it may use both cores.
    assert not any(overlap(times, "measure", name) for name in ("a", "b", "c"))
    assert {name: run.exit["cause"] for name in ("a", "measure") for run in runner.run(name).values()} == {
        "a": "exited",
        "measure": "exited",
    }


def test_what_measures_time_comes_first_and_has_the_machine_to_itself(runner):
    runner.cores = Cores(8)
    times = seen(runner)
    for name in ("a", "b"):
        one_thread(name)
    one_thread("timed", measures=("time",))
    with runner.cores.taken(0):  # all wait until every job has asked
        jobs = ahead(runner, "a", "b", "timed")
        time.sleep(1.0)
    for name in ("a", "b", "timed"):
        jobs.wait(name)
    assert not overlap(times, "timed", "a")
    assert not overlap(times, "timed", "b")


def test_the_longest_is_first(runner):
    runner.cores = Cores(1)
    runner.expected = {"a": 1.0, "b": 30.0, "c": 2.0}
    times = seen(runner)
    for name in ("a", "b", "c"):
        one_thread(name)
    with runner.cores.taken(1):
        jobs = ahead(runner, "a", "b", "c")
        time.sleep(0.5)
    for name in ("a", "b", "c"):
        jobs.wait(name)
    assert sorted(times, key=lambda run: times[run][0]) == ["b", "c", "a"]


def test_a_stop_ends_what_runs_and_starts_nothing_more(runner):
    times = seen(runner)
    jobs = ahead(runner, "asleep", "measure", "compare")  # asleep takes a minute, and the others wait for its cores
    deadline = time.monotonic() + 30
    while not times and time.monotonic() < deadline:
        time.sleep(0.02)
    begun = time.monotonic()
    jobs.stop()
    jobs.stop()
    assert time.monotonic() - begun < 20
    assert len(times) == 1
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


def test_a_stop_does_not_wait_for_another_session_on_the_accelerator(runner, tmp_path, monkeypatch):
    monkeypatch.setattr("q4kd.harness.runs.cores.accelerator_lock", lambda: tmp_path / "accelerator.lock")
    with FileLock(tmp_path / "accelerator.lock"):
        jobs = ahead(runner, "alone")
        time.sleep(0.3)
        begun = time.monotonic()
        jobs.stop()
        assert time.monotonic() - begun < 10
    assert not (runner.bundle_dir / "runs").exists()


def test_a_job_that_fails_keeps_nobody_waiting(runner):
    jobs = ahead(runner, "unprepared", "measure")
    jobs.wait("unprepared")
    jobs.wait("measure")
    assert runner.run("measure")["measure"].facts == {"value": 10}


def test_with_nothing_under_way_there_is_nothing_to_end():
    end_all()


def test_what_an_experiment_measures_is_of_a_closed_list():
    with pytest.raises(ValueError, match="measures"):
        Experiment("x", "", (), (Arm(None, lambda _: []),), measures=("weight",))


def test_runs_that_a_stop_killed_show_nothing_of_their_claims(tmp_path):
    cores = Cores(1)
    cores.close()
    judge = lambda _claim: ClaimResult(verdict="falsified")  # noqa: E731
    session = SimpleNamespace(_judge=judge, runner=SimpleNamespace(cores=cores), bundle=tmp_path)
    with pytest.raises(Closed):
        Session._evaluate(session, SimpleNamespace(key="c::A-1"))
    assert not (tmp_path / ".partial").exists()


@pytest.mark.parametrize(("jobs", "settled"), [(1, 0), (2, 1)])
def test_what_threads_may_import_is_imported_before_there_are_several(monkeypatch, jobs, settled):
    order = []
    monkeypatch.setattr(module, "settle_imports", lambda _experiments: order.append("import"))
    jobs = {str(number): lambda: order.append("job") for number in range(jobs)}
    started = Ahead(Cores(2), jobs)
    for name in jobs:
        started.wait(name)
    assert order == ["import"] * settled + ["job"] * len(jobs)


@pytest.mark.parametrize(
    ("text", "imports"),
    [
        ("import numpy\n", False),
        ("def collect():\n    import transformers\n", True),
        ("from q4kd.harness.inputs.demo import demo_student\n", True),
    ],
)
def test_transformers_is_imported_for_experiments_that_may_import_it(tmp_path, monkeypatch, text, imports):
    package = tmp_path / "acme_runs"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "deep.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    imported = []
    monkeypatch.setattr(module.importlib, "import_module", imported.append)
    known = {"theirs": "acme_runs.experiments", "ours": "q4kd.harness.subjects.models.experiments", "gone": "not_there"}
    monkeypatch.setattr(module, "EXPERIMENTS", type("Known", (dict,), {"module": dict.__getitem__})(known))
    module.settle_imports(["theirs", "unknown"])
    assert imported == ["transformers"] * imports
    for other in ("ours", "gone"):
        module.settle_imports([other])
    assert imported[imports:] == ["transformers"] * 2
