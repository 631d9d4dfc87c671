"""Checkpoints: a folder per step, written whole or not at all, without pickle, verified when read.

``checkpoints/step-000120/`` holds ``model.safetensors``, ``optimizer.safetensors`` and ``state.json``. It is written
under a temporary name and renamed when every byte is on disk, so a folder with the final name is complete.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from q4kd.trainer.errors import InputError
from q4kd.trainer.files import read_json, sha256_file, sync_folder, write_json
from q4kd.trainer.optimizer import MasterWeightOptimizer
from q4kd.trainer.sharding import load_trained_tensors

STATE_VERSION = 1
_NAME = re.compile(r"step-(\d{6,12})")
_PARTS = ("model.safetensors", "optimizer.safetensors")


@dataclass(frozen=True)
class CheckpointState:
    """What a checkpoint knows beside tensors."""

    step: int
    config: Mapping[str, Any]
    data_sha256: str


def list_checkpoints(run: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    folder = run / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=lambda path: path.name)


def _fsync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def save_checkpoint(
    run: Path, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], state: CheckpointState, keep: int
) -> Path:
    """Write a checkpoint and drop all but the newest ``keep``; tensors as ``sharding.gather`` gives them.

    Raises:
        OSError: when it cannot be written; earlier checkpoints are then untouched.
    """
    folder = run / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{state.step:06d}"
    temporary = folder / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        save_file(dict(model), temporary / _PARTS[0])
        save_file(dict(optimizer), temporary / _PARTS[1])
        for part in _PARTS:
            _fsync(temporary / part)
        document = {
            "version": STATE_VERSION,
            "step": state.step,
            "config": dict(state.config),
            "data_sha256": state.data_sha256,
            "sha256": {part: sha256_file(temporary / part) for part in _PARTS},
        }
        write_json(temporary / "state.json", document)
        sync_folder(temporary)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        sync_folder(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in list_checkpoints(run)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _refuse(path: Path, expected: str, got: str) -> InputError:
    return InputError(
        str(path), expected=expected, got=got, remedy="delete this checkpoint to resume from the one before it"
    )


def read_state(path: Path) -> CheckpointState:
    """Read and verify a checkpoint's ``state.json`` and the digests of its tensors.

    Raises:
        InputError: when a part is missing, damaged or of another version.
    """
    document = read_json(path / "state.json")
    if not isinstance(document, dict) or document.get("version") != STATE_VERSION:
        raise _refuse(path, f"checkpoint version {STATE_VERSION}", json.dumps(document)[:80])
    digests = document.get("sha256")
    step, config = document.get("step"), document.get("config")
    if not isinstance(digests, dict) or not isinstance(step, int) or not isinstance(config, dict):
        raise _refuse(path, "step, config and digests in state.json", "something else")
    for part in _PARTS:
        if not (path / part).is_file() or sha256_file(path / part) != digests.get(part):
            raise _refuse(path, f"{part} with the digest in state.json", "a missing or changed file")
    return CheckpointState(step, config, str(document.get("data_sha256")))


def restore_checkpoint(path: Path, model: nn.Module, optimizer: MasterWeightOptimizer) -> None:
    """Load verified tensors into the student and its optimiser, in all processes together.

    Raises:
        InputError: when the tensors do not fit this student.
    """
    try:
        load_trained_tensors(model, load_file(path / _PARTS[0]).items())
        optimizer.load(load_file(path / _PARTS[1]).items())
    except (RuntimeError, SafetensorError, OSError, ValueError, KeyError) as error:
        raise _refuse(path, "tensors of this student", str(error).splitlines()[0][:120]) from error


def explain_difference(old: Mapping[str, Any], new: Mapping[str, Any], ignore: frozenset[str]) -> str | None:
    """Return the settings that differ between a checkpoint's run and this one, or None."""
    differing = [
        f"{key}: {old.get(key)!r} → {new.get(key)!r}"
        for key in sorted(set(old) | set(new))
        if key not in ignore and old.get(key) != new.get(key)
    ]
    return "; ".join(differing) or None
