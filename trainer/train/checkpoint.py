"""Checkpoints: a folder per step, written whole or not at all, without pickle, verified when read.

``checkpoints/step-000120/`` holds ``model.safetensors``, ``optimizer.safetensors``, ``random.safetensors`` (the states
of the random number generators) and ``state.json``. A large state of the optimiser is cut into several files, as
``optimizer-00001-of-00004.safetensors``; files are written and hashed beside each other. ``checkpoints/best-000120/``
holds the weights of the best evaluation alone, which a run cannot be continued from. Each is written under a temporary
name and renamed when every byte is on disk, so a folder with the final name is complete. ``checkpoints/best.json``
names the one with the best evaluation.
"""

import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from q4kd.trainer.errors import InputError, first_line
from q4kd.trainer.files import FieldKind, check_fields, read_json, sha256_file, sync_folder, usable_cores, write_json
from q4kd.trainer.formats.safetensors_writer import WriteFigures, write_tensors
from q4kd.trainer.train.checkpoint_files import cut, file_name, part_files
from q4kd.trainer.train.distributed import load_trained_tensors
from q4kd.trainer.train.optimizer import MasterWeightOptimizer

STATE_VERSION = 2
_NAME = re.compile(r"(step|best)-(\d{6,12})")
_LEFT_OVER = re.compile(r"\.(step|best)-\d{6,12}(\.old)?\.tmp")
# What a folder holds, by the first part of its name. Weights alone can be exported, and not trained on.
_PARTS = {"step": ("model", "optimizer", "random"), "best": ("model",)}
# Files that are written, or read and hashed, at one time: each has a thread that hashes beside one that writes.
FILES_AT_ONCE = max(1, min(4, usable_cores() // 2))
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


def _folders(run: Path, kind: str) -> list[Path]:
    folder = run / "checkpoints"
    if not folder.is_dir():
        return []
    names = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    return [path for _, path in sorted((int(name[2]), path) for name, path in names if name and name[1] == kind)]


def list_checkpoints(run: Path) -> list[Path]:
    """Return the complete checkpoints from which a run can continue, oldest first."""
    return _folders(run, "step")


def list_best_weights(run: Path) -> list[Path]:
    """Return the folders of best weights, oldest first: one, and for a moment two while one takes another's place."""
    return _folders(run, "best")


def checkpoint_path(run: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint, whether it exists or not."""
    return run / "checkpoints" / f"step-{step:06d}"


def save_checkpoint(
    run: Path,
    tensors: CheckpointTensors,
    state: CheckpointState,
    figures: WriteFigures | None = None,
    threads: int | None = None,
) -> Path:
    """Write a checkpoint and return its folder. A complete one that is there already is left as it is.

    Args:
        run: folder of the run.
        tensors: of any device; nobody may change them until this returns.
        state: what is not a tensor.
        figures: where the times of the files are added up.
        threads: files that are written at one time; by default as many as there are cores for. Of each, two tensors of
            another device are on the host.

    Raises:
        OSError: when it cannot be written; earlier checkpoints are then untouched.
    """
    return _save(checkpoint_path(run, state.step), vars(tensors), state, figures, threads or FILES_AT_ONCE)


def save_best_weights(
    run: Path, model: Mapping[str, Tensor], state: CheckpointState, figures: WriteFigures | None = None
) -> Path:
    """Write the weights of the best evaluation, as ``save_checkpoint`` does, and return their folder.

    Weights of that step that are there already are replaced: a run that was killed may have come to it before.
    """
    return _save(run / "checkpoints" / f"best-{state.step:06d}", {"model": model}, state, figures, 1)


def _save(
    final: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: CheckpointState,
    figures: WriteFigures | None,
    threads: int,
) -> Path:
    folder = final.parent
    folder.mkdir(parents=True, exist_ok=True)
    remove_left_overs(folder)
    if final.is_dir() and final.name.startswith("step-"):
        return final
    temporary = folder / f".{final.name}.tmp"
    temporary.mkdir()
    try:
        files = {name: own for part, held in tensors.items() for name, own in cut(part, held).items()}
        digests = _write_files(temporary, files, figures or WriteFigures(), threads)
        complete_folder(temporary, final, {"version": STATE_VERSION, **vars(state), "sha256": digests})
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def _write_files(
    folder: Path, files: Mapping[str, Mapping[str, Tensor]], figures: WriteFigures, threads: int
) -> dict[str, str]:
    """Write files of tensors beside each other and return their digests; all have ended when one fails."""
    own = {name: WriteFigures() for name in files}
    with ThreadPoolExecutor(threads, "file") as pool:
        writing = {name: pool.submit(write_tensors, folder / name, held, own[name]) for name, held in files.items()}
    for one in own.values():
        figures.add(one)
    return {name: digest.result() for name, digest in writing.items()}


def complete_folder(temporary: Path, final: Path, state: Mapping[str, Any]) -> None:
    """Give a folder whose tensors are on the disk its state and its name."""
    write_json(temporary / "state.json", state)
    sync_folder(temporary)
    if final.is_dir():
        final.rename(final.parent / f".{final.name}.old.tmp")
    temporary.rename(final)
    sync_folder(final.parent)


def remove_left_overs(folder: Path) -> None:
    """Remove what a run that was killed while writing or pruning left under a temporary name."""
    for path in folder.iterdir():
        if _LEFT_OVER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _refuse(path: Path, expected: str, got: str) -> InputError:
    remedy = "delete this checkpoint to resume from the one before it"
    return InputError(str(path), expected=expected, got=got, remedy=remedy)


def read_state(path: Path) -> CheckpointState:
    """Read and verify the ``state.json`` of a checkpoint or of best weights, and the digests of the tensors.

    Raises:
        InputError: when a part is missing, damaged, of another version or of another step than the folder's name says.
    """
    try:
        document = read_json(path / "state.json")
    except InputError as error:
        raise _refuse(path, f"state.json with {error.expected}", error.got) from error
    try:
        fields = check_fields(document, _STATE_FIELDS)
    except ValueError as error:
        raise _refuse(path, f"state.json of checkpoint version {STATE_VERSION}", str(error)) from error
    name = _NAME.fullmatch(path.name)
    if name is None or int(name[2]) != fields["step"]:
        raise _refuse(path, f"state.json of the step in the folder's name, {path.name}", f"step {fields['step']}")
    _check_digests(path, _PARTS[name[1]], fields["sha256"])
    return CheckpointState(fields["step"], fields["config"], fields["data_sha256"], fields["evaluation"])


def _check_digests(path: Path, parts: Iterable[str], digests: Mapping[str, Any]) -> None:
    """Refuse a folder that lacks a file of a part, or whose bytes are not those that were written."""
    names: list[str] = []
    for part in parts:
        found = part_files(part, digests)
        if not found:
            raise _refuse(path, f"{file_name(part)} with the digest in state.json", "a state.json that has none")
        names += found
    with ThreadPoolExecutor(FILES_AT_ONCE, "digest") as pool:
        found_digests = list(pool.map(_digest, [path / name for name in names]))
    for name, digest in zip(names, found_digests, strict=True):
        if digest is None or digest != digests[name]:
            raise _refuse(path, f"{name} with the digest in state.json", "a missing or changed file")


def _digest(path: Path) -> str | None:
    return sha256_file(path) if path.is_file() else None


def restore_checkpoint(path: Path, model: nn.Module, optimizer: MasterWeightOptimizer, accelerator: Any) -> None:
    """Load verified tensors into student, optimiser and random number generators, in all processes together.

    Raises:
        InputError: when the tensors do not fit this student.
    """
    try:
        load_trained_tensors(model, _finite(path / file_name("model")).items())
        optimizer.load(_optimizer_state(path))
        random = load_file(path / file_name("random"))
    except (RuntimeError, SafetensorError, OSError, ValueError, KeyError) as error:
        raise _refuse(path, "tensors of this student", first_line(error)) from error
    try:
        torch.set_rng_state(_own_state(random["cpu"], accelerator))
        if accelerator.device.type == "cuda" and "cuda" in random:
            torch.cuda.set_rng_state(_own_state(random["cuda"], accelerator), accelerator.device)
    except (KeyError, IndexError, RuntimeError, TypeError, ZeroDivisionError) as error:
        raise _refuse(path, "states of random number generators", first_line(error)) from error


def _optimizer_state(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the optimiser's tensors of a folder that ``read_state`` has verified."""
    for name in part_files("optimizer", read_json(path / "state.json")["sha256"]):
        yield from _finite(path / name).items()


def _finite(file: Path) -> dict[str, Tensor]:
    """Read a file of tensors; refuse numbers that are not finite, which no intact run goes on from."""
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise _refuse(file.parent, f"finite numbers in {file.name}", f"NaN or infinity in {name[:100]}")
    return tensors


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
