"""Measurements on many model files in one child process, through the trainer's own loading functions."""

import argparse
import io
from pathlib import Path
from typing import Any

import numpy as np

from q4kd.trainer.files import write_atomic, write_json


def model_logits(arguments: list[str]) -> int:
    """Compute the logits of several models for the same ids: one array for each file, named by its stem."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ids", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", type=Path, nargs="+", required=True)
    args = parser.parse_args(arguments)

    import torch

    from q4kd.trainer.events import EventLog
    from q4kd.trainer.placement import place_teacher
    from q4kd.trainer.teacher import load_teacher

    ids = torch.from_numpy(np.load(args.ids, allow_pickle=False)).long().unsqueeze(0)
    arrays: dict[str, Any] = {}
    for path in args.models:
        teacher = load_teacher(place_teacher(path, dtype="float32"), events=EventLog(None))
        arrays[path.stem] = teacher.logits(ids)[0].numpy()
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_atomic(args.out, buffer.getvalue())
    return 0


def open_models(arguments: list[str]) -> int:
    """Load files that must be refused, and the valid twin of each; record the type of error and its line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", required=True, help="case, invalid file, valid file, repeated")
    args = parser.parse_args(arguments)

    from q4kd.trainer.events import EventLog
    from q4kd.trainer.placement import place_teacher
    from q4kd.trainer.teacher import load_teacher

    def outcome(path: str) -> tuple[str | None, str | None]:
        try:
            load_teacher(place_teacher(Path(path)), events=EventLog(None), announce=lambda _line: None)
        except Exception as error:  # the type of whatever comes is the observation
            return type(error).__name__, str(error)[:300]
        return None, None

    records = []
    words = args.cases
    for case, invalid, valid in zip(words[0::3], words[1::3], words[2::3], strict=True):
        error, message = outcome(invalid)
        records.append(
            {
                "case": case,
                "error": error,
                "message": (message or "").replace(str(Path(invalid).parent), "…"),
                "twin": f"{case}, valid",
                "twin_error": outcome(valid)[0],
            }
        )
    write_json(args.out, {"cases": records})
    return 0
