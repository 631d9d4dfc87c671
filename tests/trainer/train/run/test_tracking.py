"""Trackers hear what the event log hears, of the main process alone, and change no loss."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from q4kd.harness.__main__ import main
from q4kd.trainer.config.settings import make_config
from q4kd.trainer.demo import student_path, teacher_path
from q4kd.trainer.errors import InputError
from q4kd.trainer.train.run import tracking
from q4kd.trainer.train.run.tracking import public_settings, tracker_names

BASE: dict[str, object] = {"teacher": "/home/someone/t.gguf", "student": "/home/someone/s", "data": "d", "out": "/r/o"}


def test_names_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracker_names(make_config(BASE)) == []
    with pytest.raises(InputError, match="tensorbord"):
        tracker_names(make_config(BASE | {"trackers": "tensorbord"}))
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(InputError, match="pip install trackio"):
        tracker_names(make_config(BASE | {"trackers": " trackio ,wandb"}))


def test_settings_shown_to_others_hold_no_folders() -> None:
    shown = public_settings(make_config(BASE))
    assert "someone" not in json.dumps(shown)
    assert (shown["teacher"], shown["out"], shown["steps"], shown["lr"]) == ("t.gguf", "o", "none", 2e-5)
    assert all(isinstance(value, str | int | float) for value in shown.values())


def test_tensorboard_gets_what_the_event_log_gets(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shutil.copy(Path(shutil.__file__), tmp_path / "text.txt")

    def run(out: Path, *extra: str) -> list[dict[str, Any]]:
        words = ["distill", "--teacher", str(teacher_path()), "--student", str(student_path()), "--from-scratch"]
        words += ["--data", str(tmp_path / "text.txt"), "--out", str(out), "--seq-len", "16", "--batch-size", "2"]
        assert main([*words, "--steps", "2", "--warmup-steps", "1", "--lr", "0.01", *extra]) == 0
        lines = map(json.loads, (out / "events.jsonl").read_text().splitlines())
        return [event for event in lines if event["event"] == "step"]

    plain, tracked = run(tmp_path / "plain"), run(tmp_path / "tracked", "--trackers", "tensorboard")
    losses = [event["loss"] for event in tracked]
    assert losses == [event["loss"] for event in plain]
    found = EventAccumulator(str(tmp_path / "tracked" / "trackers" / "q4kd"))
    found.Reload()
    scalars = found.Scalars("train/loss")
    assert [(scalar.step, scalar.value) for scalar in scalars] == [
        (step, pytest.approx(loss, rel=1e-6)) for step, loss in enumerate(losses, start=1)
    ]
    assert not (tmp_path / "plain" / "trackers").exists()
