"""Where contracts and profiles lie: the installed folder, the files of a folder, and the profiles it may name."""

import importlib.resources
import os
from dataclasses import dataclass
from pathlib import Path

from q4kd.trainer.errors import InputError, unreadable
from q4kd.trainer.yaml_lines import printable

KNOWN_PROFILES = ("cpu", "h200", "gb10")
PROFILES = "profiles"
MAX_DEPTH, MAX_ENTRIES = 16, 20_000
_SUFFIXES = (".yaml", ".yml")
# A bundle keeps the contracts that it was made with, and may lie among those it will be made with next.
_OF_A_BUNDLE = ("plan.json", "environment.json")
_NAME_ROOT = "name the folder of the contracts alone with --contracts"


@dataclass(frozen=True)
class Found:
    """The contract files of a folder, sorted by path, and what looks like one and is not loaded, with the reason."""

    files: tuple[Path, ...]
    skipped: tuple[str, ...]


def default_contracts_folder() -> Path:
    """Return the folder of the contracts installed with the package."""
    return Path(str(importlib.resources.files("q4kd.contracts")))


def contract_files(folder: Path) -> list[Path]:
    """Return the contract files of ``folder`` and of all folders in it (see ``find_contracts``)."""
    return list(find_contracts(folder).files)


def find_contracts(folder: Path) -> Found:
    """Look for ``*.yaml`` and ``*.yml`` in a folder and in those below it.

    Hidden names, bundles, and ``profiles/`` of the folder itself hold no contracts; what lies there with a contract's
    suffix is named in ``skipped``, as is a suffix in capitals. A link to a file is followed while it stays in the
    folder.

    Raises:
        InputError: when it is not a folder or holds no contract, since a set of nothing would pass everything; when two
            files have one name, which would be one contract's; for a link that leaves the folder, a link to a folder,
            profiles below another folder, and what cannot be read; for more than ``MAX_DEPTH`` folders in each other,
            or ``MAX_ENTRIES`` names in all.
    """
    if not folder.is_dir():
        remedy = "name one with --contracts"
        raise InputError(str(folder), expected="a folder of contracts", got="no such folder", remedy=remedy)
    walk = _Walk(folder)
    walk.look_into(folder, depth=0)
    if not walk.files:
        got = f"none (skipped: {', '.join(walk.skipped[:3])})" if walk.skipped else "none"
        remedy = "name a folder with contracts"
        raise InputError(str(folder), expected="at least one *.yaml contract", got=got, remedy=remedy)
    return Found(tuple(sorted(walk.files.values())), tuple(sorted(walk.skipped)))


def skipped_lines(folder: Path) -> list[str]:
    """Return, one printable line each, what looks like a contract of ``folder`` and is not loaded (InputError)."""
    return [printable(f"contracts skipped: {line}", 300) for line in find_contracts(folder).skipped]


class _Walk:
    """One walk through a folder of contracts, with what it found."""

    def __init__(self, root: Path) -> None:
        self.root, self.seen = root, 0
        self.files: dict[str, Path] = {}  # by the contract's name
        self.skipped: list[str] = []

    def look_into(self, folder: Path, depth: int) -> None:
        if depth > MAX_DEPTH:
            expected = f"at most {MAX_DEPTH} folders in each other"
            raise InputError(str(folder), expected=expected, got="a deeper one", remedy=_NAME_ROOT)
        for path in self._entries(folder):
            is_folder = path.is_dir()
            if path.name.startswith("."):
                self._skip(path, is_folder, "hidden")
            elif is_folder and folder == self.root and path.name == PROFILES:
                self._check_profiles(path)
            elif is_folder and all((path / name).is_file() for name in _OF_A_BUNDLE):
                self._skip(path, is_folder, "in a bundle")
            elif is_folder:
                self._refuse_folder(path)
                self.look_into(path, depth + 1)
            elif path.suffix in _SUFFIXES:
                self._add(path)
            elif path.suffix.lower() in _SUFFIXES:
                self.skipped.append(f"{self._shown(path)} (a contract's suffix is .yaml or .yml)")

    def _entries(self, folder: Path) -> list[Path]:
        try:
            with os.scandir(folder) as entries:
                names = [entry.name for _, entry in zip(range(MAX_ENTRIES + 1), entries, strict=False)]
        except OSError as error:
            raise unreadable(folder, error, "a folder that can be listed") from error
        self.seen += len(names)
        if self.seen > MAX_ENTRIES:
            expected, got = f"at most {MAX_ENTRIES} files and folders", "more"
            raise InputError(str(self.root), expected=expected, got=got, remedy=_NAME_ROOT)
        return [folder / name for name in sorted(names)]

    def _add(self, path: Path) -> None:
        if path.is_symlink() and not self._is_inside(path):
            got, remedy = f"a link that leaves {self.root}", "put the file itself there"
            raise InputError(str(path), expected="a file of the folder", got=got, remedy=remedy)
        if not path.is_file():
            got, remedy = "something else, or a broken link", "remove it, or give it another suffix"
            raise InputError(str(path), expected="a file", got=got, remedy=remedy)
        first = self.files.setdefault(path.stem, path)
        if first != path:
            expected = "each contract name once, since it begins the identity of its claims"
            got, remedy = f"{path.stem} again (first in {first})", "rename one of the two files"
            raise InputError(str(path), expected=expected, got=got, remedy=remedy)

    def _is_inside(self, path: Path) -> bool:
        try:
            return path.resolve(strict=True).is_relative_to(self.root.resolve())
        except (OSError, RuntimeError):  # a broken link, or one to itself
            return False

    def _refuse_folder(self, path: Path) -> None:
        if path.is_symlink():
            expected, remedy = "a folder, or a link to a file", "put the folder itself there"
            raise InputError(str(path), expected=expected, got="a link to a folder", remedy=remedy)
        if path.name == PROFILES:
            expected = f"{PROFILES}/ in {self.root} alone, since its profiles hold for every contract"
            remedy = f"move it there, or name {path.parent} by itself"
            raise InputError(str(path), expected=expected, got="another one", remedy=remedy)

    def _check_profiles(self, folder: Path) -> None:
        for path in self._entries(folder):
            if path.is_dir() or (path.suffix.lower() in _SUFFIXES and path.suffix != ".yaml"):
                self._skip(path, path.is_dir(), "a profile is a *.yaml directly in profiles/")

    def _skip(self, path: Path, is_folder: bool, reason: str) -> None:
        """Name what is not looked into, where it has a contract's suffix or is a folder that may hold some."""
        if is_folder or path.suffix.lower() in _SUFFIXES:
            self.skipped.append(f"{self._shown(path)}{'/' * is_folder} ({reason})")

    def _shown(self, path: Path) -> str:
        return str(path.relative_to(self.root))


def known_profiles(folder: Path) -> tuple[str, ...]:
    """Return the names of the installed profiles and of those that a contracts folder brings itself."""
    return KNOWN_PROFILES + tuple(file.stem for file in sorted((folder / PROFILES).glob("*.yaml")))
