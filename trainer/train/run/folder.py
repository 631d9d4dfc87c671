"""The folder of a run: one run holds it at a time, no run overwrites another, and a failed step is kept in it."""

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from q4kd.trainer.data.batch import Batch
from q4kd.trainer.errors import InputError, RunFolderError, unwritable
from q4kd.trainer.files import write_json
from q4kd.trainer.train.checkpoint import list_best_weights, list_checkpoints

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
