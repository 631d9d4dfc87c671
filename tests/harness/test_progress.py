import os
import pty
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from q4kd.harness import progress as module
from q4kd.harness.progress import Progress, Ticker
from q4kd.harness.runs.cores import Cores
from q4kd.harness.runs.experiment import Arm, Experiment

ONE = Experiment("one", "", (), (Arm(None, lambda _: []),))
TWO = Experiment("two", "", (), (Arm("a", lambda _: []), Arm("b", lambda _: [])))


@pytest.fixture
def now(monkeypatch):
    clock = SimpleNamespace(at=100.0)
    monkeypatch.setattr(module.time, "monotonic", lambda: clock.at)
    return clock


@pytest.fixture
def runner(monkeypatch):
    monkeypatch.setattr(module, "get_experiment", {"one": ONE, "two": TWO}.__getitem__)
    return SimpleNamespace(expected={"one": 10.0, "two.a": 30.0, "two.b": 20.0}, cores=Cores(2), told=None)


def test_it_says_what_runs_what_is_left_and_how_long(runner, now):
    progress = Progress(runner, ["one", "two"])
    assert progress.line() == "0 of 3 runs, 0:00, about 0:30 left: waiting"  # 60 s of work on two cores
    runner.told("one", None)
    runner.told("two.a", None)
    now.at += 6
    # 4 + 24 + 20 seconds of work are left, half of it on each core; none ends before two.a.
    assert progress.line() == "0 of 3 runs, 0:06, about 0:24 left: one 6 s, two.a 6 s"


def test_the_estimate_is_scaled_by_what_this_machine_has_shown(runner, now):
    progress = Progress(runner, ["one", "two"])
    runner.told("one", None)
    now.at += 20
    runner.told("one", 20.0)  # twice what was recorded: so will be the others
    assert progress.line() == "1 of 3 runs, 0:20, about 1:00 left: waiting"


def test_a_run_that_takes_longer_than_expected_is_not_less_than_nothing(runner, now):
    progress = Progress(runner, ["one"])
    runner.told("one", None)
    now.at += 300
    assert progress.line() == "0 of 1 runs, 5:00, about 0:00 left: one 300 s"
    runner.told("one", 300.0)
    assert progress.line() == "1 of 1 runs, 5:00: judging"


def test_many_runs_are_counted_and_the_oldest_are_named(runner, now, monkeypatch):
    many = Experiment("many", "", (), tuple(Arm(f"a{n}", lambda _: []) for n in range(9)))
    monkeypatch.setattr(module, "get_experiment", lambda _name: many)
    progress = Progress(runner, ["many"])
    for n in range(5):
        now.at += 1
        runner.told(f"many.a{n}", None)
    assert progress.line().endswith("left: many.a0 4 s, many.a1 3 s, many.a2 2 s and 2 more")


def test_a_terminal_has_one_line_that_is_written_over_and_removed(runner):
    written = []
    ticker = Ticker(Progress(runner, ["one", "two"]), written.append, 30, every_s=0.01)
    wait_for(lambda: len(written) >= 3)
    ticker.close()
    ticker.close()
    assert written.pop() == "\r\x1b[K"
    assert all(re.fullmatch(r"\r\x1b\[K[^\n\r]{29}", text) for text in written)


def test_a_pipe_gets_a_line_now_and_then(runner):
    written = []
    ticker = Ticker(Progress(runner, ["one"]), written.append, None, every_s=0.01)
    wait_for(lambda: len(written) >= 2)
    ticker.close()
    count = len(written)
    time.sleep(0.05)
    assert len(written) == count
    assert set(written) == {"\n0 of 1 runs, 0:00, about 0:10 left: waiting\n"}


def wait_for(true):
    deadline = time.monotonic() + 10
    while not true() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert true()


# --- in pytest, on a terminal and in a pipe ---

CONTRACT = """
metadata: {status: active}
falsification_tests:
- id: FT-1
  rule: values stay low
  prediction: at most 50
  if_fails: look
  falsifier: {check: fake, experiment: EXPERIMENT, params: {ceiling: 50}, sabotage: [inflate]}
"""
CODE = """
import sys
from fakeworld.plugin import install
from q4kd.harness import progress
progress._TERMINAL_EVERY_S = progress._PIPE_EVERY_S = 0.05
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


def falsify(folder, *words, terminal, experiment="slow"):
    """Run the plugin on one claim; return what it wrote."""
    (folder / "claims").mkdir()
    (folder / "claims" / "c.yaml").write_text(CONTRACT.replace("EXPERIMENT", experiment))
    support = str(Path(__file__).parents[1] / "support")
    plugins = ["-p", "no:cacheprovider", "-p", "q4kd.harness.plugin", "-p", "fakeworld.plugin"]
    options = ["--contracts", "claims", "--profile", "cpu", "--bundle", "b", "--kills", "kills"]
    env = {
        **os.environ,
        "PYTHONPATH": support,
        "TERM": "xterm",
        "COLUMNS": "100",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    command = [sys.executable, "-c", CODE, *plugins, *options, *words]
    if not terminal:
        return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False).stdout
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, cwd=folder, env=env, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    written = []

    def read():
        try:
            while piece := os.read(ours, 4096):
                written.append(piece)
        except OSError:
            return  # the other end is closed

    reader = threading.Thread(target=read)
    reader.start()
    process.wait(60)
    reader.join(10)
    os.close(ours)
    return b"".join(written).decode()


def test_on_a_terminal_the_line_takes_the_place_of_the_letters(tmp_path):
    said = falsify(tmp_path, terminal=True)
    assert re.search(r"\r\x1b\[K0 of 1 runs, 0:0\d, about 0:0\d left: slow \d s", said)
    assert "FT-1" in said
    assert not re.search(r"\nc \S*F", said.replace("\x1b[31m", ""))


def test_in_a_pipe_there_are_plain_lines(tmp_path):
    said = falsify(tmp_path, terminal=False)
    assert re.search(r"^0 of 1 runs, 0:0\d, about 0:0\d left: slow \d s$", said, re.MULTILINE)
    assert "\x1b[K" not in said
    assert "\r" not in said


def test_quietly_there_is_none(tmp_path):
    assert " of 1 runs" not in falsify(tmp_path, "-q", terminal=False)
