"""The phases of a run share its wall time: none is counted twice, none is left out."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from q4kd.trainer import wall
from q4kd.trainer.wall import PHASES, WallClock, describe, process_began


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a clock of one number, which the test moves."""
    times = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: times[0])
    return times


def test_an_inner_phase_is_not_counted_in_the_outer_one(now: list[float]) -> None:
    told: list[tuple[str, str, float]] = []
    clock = WallClock(90.0, lambda *told_of: told.append(told_of))
    with clock.phase("train"):
        now[0] += 3
        with clock.phase("compile", "the student"):
            now[0] += 4
            assert clock.current == "compile"
        now[0] += 5
    now[0] += 1
    with pytest.raises(ZeroDivisionError), clock.phase("save"):
        now[0] += 2
        raise ZeroDivisionError
    seconds = clock.seconds()
    assert tuple(seconds) == PHASES
    expected = {"train": 8.0, "compile": 4.0, "save": 2.0, "other": 11.0}
    assert {name: value for name, value in seconds.items() if value} == expected
    assert sum(seconds.values()) == now[0] - 90.0
    assert told == [("compile", "the student", 4.0)]
    assert clock.parts() == {"compile": {"the student": 4.0}}
    assert clock.entered == {**dict.fromkeys(PHASES, 0), "train": 1, "compile": 1, "save": 1}
    assert describe(seconds).startswith("wall 25.0 s: open 0.0, load 0.0, compile 4.0, train 8.0")
    with pytest.raises(KeyError):
        clock.enter("lunch")


def test_a_process_knows_when_it_began() -> None:
    code = (
        "import time; from q4kd.trainer.wall import process_began as b; time.sleep(0.5); print(time.monotonic() - b())"
    )
    begun = time.monotonic()
    age = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    # The kernel counts in ticks of 10 ms.
    assert 0.5 <= age <= time.monotonic() - begun + 0.02


def test_a_system_that_does_not_say_when_counts_from_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_bytes", lambda _self: b"1 (a) b) S 1")
    assert abs(process_began() - time.monotonic()) < 1


def test_a_new_start_forgets_the_run_before(now: list[float]) -> None:
    with wall.start(50.0).phase("load"):
        now[0] += 1
    assert wall.clock().seconds()["other"] == 50
    assert sum(wall.start().seconds().values()) == 0
    assert json.dumps(wall.clock().seconds())


def test_what_is_done_by_name_adds_up_to_its_phase(now: list[float]) -> None:
    clock = wall.start(98.0, imported="torch imported")
    now[0] += 1
    with clock.phase("open", "header read"):
        now[0] += 3
        with clock.phase("compile"):
            now[0] += 4
    for _ in range(2):
        with clock.phase("load", "teacher"):
            now[0] += 5
    assert clock.parts() == {"open": {"torch imported": 2.0, "header read": 3.0}, "load": {"teacher": 10.0}}
    seconds = {name: value for name, value in clock.seconds().items() if value}
    assert seconds == {"open": 5.0, "compile": 4.0, "load": 10.0, "other": 1.0}
