"""The folder of locks of one user on one machine, which nobody else can write to or prepare."""

import contextlib
import os
import stat
import tempfile
from pathlib import Path

from q4kd.trainer.errors import InputError


def lock_folder() -> Path:
    """Return the user's runtime folder, or one of the user's own in the folder for temporary files; it exists.

    A lock under a name that others know, in a folder that they may write to, could be theirs, or a link to any file.

    Raises:
        InputError: when the folder is there and is not the user's alone.
    """
    user = os.getuid()
    for given in (os.environ.get("XDG_RUNTIME_DIR"), f"/run/user/{user}"):
        if given and Path(given).is_absolute() and _is_private(Path(given)):
            return Path(given)
    folder = Path(tempfile.gettempdir()) / f"q4kd-{user}"
    with contextlib.suppress(FileExistsError):  # It is no folder then, as the next line finds too.
        folder.mkdir(mode=0o700, exist_ok=True)
    if not _is_private(folder):
        expected, got = "a folder of your own that nobody else may write to", "another's, a link or an open one"
        remedy = "remove it, or set XDG_RUNTIME_DIR or TMPDIR to a folder of your own"
        raise InputError(str(folder), expected=expected, got=got, remedy=remedy)
    return folder


def _is_private(folder: Path) -> bool:
    try:
        status = folder.lstat()
    except OSError:
        return False
    is_mine = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
    return is_mine and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
