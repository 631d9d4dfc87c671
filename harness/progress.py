"""What a session tells while it runs: which runs are under way, how many are left, and how long they will take.

Seconds are estimated from recorded durations, scaled by what the runs that have ended took on this machine.
"""

import threading
import time
from collections.abc import Callable, Iterable

from q4kd.harness.runs.experiment import get_experiment
from q4kd.harness.runs.runner import ExperimentRunner
from q4kd.trainer.yaml_lines import printable

_UNKNOWN_S = 5.0
_TERMINAL_EVERY_S = 0.5
_PIPE_EVERY_S = 60.0


class Progress:
    """Follows the runs of some experiments. Thread-safe."""

    def __init__(self, runner: ExperimentRunner, experiments: Iterable[str]) -> None:
        named = [get_experiment(name) for name in experiments]
        self._expected = {
            experiment.run_name(arm): runner.expected.get(experiment.run_name(arm), _UNKNOWN_S)
            for experiment in named
            for arm in experiment.arms
        }
        self._cores = runner.cores.total
        self._begun: dict[str, float] = {}
        self._ended: dict[str, float] = {}
        self._lock = threading.Lock()
        self._started = time.monotonic()
        runner.told = self._hear

    def _hear(self, run: str, seconds: float | None) -> None:
        with self._lock:
            if seconds is None:
                self._begun[run] = time.monotonic()
            else:
                self._ended[run] = seconds

    def line(self) -> str:
        """Return the state in one line."""
        with self._lock:
            now = time.monotonic()
            under_way = {run: now - at for run, at in self._begun.items() if run not in self._ended}
            left = self._seconds_left(under_way)
            oldest_first = sorted(under_way, key=lambda run: -under_way[run])
            ended, total = len(self._ended), len(self._expected)
        shown = ", ".join(f"{run} {under_way[run]:.0f} s" for run in oldest_first[:3])
        more = f" and {len(under_way) - 3} more" if len(under_way) > 3 else ""
        what = f"{ended} of {total} runs, {_clock(now - self._started)}"
        if ended == total:
            return f"{what}: judging"
        return printable(f"{what}, about {_clock(left)} left: {shown or 'waiting'}{more}", 400)

    def _seconds_left(self, under_way: dict[str, float]) -> float:
        """Estimate from the runs' seconds, spread over the cores; none ends before the longest that is left."""
        known = sum(self._expected[run] for run in self._ended if run in self._expected)
        scale = sum(self._ended.values()) / known if known else 1.0
        left = [
            max(0.0, scale * seconds - under_way.get(run, 0.0))
            for run, seconds in self._expected.items()
            if run not in self._ended
        ]
        return max(sum(left) / self._cores, max(left, default=0.0))


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


class Ticker:
    """Tells a progress while it is open: one line that is written over on a terminal, else a line now and then.

    Args:
        progress: what is told.
        write: writes text as it is, at once.
        width: columns of the terminal; None for a file or a pipe.
        every_s: seconds from one line to the next.
    """

    def __init__(
        self, progress: Progress, write: Callable[[str], object], width: int | None, every_s: float | None = None
    ) -> None:
        self._progress, self._write, self._width = progress, write, width
        self._every_s = every_s or (_PIPE_EVERY_S if width is None else _TERMINAL_EVERY_S)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._tell, daemon=True, name="progress")
        self._thread.start()

    def close(self) -> None:
        """Stop, and leave nothing of the line on a terminal."""
        if not self._over.is_set():
            self._over.set()
            self._thread.join()
            if self._width is not None:
                self._write("\r\x1b[K")

    def _tell(self) -> None:
        while not self._over.wait(self._every_s):
            line = self._progress.line()
            self._write(f"\n{line}\n" if self._width is None else f"\r\x1b[K{line[: self._width - 1]}")
