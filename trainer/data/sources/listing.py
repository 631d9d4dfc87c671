"""Which files of a folder are data. What is left out is noted with its reason: hidden files, caches, links, cards."""

import fnmatch
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from q4kd.trainer.data.sources.account import QUIET, SourceAccount

_NOT_DATA = {"__pycache__": QUIET, "site-packages": "installed packages"}
RECORDS = (".jsonl", ".ndjson", ".jsonlines", ".parquet", ".npy", ".safetensors", ".arrow")
COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".lz4", ".br", ".zip", ".tar", ".7z", ".rar")
# What a data set says of itself, beside its records.
_CARDS = ("readme*", "license*", "licence*", "notice*", "citation*", "changelog*", "dataset_info*.json")


def list_data_files(
    folder: Path, pattern: str, is_records: Callable[[Path], bool], account: SourceAccount | None = None
) -> list[tuple[Path, str]]:
    """Return the files below a folder that a glob matches, and their names below it, sorted by them.

    Left out are: what is hidden, unless the pattern names a hidden part; caches and installed packages; links to
    folders, and links out of the folder but for those of a snapshot in a hub cache to its blobs; what is no regular
    file; compressed files; and, unless the pattern names them, the cards of a data set beside its records.

    Args:
        folder: the folder.
        pattern: glob of pathlib.
        is_records: whether a ``.json`` file holds records.
        account: is told what is left out.

    Raises:
        OSError: when a folder below cannot be read.
    """
    account = account or SourceAccount()
    root = folder.resolve()
    blobs = _blobs(root)
    shows_hidden = any(part.startswith(".") for part in Path(pattern).parts)
    found = []
    for file in _matching(root, pattern, shows_hidden, account):
        relative = file.relative_to(root)
        reason = _reason(file, relative, root, blobs, shows_hidden)
        if reason is None:
            found.append((file, relative))
        elif reason:
            account.leave_out(relative.as_posix(), reason)
    if pattern.rpartition("/")[2] in ("*", "**"):
        found = _without_cards(found, is_records, account)
    return [(file, relative.as_posix()) for file, relative in sorted(found)]


def _reason(file: Path, relative: Path, root: Path, blobs: Path | None, shows_hidden: bool) -> str | None:
    """Return why a file is left out, "" where nobody needs to know, or None where it is read."""
    if kinds := [_NOT_DATA[part] for part in relative.parts if part in _NOT_DATA]:
        return kinds[0]
    if not shows_hidden and any(part.startswith(".") for part in relative.parts):
        return "hidden"
    if file.is_symlink():
        target = file.resolve()
        if not target.exists():
            return "links to nothing"
        if target.is_dir():
            return "links to folders"
        if not target.is_relative_to(root) and (blobs is None or target.parent != blobs):
            return "links out of the folder (copy the files, or name the folder that holds them)"
    if file.is_dir():
        return ""
    if not file.is_file():
        return "no regular files"
    return "compressed (unpack them)" if file.suffix.lower() in COMPRESSED else None


def _blobs(root: Path) -> Path | None:
    """Return the folder of a hub cache that links of a snapshot may lead to: ``models--x/blobs``."""
    for folder in (root, *root.parents):
        if folder.parent.name == "snapshots":
            blobs = folder.parent.parent / "blobs"
            return blobs if blobs.is_dir() else None
    return None


def _matching(root: Path, pattern: str, shows_hidden: bool, account: SourceAccount) -> Iterator[Path]:
    """Yield what a glob matches below a resolved folder.

    A name at any depth (``**/NAME``) is looked for here: pathlib would walk through every installed package too.
    """
    at_any_depth, _, name = pattern.rpartition("/")
    if at_any_depth != "**" or name == "**":
        yield from root.glob(pattern)
        return
    for folder, folders, files in os.walk(root, onerror=_raise):  # which follows no link to a folder, as ** does not
        kept = []
        for below in sorted(folders):
            path = Path(folder, below)
            if below in _NOT_DATA or (below.startswith(".") and not shows_hidden):
                account.leave_out(f"{path.relative_to(root).as_posix()}/", _NOT_DATA.get(below, "hidden"))
            elif path.is_symlink():
                account.leave_out(f"{path.relative_to(root).as_posix()}/", "links to folders")
            else:
                kept.append(below)
        folders[:] = kept
        yield from (Path(folder, file) for file in fnmatch.filter(files, name))


def _raise(error: OSError) -> None:
    raise error


def _without_cards(
    found: list[tuple[Path, Path]], is_records: Callable[[Path], bool], account: SourceAccount
) -> list[tuple[Path, Path]]:
    def is_card(file: Path) -> bool:
        return any(fnmatch.fnmatch(file.name.lower(), card) for card in _CARDS)

    cards = [file for file, _ in found if is_card(file) and file.suffix.lower() not in RECORDS]
    if not cards:
        return found
    others = [file for file, _ in found if file not in cards]
    if not any(file.suffix.lower() in RECORDS for file in others) and not any(
        file.suffix.lower() == ".json" and is_records(file) for file in others
    ):
        return found
    for file, relative in found:
        if file in cards:
            account.leave_out(relative.as_posix(), "a data set's description beside its records")
    return [(file, relative) for file, relative in found if file not in cards]
