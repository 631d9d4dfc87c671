"""Checkpoints: a folder per step, written whole or not at all, without pickle, verified when read.

``checkpoints/step-000120/`` holds ``model.safetensors``, ``optimizer.safetensors``, ``random.safetensors`` (the states
of the random number generators) and ``state.json``. It is written under a temporary name and renamed when every byte is
on disk, so a folder with the final name is complete. ``checkpoints/best.json`` names the one with the best evaluation.
"""

import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from q4kd.trainer.errors import InputError, first_line
from q4kd.trainer.files import FieldKind, check_fields, read_json, sha256_file, sync_folder, write_json
from q4kd.trainer.train.distributed import load_trained_tensors
from q4kd.trainer.train.optimizer import MasterWeightOptimizer

STATE_VERSION = 2
BEST_FILE = "best.json"
# The best evaluation is the one whose metric times its sign is lowest.
_SIGN: Mapping[str, int] = {"loss": 1, "kl": 1, "agreement": -1}
_NAME = re.compile(r"step-(\d{6,12})")
_LEFT_OVER = re.compile(r"\.step-\d{6,12}\.tmp")
_PARTS = ("model", "optimizer", "random")
_STATE_FIELDS: dict[str, FieldKind] = {
    "version": STATE_VERSION, "step": int, "config": dict, "data_sha256": str, "evaluation": dict | None, "sha256": dict
}  # fmt: skip


@dataclass(frozen=True)
class CheckpointState:
    """What a checkpoint holds beside tensors.

    Attributes:
        step: optimiser steps taken.
        config: settings of the run.
        data_sha256: digest of the training tokens.
        evaluation: held-out figures of this step by name; None when it has not been evaluated.
    """

    step: int
    config: Mapping[str, Any]
    data_sha256: str
    evaluation: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class CheckpointTensors:
    """The tensors of a checkpoint: one safetensors file for each field.

    Attributes:
        model: weights that are trained, by name (``distributed.trained_tensors``).
        optimizer: its state as ``parameter|key`` (``MasterWeightOptimizer.tensors``).
        random: states of the generators, uint8 ``[processes, n]`` (``random_tensors``).
    """

    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    random: Mapping[str, Tensor]


def random_tensors(accelerator: Any) -> dict[str, Tensor]:
    """Return the states of torch's generators in every process, uint8 ``[processes, n]``; all processes must call it.

    Dropout draws from them, so that a resumed run repeats it only when they are restored.
    """
    states = {"cpu": torch.get_rng_state()}
    if accelerator.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(accelerator.device)
    if accelerator.num_processes == 1:
        return {name: state.unsqueeze(0) for name, state in states.items()}
    gathered = {name: accelerator.gather(state.unsqueeze(0).to(accelerator.device)) for name, state in states.items()}
    return {name: state.cpu().contiguous() for name, state in gathered.items()}


def list_checkpoints(run: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    folder = run / "checkpoints"
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def checkpoint_path(run: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint, whether it exists or not."""
    return run / "checkpoints" / f"step-{step:06d}"


def _fsync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _file(part: str) -> str:
    return f"{part}.safetensors"


def save_checkpoint(run: Path, tensors: CheckpointTensors, state: CheckpointState) -> Path:
    """Write a checkpoint and return its folder. A complete one that is there already is left as it is.

    Raises:
        OSError, SafetensorError: when it cannot be written; earlier checkpoints are then untouched.
    """
    folder = run / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    _remove_left_overs(folder)
    final = checkpoint_path(run, state.step)
    if final.is_dir():
        return final
    temporary = folder / f".{final.name}.tmp"
    temporary.mkdir()
    try:
        for part in _PARTS:
            save_file(dict(getattr(tensors, part)), temporary / _file(part))
            _fsync(temporary / _file(part))
        digests = {_file(part): sha256_file(temporary / _file(part)) for part in _PARTS}
        write_json(temporary / "state.json", {"version": STATE_VERSION, **vars(state), "sha256": digests})
        sync_folder(temporary)
        temporary.rename(final)
        sync_folder(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def _remove_left_overs(folder: Path) -> None:
    """Remove what a run that was killed while writing or pruning left under a temporary name."""
    for path in folder.iterdir():
        if _LEFT_OVER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def record_evaluation(path: Path, evaluation: Mapping[str, Any]) -> None:
    """Add a step's held-out figures to its checkpoint.

    Raises:
        OSError: when it cannot be written; the checkpoint is then as it was.
    """
    write_json(path / "state.json", read_json(path / "state.json") | {"evaluation": dict(evaluation)})


def _evaluations(run: Path, metric: str) -> dict[Path, float]:
    """Return the value of a metric for the checkpoints that have one; damaged ones have none."""
    found = {}
    for path in list_checkpoints(run):
        try:
            document = read_json(path / "state.json")
        except InputError:
            continue
        evaluation = document.get("evaluation") if isinstance(document, dict) else None
        value = evaluation.get(metric) if isinstance(evaluation, dict) else None
        if isinstance(value, int | float) and math.isfinite(value):
            found[path] = float(value)
    return found


def is_best(run: Path, metric: str, value: float) -> bool:
    """Return whether an evaluation is better than every checkpoint's; one that is not finite never is."""
    sign, others = _SIGN[metric], _evaluations(run, metric).values()
    return math.isfinite(value) and all(sign * value < sign * other for other in others)


def prune_checkpoints(run: Path, keep: int, metric: str) -> Path | None:
    """Drop all checkpoints but the newest ``keep`` and the best, which ``best.json`` then names; return the best.

    Raises:
        OSError: when ``best.json`` cannot be written.
    """
    folder, values = run / "checkpoints", _evaluations(run, metric)
    best = min(values, key=lambda path: _SIGN[metric] * values[path], default=None)
    if best is not None:
        write_json(folder / BEST_FILE, {"checkpoint": best.name, "metric": metric, "value": values[best]})
    for old in list_checkpoints(run)[:-keep]:
        if old != best:
            # It is renamed first, so that nothing half deleted bears the name of a checkpoint.
            old.rename(folder / f".{old.name}.tmp")
    _remove_left_overs(folder)
    return best


def _refuse(path: Path, expected: str, got: str) -> InputError:
    remedy = "delete this checkpoint to resume from the one before it"
    return InputError(str(path), expected=expected, got=got, remedy=remedy)


def read_state(path: Path) -> CheckpointState:
    """Read and verify a checkpoint's ``state.json`` and the digests of its tensors.

    Raises:
        InputError: when a part is missing, damaged or of another version.
    """
    try:
        document = read_json(path / "state.json")
    except InputError as error:
        raise _refuse(path, f"state.json with {error.expected}", error.got) from error
    try:
        fields = check_fields(document, _STATE_FIELDS)
    except ValueError as error:
        raise _refuse(path, f"state.json of checkpoint version {STATE_VERSION}", str(error)) from error
    for part in map(_file, _PARTS):
        if not (path / part).is_file() or sha256_file(path / part) != fields["sha256"].get(part):
            raise _refuse(path, f"{part} with the digest in state.json", "a missing or changed file")
    return CheckpointState(fields["step"], fields["config"], fields["data_sha256"], fields["evaluation"])


def restore_checkpoint(path: Path, model: nn.Module, optimizer: MasterWeightOptimizer, accelerator: Any) -> None:
    """Load verified tensors into student, optimiser and random number generators, in all processes together.

    Raises:
        InputError: when the tensors do not fit this student.
    """
    try:
        load_trained_tensors(model, load_file(path / _file("model")).items())
        optimizer.load(load_file(path / _file("optimizer")).items())
        random = load_file(path / _file("random"))
    except (RuntimeError, SafetensorError, OSError, ValueError, KeyError) as error:
        raise _refuse(path, "tensors of this student", first_line(error)) from error
    try:
        torch.set_rng_state(_own_state(random["cpu"], accelerator))
        if accelerator.device.type == "cuda" and "cuda" in random:
            torch.cuda.set_rng_state(_own_state(random["cuda"], accelerator), accelerator.device)
    except (KeyError, IndexError, RuntimeError, TypeError, ZeroDivisionError) as error:
        raise _refuse(path, "states of random number generators", first_line(error)) from error


def _own_state(states_PN: Tensor, accelerator: Any) -> Tensor:
    """Return this process's generator state, or an earlier process's when the run had fewer processes.

    It is a copy, because torch reads a view of another row far outside its memory: it takes the view's offset in bytes
    for one in states.
    """
    return states_PN[accelerator.process_index % len(states_PN)].clone()


def explain_difference(old: Mapping[str, Any], new: Mapping[str, Any], ignore: frozenset[str]) -> str | None:
    """Return the settings that differ between a checkpoint's run and this one, or None."""
    differing = [
        f"{key}: {old.get(key)!r} → {new.get(key)!r}"
        for key in sorted(set(old) | set(new))
        if key not in ignore and old.get(key) != new.get(key)
    ]
    return "; ".join(differing) or None
