"""The folder of a run: one run holds it at a time, no run overwrites another, and a failed step is kept in it."""

import errno
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from q4kd.trainer.config.settings import DistillConfig
from q4kd.trainer.data.batch import Batch
from q4kd.trainer.errors import InputError, RunFolderError, unwritable
from q4kd.trainer.files import read_json, write_json
from q4kd.trainer.made import MadeThings
from q4kd.trainer.train.checkpoint import list_best_weights, list_checkpoints

# What a finished run leaves, and what it writes each of these as; an earlier leg's is deleted when a run begins.
PUBLISHED = ("model", "adapter")
DRAFTS = {name: f".{name}.tmp" for name in PUBLISHED}
# Files that a run replaces, each with fields that those of a run have.
_RECORDS = {"run.json": ("config", "data_sha256"), "summary.json": ("steps", "wall_seconds")}
_STEP_FOLDER = re.compile(r"\.?(step|best)-\d{6,12}(\.old)?(\.tmp)?")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


@contextmanager
def locked(out: Path, is_main: bool) -> Iterator[None]:
    """Hold the run's folder, so that two runs never write the same checkpoints. One process of a run is enough.

    Args:
        out: the folder; created when missing.
        is_main: whether this is the process that holds it; the others do nothing.

    Raises:
        InputError: when another run holds it, or it cannot be written.
    """
    if not is_main:
        yield
        return
    lock = FileLock(out / ".lock", timeout=0)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        expected, remedy = "a folder no other run is using", "choose another folder"
        raise InputError(f"--out {out}", expected=expected, got="a locked one", remedy=remedy) from error
    except OSError as error:
        raise unwritable(f"--out {out}", error) from error
    try:
        yield
    finally:
        lock.release()


def check_run_folder(out: Path, resume: bool) -> None:
    """Refuse to start over an earlier run, or to resume where there is none.

    Raises:
        InputError: saying which of the two.
    """
    present, weights = list_checkpoints(out), list_best_weights(out)
    if not resume and (present or weights):
        got, remedy = f"{len(present)} checkpoint(s)", "pass --resume to continue that run, or choose another folder"
        if not present:
            got, remedy = f"{weights[-1].name} of an earlier run", "choose another folder, or delete that one"
        raise InputError(f"--out {out}", expected="a folder without checkpoints", got=got, remedy=remedy)
    if resume and not present:
        got, remedy = "none", "start the run without --resume"
        if weights:
            got = f"{weights[-1].name} alone, which holds weights and neither moments nor random states"
            remedy = "start a new run from these weights: q4kd export --checkpoint best, then --student that folder"
        raise InputError(f"--resume in {out}", expected="a checkpoint", got=got, remedy=remedy)


def check_own_paths(config: DistillConfig) -> None:
    """Refuse a run that would delete or replace what no run made: an input of its own, a link, somebody's files.

    Raises:
        InputError: naming the file or folder, before anything is trained or deleted.
    """
    out = config.out
    _check_inputs(config)
    MadeThings(out).check(*PUBLISHED, *DRAFTS.values())
    for name, fields in _RECORDS.items():
        path = out / name
        if path.is_symlink() or path.exists():
            _check_record(path, fields)
    checkpoints = out / "checkpoints"
    for folder in sorted(checkpoints.iterdir()) if checkpoints.is_dir() else []:
        if _STEP_FOLDER.fullmatch(folder.name):
            _check_checkpoint(folder)


def _check_inputs(config: DistillConfig) -> None:
    """Refuse inputs that lie where a run writes."""
    out = config.out.resolve()
    owned = [out / name for name in (*PUBLISHED, *DRAFTS.values(), "checkpoints", "aborted")]
    # A link at such a name leads elsewhere, and what is there would be written through it.
    owned += [path.resolve() for path in owned]
    given = {
        "--student": config.student,
        "--teacher": config.teacher,
        "--data": config.data,
        "--held-out": config.held_out,
        "--teacher-cache": config.teacher_cache,
    }
    for option, path in given.items():
        if path is None:
            continue
        place = path.resolve()
        inside = next((own for own in owned if place == own or own in place.parents), None)
        if option == "--student" and place == out:
            inside = out
        if inside is not None:
            got, remedy = f"one that the run writes to ({inside})", "choose another --out, or move the input"
            raise InputError(f"{option} {path}", expected="a place of its own", got=got, remedy=remedy)


def _check_record(path: Path, fields: tuple[str, ...]) -> None:
    remedy = "move it elsewhere, or choose another --out: the run writes a file of this name"
    got = "a link"
    if not path.is_symlink():
        try:
            document = read_json(path)
        except InputError as error:
            document, got = None, error.got
        else:
            got = "other JSON"
        if isinstance(document, dict) and all(name in document for name in fields):
            return
    raise InputError(str(path), expected="nothing, or that of an earlier run", got=got, remedy=remedy)


def _check_checkpoint(folder: Path) -> None:
    """Refuse a folder that pruning would delete although it holds more than a checkpoint, or is a link."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    foreign = next((name for name in names if not name.endswith((".safetensors", ".json", ".tmp"))), None)
    complete = folder.name.startswith(".") or "state.json" in names
    if folder.is_symlink() or not folder.is_dir() or foreign is not None or not complete:
        subject = folder if foreign is None else folder / foreign
        got = "a link" if folder.is_symlink() else "something else"
        remedy = "move it elsewhere, or choose another --out: a run deletes its older checkpoints"
        raise InputError(str(subject), expected="nothing but checkpoints of a run", got=got, remedy=remedy)


@contextmanager
def explaining_full_disk(out: Path) -> Iterator[None]:
    """Turn the errors of a disk that is full or read-only into one that says what was kept.

    Raises:
        RunFolderError: naming the checkpoints that there are.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise RunFolderError(f"{out} cannot be written ({error.strerror}); {kept(out)}") from error


def kept(out: Path) -> str:
    """Return which checkpoints a run that failed has left, and how to go on."""
    names = ", ".join(path.name for path in list_checkpoints(out))
    if not names:
        weights = [f"{path.name}, weights alone" for path in list_best_weights(out)]
        return "; ".join(["kept: no checkpoint", *weights])
    return f"kept: {names}; free some space where that is the cause, and continue with --resume"


def save_step(folder: Path, step: int, batch: Batch, terms: Mapping[str, float]) -> Path:
    """Keep what a failed step was made of: its batch as ``.npz`` arrays, and its terms as JSON beside them.

    JSON has no NaN: numbers that are not finite are written as their names. Returns the batch's path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clean = {key: value if np.isfinite(value) else repr(float(value)) for key, value in terms.items()}
    write_json(folder / f"step-{step:06d}.json", {"step": step, **clean})
    path = folder / f"step-{step:06d}-batch.npz"
    np.savez_compressed(path, **batch.arrays())
    return path
