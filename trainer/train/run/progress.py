"""What a person sees of a run: plain "Step N/M" lines always, a live bar with phase and ETA on a terminal."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from q4kd.trainer import wall

_WORDS = {"train": "training", "evaluate": "evaluating", "save": "saving", "compile": "compiling"}


class Reporter:
    """Prints progress lines, and keeps a bar on stderr when that is a terminal.

    Args:
        total: steps of this run.
        every: steps between lines; 0 prints epoch lines only.
        steps_per_epoch: steps between epoch lines.
        eval_every: steps between evaluations; 0 leaves that after the last step.
        save_every: steps between checkpoints; 0 leaves that after the last step.
    """

    def __init__(
        self, total: int, every: int, steps_per_epoch: int, *, eval_every: int = 0, save_every: int = 0
    ) -> None:
        self._total, self._every, self._steps_per_epoch = total, every, steps_per_epoch
        self._between = {"evaluate": eval_every, "save": save_every}
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._done = self._first = 0

    @contextmanager
    def running(self, done: int) -> Iterator[None]:
        """Show the bar while the body runs, starting at ``done`` steps."""
        self._done = self._first = done
        if not self._console.is_terminal:
            yield
            return
        what = TextColumn("{task.description}")
        columns = (what, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("ETA"), _Remaining(self))
        # Lines go above the bar on a terminal; a redirected stdout receives them itself.
        on_terminal = sys.stdout.isatty()
        with Progress(*columns, console=self._console, transient=True, redirect_stdout=on_terminal) as self._bar:
            self._task = self._bar.add_task("distilling", total=self._total, completed=done)
            yield
        self._bar = None

    def step(self, step: int, loss: float, tokens_per_second: float, teacher_share: float) -> None:
        """Report a finished step (counted from 1)."""
        self._done = step
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=f"loss {loss:.4f}")
        if self._every and (step % self._every == 0 or step == self._total):
            speed = f"{tokens_per_second:.0f} tok/s, teacher {teacher_share:.0%}"
            print(f"Step {step}/{self._total}: loss: {loss:.4f} ({speed})", flush=True)
        if step % self._steps_per_epoch == 0:
            print(f"Epoch {step // self._steps_per_epoch}: loss: {loss:.4f}", flush=True)

    def remaining(self) -> float | None:
        """Return the seconds that the rest will take, None before the first step.

        Steps, evaluations and checkpoints each take what they took on average so far. One that has not come yet is
        counted as nothing.
        """
        clock, steps = wall.clock(), self._done - self._first
        if not steps:
            return None
        seconds, entered = clock.seconds(), clock.entered
        rest = (self._total - self._done) * seconds["train"] / steps
        for phase, every in self._between.items():
            # One more of each comes after the last step.
            left = 1 + ((self._total - 1) // every - self._done // every if every and self._done < self._total else 0)
            rest += left * seconds[phase] / max(1, entered[phase])
        return rest


class _Remaining(ProgressColumn):
    """The phase that runs now, and the seconds that are left."""

    def __init__(self, reporter: Reporter) -> None:
        super().__init__()
        self._reporter = reporter

    def render(self, task: Task) -> Text:
        """Return both as text."""
        del task
        left, phase = self._reporter.remaining(), wall.clock().current
        hours, rest = divmod(round(left or 0), 3600)
        time = "-:--:--" if left is None else f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
        return Text(f"{time} {_WORDS.get(phase, '')}".rstrip(), style="progress.remaining")
