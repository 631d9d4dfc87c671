"""Measurements on whole runs: the cost of reporting, whether a run would start, how wide the compared logits are."""

import contextlib
import functools
import importlib
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, ParamSpec, TypeVar

import numpy as np

from q4kd.harness.inputs.arrays import read_array, save_arrays
from q4kd.harness.records.json_types import JsonObject
from q4kd.harness.runs.probes import probe
from q4kd.trainer.files import read_json, write_json

_P = ParamSpec("_P")
_T = TypeVar("_T")
# Start and seconds of each call.
_Clock = list[tuple[float, float]]


def _clocked(original: Callable[_P, _T], into: _Clock, word: str | None = None) -> Callable[_P, _T]:
    """Return ``original`` with a clock around each call, or around those with ``word`` among their arguments."""

    @functools.wraps(original)
    def call(*arguments: _P.args, **options: _P.kwargs) -> _T:
        if word is not None and word not in arguments:
            return original(*arguments, **options)
        before = time.monotonic()
        result = original(*arguments, **options)
        into.append((before, time.monotonic() - before))
        return result

    return call


@probe("distill-timed")
def distill_timed(*words: str, out: Path) -> int:
    """Run ``q4kd distill`` with a clock around each step, and around the event and the line that report it."""
    from q4kd.harness.__main__ import main
    from q4kd.trainer.events import EventLog
    from q4kd.trainer.train.run.progress import Reporter

    steps: _Clock = []
    events: _Clock = []
    lines: _Clock = []
    loop: Any = importlib.import_module("q4kd.trainer.train.loop")
    loop.train_step = _clocked(loop.train_step, steps)
    EventLog.emit = _clocked(EventLog.emit, events, "step")  # type: ignore[method-assign]
    Reporter.step = _clocked(Reporter.step, lines)  # type: ignore[method-assign]
    code = main(list(words))
    if code == 0 and len(steps) == len(events) == len(lines):
        step, event, line = (np.array(found) for found in (steps, events, lines))
        arrays = {
            "numerator": event[:, 1] + line[:, 1],
            "denominator": step[:, 1],
            "numerator_start": event[:, 0],
            "denominator_start": step[:, 0],
        }
        save_arrays(out, arrays)
    return code


class _TrainingBegan(BaseException):
    """The run came to its first step: it was accepted. Nothing between here and the probe catches it."""


@probe("start-runs")
def start_runs(cases: Path, out: Path) -> None:
    """Start runs that must be refused, and the valid twin of each, up to the first step; record how each ended.

    ``--cases`` is a JSON file: ``{"cases": [{"case", "argv", "twin", "twin_argv"}, …]}``. An error is recorded as its
    exit code and the subject that its one line names; a run that reaches its first step has none.
    """
    from q4kd.harness.__main__ import main

    def begin(*_arguments: object, **_options: object) -> NoReturn:
        raise _TrainingBegan

    loop: Any = importlib.import_module("q4kd.trainer.train.loop")
    loop.train_step = begin

    def outcome(argv: list[str]) -> tuple[str | None, str]:
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                code = main(argv)
        except _TrainingBegan:
            return None, ""
        message = said.getvalue()
        subject = message.removeprefix("q4kd: ").partition(": expected")[0] if message.count("\n") == 1 else "more"
        return (f"exit {code}: {subject}" if code else None), message[:600]

    records: list[JsonObject] = []
    for entry in read_json(cases)["cases"]:
        error, message = outcome(entry["argv"])
        twin_error, _ = outcome(entry["twin_argv"])
        record = {"case": entry["case"], "error": error, "message": message}
        records.append(record | {"twin": entry["twin"], "twin_error": twin_error})
    write_json(out, {"cases": records})


@probe("vocabulary-widths")
def vocabulary_widths(native: Path, padded: Path, student: Path, ids: Path, out: Path, facts: Path) -> None:
    """Compute the logits of a teacher and of its padded twin, and record the widths that meet in the loss."""
    import torch

    from q4kd.trainer.device.placement import place_teacher
    from q4kd.trainer.events import EventLog
    from q4kd.trainer.loss.config import KDLossConfig
    from q4kd.trainer.student.model import DistillationModel, load_student
    from q4kd.trainer.teacher.teacher import OnlineSignal, load_teacher

    widths: set[tuple[int, int]] = set()
    kd_loss: Any = importlib.import_module("q4kd.trainer.loss.fused")
    terms = kd_loss._chunk_terms

    def measured(student_CV: torch.Tensor, teacher_CV: torch.Tensor, *rest: object) -> object:
        widths.add((int(student_CV.shape[1]), int(teacher_CV.shape[1])))
        return terms(student_CV, teacher_CV, *rest)

    kd_loss._chunk_terms = measured
    ids_1T = torch.from_numpy(read_array(ids)).long().unsqueeze(0)
    arrays = {}
    for name, path in (("native", native), ("padded", padded)):
        teacher = load_teacher(place_teacher(path, dtype="float32"), events=EventLog(None))
        arrays[name] = teacher.logits(ids_1T)[0].numpy()
    causal_lm: Any = load_student(student, seed=1)
    model = DistillationModel(causal_lm, KDLossConfig())
    windows = ids_1T[:, :-1]
    signal = OnlineSignal(teacher.hidden(windows), teacher.head_logits)
    model(windows, ids_1T[:, 1:], signal, float(windows.numel()))
    save_arrays(out, arrays)
    [(student_width, teacher_width)] = widths
    table = {
        "rows of the teacher's head": teacher.vocab_size,
        "columns of the teacher's logits": arrays["padded"].shape[1],
        "columns of the teacher in the loss": teacher_width,
        "columns of the student in the loss": student_width,
        "vocab_size of the student": int(causal_lm.config.vocab_size),
    }
    write_json(facts, {"tables": {"vocabulary": table}})
