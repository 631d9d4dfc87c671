"""What a run folder says of the model in it: which weights there are, and how they were made.

A folder may come from anybody: every file is read within bounds, and what is absent or malformed is listed as missing,
never guessed.
"""

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from q4kd.trainer.errors import InputError
from q4kd.trainer.files import read_json
from q4kd.trainer.student.folder import WEIGHT_FILES, has_weights
from q4kd.trainer.train.checkpoint import list_best_weights, list_checkpoints, read_state
from q4kd.trainer.train.kept_checkpoints import BEST_FILE

RUN_FILE, SUMMARY_FILE, EVENTS_FILE = "run.json", "summary.json", "events.jsonl"
_MAX_LINE_BYTES = 1 << 20
_MAX_RECORD_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """How a model was made.

    Attributes:
        step: optimiser steps that its weights have seen.
        steps: steps of the full run, where known.
        config: the run's settings, with the last part only of each path.
        teacher: ``file``, ``sha256`` and ``bytes`` of the teacher.
        student: the folder that the run started from, and the digest of its config.
        data_sha256: digest of the training tokens.
        evaluations: held-out evaluations, by step: ``loss``, ``kl``, ``agreement``, ``tokens``.
        missing: what could not be found out, one line each.
    """

    step: int | None = None
    steps: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    teacher: Mapping[str, str | int] = field(default_factory=dict)
    student: Mapping[str, str | int] = field(default_factory=dict)
    data_sha256: str | None = None
    evaluations: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    missing: tuple[str, ...] = ()

    @property
    def held_out(self) -> Mapping[str, float] | None:
        """The evaluation of exactly these weights, or None."""
        return None if self.step is None else self.evaluations.get(self.step)


@dataclass(frozen=True, kw_only=True)
class ExportSource:
    """A model to export.

    Attributes:
        title: name for headings and files.
        folder: Hugging Face folder whose config and tokenizer are the model's.
        checkpoint: folder of the weights, when they are not in ``folder``.
        record: how it was made; None for a model that no run made.
    """

    title: str
    folder: Path
    checkpoint: Path | None = None
    record: RunRecord | None = None


def find_source(path: Path, checkpoint: str | None = None, student: Path | None = None) -> ExportSource:
    """Find the model of a run folder, or take a Hugging Face folder as it is.

    Args:
        path: folder of a run, or a Hugging Face causal LM folder with weights.
        checkpoint: ``best``, ``last`` or a name such as ``step-000120``; None takes the finished model.
        student: the run's student folder, where the one it names is no longer there: a checkpoint holds weights only.

    Raises:
        InputError: when there is no such folder, model or checkpoint.
    """
    if (path / "config.json").is_file():
        if checkpoint is not None:
            subject, got = f"--checkpoint {checkpoint}", f"{path}, a model folder"
            raise InputError(subject, expected="a run folder", got=got, remedy="leave --checkpoint out")
        return ExportSource(title=_title(path), folder=_model_folder(path))
    if (path / "adapter_config.json").is_file():
        return ExportSource(title=_title(path), folder=_model_folder(path))
    checkpoints = [*list_best_weights(path), *list_checkpoints(path)]
    if not (path / "model").is_dir() and not checkpoints:
        expected = "a folder of q4kd distill, or a Hugging Face model folder"
        got = "neither config.json, model/ nor checkpoints/"
        raise InputError(str(path), expected=expected, got=got, remedy="name the --out of a run, or a model's folder")
    title = _title(path)
    if checkpoint is None:
        if not (path / "model").is_dir():
            got = f"no final model, and {len(checkpoints)} checkpoint(s) up to {checkpoints[-1].name}"
            remedy = "finish it with --resume, or name one: --checkpoint last"
            raise InputError(str(path), expected="a finished run", got=got, remedy=remedy)
        folder = _model_folder(path / "model")
        return ExportSource(title=title, folder=folder, record=read_record(path, None))
    chosen = _choose(path, checkpoints, checkpoint)
    record = read_record(path, chosen)
    return ExportSource(
        title=f"{title}-{chosen.name}", folder=_student_folder(path, chosen, student), checkpoint=chosen, record=record
    )


def _title(path: Path) -> str:
    """Return a folder's name, fit for file names, quotation marks and headings."""
    return re.sub(r"[^\w.-]+", "-", path.resolve().name, flags=re.ASCII).strip("-.") or "model"


def _model_folder(folder: Path) -> Path:
    """Return a folder that holds a whole model, or say what it holds instead."""
    if has_weights(folder):
        return folder
    if (folder / "adapter_config.json").is_file() or (folder / "adapter_model.safetensors").is_file():
        remedy = "merge it into its base first: peft's merge_and_unload, then save_pretrained"
        raise InputError(str(folder), expected="a whole model", got="a LoRA adapter alone", remedy=remedy)
    expected, remedy = " or ".join(WEIGHT_FILES), "name a folder that save_pretrained wrote"
    raise InputError(str(folder), expected=expected, got="no weights as safetensors", remedy=remedy)


def _choose(run: Path, checkpoints: list[Path], wanted: str) -> Path:
    """Return the checkpoint of that name; the best is the one that the run itself chose by its ``best_metric``."""
    names = [path.name for path in checkpoints]
    if wanted == "last" and checkpoints:
        return checkpoints[-1]
    if wanted == "best" and checkpoints:
        best = _object(run / "checkpoints" / BEST_FILE).get("checkpoint")
        if best not in names:
            expected = f"a checkpoint with a held-out evaluation, named in {BEST_FILE}"
            got, remedy = f"none among {', '.join(names)}", "name one of these; set eval_every next time"
            raise InputError("--checkpoint best", expected=expected, got=got, remedy=remedy)
        return run / "checkpoints" / str(best)
    if wanted not in names:
        expected = f"best, last or one of {', '.join(names) or 'none: the run has no checkpoint'}"
        raise InputError(f"--checkpoint {wanted}", expected=expected, got=wanted, remedy="choose one of these")
    return run / "checkpoints" / wanted


def _student_folder(run: Path, checkpoint: Path, given: Path | None) -> Path:
    """Return the folder with the config and the tokenizer of a checkpoint's model."""
    named = read_state(checkpoint).config.get("student")
    places = [given] if given else [run / "model", *([Path(named)] if isinstance(named, str) else [])]
    for place in places:
        if (place / "config.json").is_file():
            return place
    expected = "the student's folder, for the config and the tokenizer of these weights"
    got = f"no config.json in {places[-1]}"
    raise InputError(str(given or checkpoint), expected=expected, got=got, remedy="name it with --student")


def read_record(run: Path, checkpoint: Path | None) -> RunRecord:
    """Gather what a run left of itself: run.json, the state of a checkpoint, summary.json and the evaluations.

    The record is that of the checkpoint's weights, or of the final model's without one.

    Raises:
        InputError: when the checkpoint is damaged.
    """
    written = _object(run / RUN_FILE)
    newest = checkpoint or next(reversed(list_checkpoints(run)), None)
    state = read_state(newest) if newest else None
    summary = _object(run / SUMMARY_FILE)
    steps = written.get("steps", summary.get("steps_of_full_run"))
    step = state.step if state and checkpoint else summary.get("steps")
    config = written.get("config") or (state.config if state else {})
    settings = config if isinstance(config, Mapping) else {}
    teacher = _scalars(written.get("teacher"))
    if "file" in teacher:
        teacher["file"] = Path(str(teacher["file"])).name
    elif isinstance(settings.get("teacher"), str):
        teacher["file"] = Path(settings["teacher"]).name
    data = written.get("data_sha256") or (state.data_sha256 if state else None)
    missing = [] if written else [f"this run has no {RUN_FILE}, so the digest of its teacher is not recorded"]
    evaluations = _evaluations(run)
    if not evaluations:
        missing.append("no held-out evaluation is recorded")
    return RunRecord(
        step=step if isinstance(step, int) else None,
        steps=steps if isinstance(steps, int) else None,
        config={key: _public(value) for key, value in settings.items()},
        teacher=teacher,
        student=_scalars(written.get("student")),
        data_sha256=data if isinstance(data, str) else None,
        evaluations=evaluations,
        missing=tuple(missing),
    )


def _public(value: object) -> object:
    """Return a setting as others may see it: a path keeps its last part only, since the rest describes a machine."""
    return Path(value).name if isinstance(value, str) and "/" in value and "*" not in value else value


def _object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, empty when there is none."""
    if not path.is_file():
        return {}
    value = read_json(path, _MAX_RECORD_BYTES)
    return value if isinstance(value, dict) else {}


def _scalars(value: object) -> dict[str, str | int]:
    """Return the texts and whole numbers of a mapping."""
    if not isinstance(value, Mapping):
        return {}
    return {str(key): item for key, item in value.items() if isinstance(item, str | int) and not isinstance(item, bool)}


def _evaluations(run: Path) -> dict[int, dict[str, float]]:
    """Return the held-out evaluations of a run by step; the later one of a step that was evaluated twice."""
    path, found = run / EVENTS_FILE, dict[int, dict[str, float]]()
    if not path.is_file():
        return found
    with path.open("rb") as file:
        for line in iter(functools.partial(file.readline, _MAX_LINE_BYTES), b""):
            event = _eval_event(line)
            # A run on a cache has no teacher to evaluate with, so neither KL nor agreement.
            values = {key: event[key] for key in ("loss", "kl", "agreement", "tokens") if key in event}
            numbers = all(isinstance(value, int | float) for value in values.values())
            if {"loss", "tokens"} <= values.keys() and numbers and isinstance(event.get("step"), int):
                found[event["step"]] = {key: float(value) for key, value in values.items()}
    return found


def _eval_event(line: bytes) -> dict[str, Any]:
    """Return the event ``eval`` that a line holds, or nothing; a run that was killed may have left half a line."""
    if b'"eval"' not in line:
        return {}
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return event if isinstance(event, dict) and event.get("event") == "eval" else {}
