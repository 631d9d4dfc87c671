"""Measurements on whole runs: the cost of reporting, whether a run would start, how wide the compared logits are."""

import argparse
import contextlib
import functools
import importlib
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from q4kd.trainer.files import read_json, write_atomic, write_json


def _save_arrays(path: Path, arrays: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomic(path, buffer.getvalue())


def distill_timed(arguments: list[str]) -> int:
    """Run ``q4kd distill`` with a clock around each step, and around the event and the line that report it."""
    cut = arguments.index("--")
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments[:cut])

    from q4kd.harness.__main__ import main
    from q4kd.trainer.events import EventLog
    from q4kd.trainer.progress import Reporter

    # (start, seconds) of each call
    steps: list[tuple[float, float]] = []
    events: list[tuple[float, float]] = []
    lines: list[tuple[float, float]] = []

    def clocked(original: Callable[..., Any], into: list[tuple[float, float]], name: str | None = None) -> Any:
        @functools.wraps(original)
        def call(*words: Any, **options: Any) -> Any:
            if name is not None and name not in words:
                return original(*words, **options)
            before = time.monotonic()
            result = original(*words, **options)
            into.append((before, time.monotonic() - before))
            return result

        return call

    loop: Any = importlib.import_module("q4kd.trainer.training_loop")
    loop.train_step = clocked(loop.train_step, steps)
    EventLog.emit = clocked(EventLog.emit, events, "step")  # type: ignore[method-assign]
    Reporter.step = clocked(Reporter.step, lines)  # type: ignore[method-assign]
    code = main(arguments[cut + 1 :])
    if code == 0 and len(steps) == len(events) == len(lines):
        step, event, line = (np.array(found) for found in (steps, events, lines))
        arrays = {
            "numerator": event[:, 1] + line[:, 1],
            "denominator": step[:, 1],
            "numerator_start": event[:, 0],
            "denominator_start": step[:, 0],
        }
        _save_arrays(args.out, arrays)
    return code


class _TrainingBegan(BaseException):
    """The run came to its first step: it was accepted. Nothing between here and the probe catches it."""


def start_runs(arguments: list[str]) -> int:
    """Start runs that must be refused, and the valid twin of each, up to the first step; record how each ended.

    ``--cases`` is a JSON file: ``{"cases": [{"case", "argv", "twin", "twin_argv"}, …]}``. An error is recorded as its
    exit code and the subject that its one line names; a run that reaches its first step has none.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)

    from q4kd.harness.__main__ import main

    def begin(*_arguments: Any, **_options: Any) -> Any:
        raise _TrainingBegan

    loop: Any = importlib.import_module("q4kd.trainer.training_loop")
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

    records = []
    for entry in read_json(args.cases)["cases"]:
        error, message = outcome(entry["argv"])
        twin_error, _ = outcome(entry["twin_argv"])
        records.append(
            {
                "case": entry["case"],
                "error": error,
                "message": message,
                "twin": entry["twin"],
                "twin_error": twin_error,
            }
        )
    write_json(args.out, {"cases": records})
    return 0


def vocabulary_widths(arguments: list[str]) -> int:
    """Compute the logits of a teacher and of its padded twin, and record the widths that meet in the loss."""
    parser = argparse.ArgumentParser()
    for option in ("--native", "--padded", "--student", "--ids", "--out", "--facts"):
        parser.add_argument(option, type=Path, required=True)
    args = parser.parse_args(arguments)

    import torch

    from q4kd.trainer import student
    from q4kd.trainer.events import EventLog
    from q4kd.trainer.loss_config import KDLossConfig
    from q4kd.trainer.teacher import load_teacher
    from q4kd.trainer.teacher_signal import OnlineSignal

    widths: set[tuple[int, int]] = set()
    kd_loss: Any = importlib.import_module("q4kd.trainer.kd_loss")
    terms = kd_loss._chunk_terms

    def measured(student_CV: Any, teacher_CV: Any, *rest: Any) -> Any:
        widths.add((int(student_CV.shape[1]), int(teacher_CV.shape[1])))
        return terms(student_CV, teacher_CV, *rest)

    kd_loss._chunk_terms = measured
    ids = torch.from_numpy(np.load(args.ids, allow_pickle=False)).long().unsqueeze(0)
    arrays = {}
    for name in ("native", "padded"):
        teacher = load_teacher(getattr(args, name), dtype="float32", events=EventLog(None))
        arrays[name] = teacher.logits(ids)[0].numpy()
    causal_lm: Any = student.load_student(args.student, seed=1)
    model = student.DistillationModel(causal_lm, KDLossConfig())
    windows = ids[:, :-1]
    signal = OnlineSignal(teacher.hidden(windows), teacher.head_logits)
    model(windows, ids[:, 1:], signal, float(windows.numel()))
    _save_arrays(args.out, arrays)
    [(student_width, teacher_width)] = widths
    table = {
        "rows of the teacher's head": teacher.vocab_size,
        "columns of the teacher's logits": arrays["padded"].shape[1],
        "columns of the teacher in the loss": teacher_width,
        "columns of the student in the loss": student_width,
        "vocab_size of the student": int(causal_lm.config.vocab_size),
    }
    write_json(args.facts, {"tables": {"vocabulary": table}})
    return 0
