"""The watchdog ends what makes no progress, says where it was, and leaves everything else alone."""

import json
import threading
import time
from pathlib import Path

import pytest

import q4kd.trainer.train.hang_watchdog as hang
from q4kd.trainer.events import EventLog
from q4kd.trainer.train.hang_watchdog import HangWatchdog


def watchdog(folder: Path, seconds: float, *, rank: int = 0) -> tuple[HangWatchdog, threading.Event]:
    ended = threading.Event()
    events = EventLog(folder / "events.jsonl")
    return HangWatchdog(seconds, folder, events, rank=rank, stop=ended.set), ended


def wait_where_the_stack_shows_it(ended: threading.Event) -> bool:
    return ended.wait(30)


def test_a_step_that_does_not_end_is_reported_with_the_stacks(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    dog, ended = watchdog(tmp_path, 0.2, rank=3)
    with dog:
        dog.beat(6)
        assert wait_where_the_stack_shows_it(ended)
    text = (tmp_path / "hang-step-000007-rank-3.txt").read_text()
    assert "step 7: expected an end within 0.2 s" in text
    assert "wait_where_the_stack_shows_it" in text
    [event] = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    assert (event["event"], event["step"], event["doing"]) == ("hang", 7, "step 7")
    assert "--resume continues" in capfd.readouterr().err


def test_steps_that_end_are_left_alone(tmp_path: Path) -> None:
    dog, ended = watchdog(tmp_path, 5.0)
    with dog:
        for step in range(5):
            dog.beat(step)
    assert not ended.is_set()
    assert not dog._thread.is_alive()


def test_an_evaluation_has_an_allowance_of_its_own(tmp_path: Path) -> None:
    dog, ended = watchdog(tmp_path, 0.2)
    with dog, dog.allowing("the evaluation", 3000):
        assert not ended.wait(1.0)
    dog, ended = watchdog(tmp_path, 0.1)
    with dog, dog.allowing("the evaluation", 2):
        assert ended.wait(30)
    assert "the evaluation: expected an end within 0.2 s" in (tmp_path / "hang-step-000001.txt").read_text()


def test_zero_seconds_start_nothing(tmp_path: Path) -> None:
    dog, _ = watchdog(tmp_path, 0.0)
    with dog:
        assert not dog._thread.is_alive()


def test_time_in_which_the_process_was_stopped_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Each look at the clock finds that a day has passed, as after a suspended night.
    days = iter(range(1_000_000))
    monkeypatch.setattr(hang, "time", type("Clock", (), {"monotonic": staticmethod(lambda: 86_400.0 * next(days))}))
    dog, ended = watchdog(tmp_path, 2.0)  # looks every 0.1 s, and counts each for 0.2 s at most
    with dog:
        assert not ended.wait(0.3)
        time.sleep(0)


def test_a_folder_that_cannot_be_written_still_ends_the_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ended = threading.Event()
    with HangWatchdog(0.1, tmp_path / "gone", EventLog(None), stop=ended.set):
        assert ended.wait(30)
    assert "stacks not saved" in capfd.readouterr().err
