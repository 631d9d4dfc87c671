"""Where contracts and profiles lie: the installed folder, the files of a folder, and the profiles it may name."""

import importlib.resources
from pathlib import Path

from q4kd.trainer.errors import InputError

KNOWN_PROFILES = ("cpu", "h200", "gb10")


def default_contracts_folder() -> Path:
    """Return the folder of the contracts installed with the package."""
    return Path(str(importlib.resources.files("q4kd.contracts")))


def contract_files(folder: Path) -> list[Path]:
    """Return the contract files directly inside ``folder``, sorted by name.

    Raises:
        InputError: when it is not a folder or holds no contract: a set of nothing would pass everything.
    """
    if not folder.is_dir():
        remedy = "name one with --contracts"
        raise InputError(str(folder), expected="a folder of contracts", got="no such folder", remedy=remedy)
    found = [path for path in folder.iterdir() if path.suffix in (".yaml", ".yml") and not path.name.startswith(".")]
    if not found:
        remedy = "name a folder with contracts"
        raise InputError(str(folder), expected="at least one *.yaml contract", got="none", remedy=remedy)
    return sorted(found)


def known_profiles(folder: Path) -> tuple[str, ...]:
    """Return the names of the installed profiles and of those that a contracts folder brings itself."""
    return KNOWN_PROFILES + tuple(file.stem for file in sorted((folder / "profiles").glob("*.yaml")))
