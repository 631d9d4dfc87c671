"""The folder of a run: held by one run at a time, never overwritten by accident."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from q4kd.trainer.checkpoint import list_checkpoints
from q4kd.trainer.errors import InputError


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
        raise InputError(
            f"--out {out}",
            expected="a folder no other run is using",
            got="a locked one",
            remedy="choose another folder",
        ) from error
    except OSError as error:
        raise InputError(
            f"--out {out}", expected="a writable folder", got=str(error.strerror), remedy="choose another folder"
        ) from error
    try:
        yield
    finally:
        lock.release()


def check_run_folder(out: Path, resume: bool) -> None:
    """Refuse to start over an earlier run, or to resume where there is none.

    Raises:
        InputError: saying which of the two.
    """
    present = list_checkpoints(out)
    if present and not resume:
        raise InputError(
            f"--out {out}",
            expected="a folder without checkpoints",
            got=f"{len(present)} checkpoint(s)",
            remedy="pass --resume to continue that run, or choose another folder",
        )
    if resume and not present:
        raise InputError(
            f"--resume in {out}", expected="a checkpoint", got="none", remedy="start the run without --resume"
        )
