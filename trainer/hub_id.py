"""Names of the Hugging Face hub where a path is meant: nothing is fetched, so the remedy says how to."""

import re
from pathlib import Path

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def remedy_for(path: Path, otherwise: str, *, pattern: str = "", repository: str = "model") -> str:
    """Return what to do about a path that is not there.

    Args:
        path: as given.
        otherwise: the remedy when it cannot be a hub id (``org/name``).
        pattern: which files of the repository are needed; all where empty.
        repository: its kind: ``model`` or ``dataset``.
    """
    name = str(path)
    if not _HUB_ID.fullmatch(name) or path.exists():
        return otherwise
    chosen = f" --include '{pattern}'" if pattern else ""
    kind = "" if repository == "model" else f" --repo-type {repository}"
    return (
        f"nothing is fetched here: for a hub id, hf download {name}{kind}{chosen} --local-dir DIR, then give the path"
    )
