"""Where a step's time goes, part by part, without making the device wait in between.

CUDA work is queued, and the host's clock would only say how long queueing took. So each mark is an event in the stream,
and the times between events are read after the one wait of the step. The update is queued after that wait; its time is
read a step later, so that no reading waits.
"""

import time
from typing import Any

import torch

PARTS = ("teacher", "student", "loss", "optimizer")


class StepClock:
    """Adds up seconds by part, from ``start`` to ``read``; ``before`` is the clock of the step before, if any."""

    def __init__(self, device: torch.device, before: "StepClock | None" = None) -> None:
        self._is_cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []
        self._last_update = before._marks[-2:] if before is not None else []

    def _now(self) -> Any:
        if not self._is_cuda:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def start(self) -> None:
        """Begin a step."""
        self._marks = [("", self._now())]

    def mark(self, part: str) -> None:
        """Say that everything since the last mark was this part of the step."""
        self._marks.append((part, self._now()))

    def read(self) -> dict[str, float]:
        """Return the seconds of every part, zero for one that never came; on CUDA, the last part of the step before.

        All but the last mark must be reached: the host has waited for what was queued before it. The first step on CUDA
        has none before it and waits for its own last mark.
        """
        spans = list(zip(self._marks, self._marks[1:], strict=False))
        if self._is_cuda:
            if self._last_update:
                spans[-1] = self._last_update[0], self._last_update[1]
            else:
                self._marks[-1][1].synchronize()
        seconds = dict.fromkeys(PARTS, 0.0)
        for (_, before), (part, after) in spans:
            seconds[part] += before.elapsed_time(after) / 1000 if self._is_cuda else after - before
        return seconds
