"""What is left of a run counts its evaluations and checkpoints, by what each took so far."""

import pytest
from rich.progress import Task

from q4kd.trainer import wall
from q4kd.trainer.train.run.progress import Reporter, _Remaining
from q4kd.trainer.wall import PHASES


class Clock:
    def __init__(self, seconds: dict[str, float], entered: dict[str, int], current: str = "train") -> None:
        self._seconds, self.entered, self.current = seconds, dict.fromkeys(PHASES, 0) | entered, current

    def seconds(self) -> dict[str, float]:
        return dict.fromkeys(PHASES, 0.0) | self._seconds


@pytest.mark.parametrize(
    ("done", "evaluations", "saves"),
    # Evaluations at 40, 60, 80 and the end, checkpoints at 50 and the end; then fewer; then those of the end alone.
    [(20, 4, 2), (40, 3, 2), (50, 3, 1), (99, 1, 1), (100, 1, 1)],
)
def test_what_is_left(monkeypatch: pytest.MonkeyPatch, done: int, evaluations: int, saves: int) -> None:
    reporter = Reporter(100, 0, 1000, eval_every=20, save_every=50)
    with reporter.running(10):
        assert reporter.remaining() is None
        clock = Clock({"train": 3.0 * (done - 10), "evaluate": 14.0, "save": 5.0}, {"evaluate": 2, "save": 1})
        monkeypatch.setattr(wall, "clock", lambda: clock)
        reporter.step(done, 1.0, 1.0, 0.5)
        assert reporter.remaining() == 3.0 * (100 - done) + 7.0 * evaluations + 5.0 * saves


def test_the_bar_shows_the_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    reporter = Reporter(10, 0, 1000)
    column, task = _Remaining(reporter), Task(0, "", 10, 0, _get_time=lambda: 0.0)  # type: ignore[arg-type]
    assert column.render(task).plain.startswith("-:--:--")
    clock = Clock({"train": 3661.0}, {}, "save")
    monkeypatch.setattr(wall, "clock", lambda: clock)
    reporter.step(5, 1.0, 1.0, 0.5)
    assert column.render(task).plain == "1:01:01 saving"
    clock.current = "other"
    assert column.render(task).plain == "1:01:01"
