"""What a person sees of a run: plain "Step N/M" lines always, a live bar with ETA on a terminal."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Reporter:
    """Prints progress lines, and keeps a bar on stderr when that is a terminal.

    Args:
        total: steps of this run.
        every: steps between lines; 0 prints epoch lines only.
        steps_per_epoch: steps between epoch lines.
    """

    def __init__(self, total: int, every: int, steps_per_epoch: int) -> None:
        self._total, self._every, self._steps_per_epoch = total, every, steps_per_epoch
        self._console = Console(stderr=True)
        self._bar: Progress | None = None

    @contextmanager
    def running(self, done: int) -> Iterator[None]:
        """Show the bar while the body runs, starting at ``done`` steps."""
        if not self._console.is_terminal:
            yield
            return
        loss, times = TextColumn("{task.description}"), (TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn())
        columns = (loss, BarColumn(), MofNCompleteColumn(), *times)
        # Lines go above the bar on a terminal; a redirected stdout receives them itself.
        on_terminal = sys.stdout.isatty()
        with Progress(*columns, console=self._console, transient=True, redirect_stdout=on_terminal) as self._bar:
            self._task = self._bar.add_task("distilling", total=self._total, completed=done)
            yield
        self._bar = None

    def step(self, step: int, loss: float, tokens_per_second: float, teacher_share: float) -> None:
        """Report a finished step (counted from 1)."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=f"loss {loss:.4f}")
        if self._every and (step % self._every == 0 or step == self._total):
            speed = f"{tokens_per_second:.0f} tok/s, teacher {teacher_share:.0%}"
            print(f"Step {step}/{self._total}: loss: {loss:.4f} ({speed})", flush=True)
        if step % self._steps_per_epoch == 0:
            print(f"Epoch {step // self._steps_per_epoch}: loss: {loss:.4f}", flush=True)
