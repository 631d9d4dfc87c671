"""A teacher loaded on the CPU without a word, for tests that ask what it computes."""

from pathlib import Path

from q4kd.trainer.device.placement import place_teacher
from q4kd.trainer.events import EventLog
from q4kd.trainer.formats.model_file import ModelFile
from q4kd.trainer.teacher.teacher import Teacher, load_teacher


def load_quietly(model: Path | ModelFile, *, backend: str | None = None, dtype: str = "float32") -> Teacher:
    """Load a file, or one that is open, for a backend and a dtype; never the one that suits this processor."""
    placement = place_teacher(model, backend=backend, dtype=dtype)
    return load_teacher(placement, events=EventLog(None), announce=lambda _line: None)
