"""Contracts: YAML files whose claims are compiled into falsifiers.

``load_contract`` → ``parse_yaml`` (lines, bounds) → JSON Schema → rules the schema cannot say → frozen dataclasses.
"""

import hashlib
import importlib.resources
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from q4kd.harness.contract_entries import Entry, read_entries, text
from q4kd.harness.contract_rules import (
    KnownNames,
    Status,
    check_falsifier,
    near_misses,
    read_status,
    require_finite,
    validate,
)
from q4kd.harness.yaml_lines import MAX_BYTES, Document, Path_, parse_yaml, printable
from q4kd.trainer.errors import InputError
from q4kd.trainer.files import read_bounded

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
KNOWN_PROFILES = ("cpu", "h200", "gb10")


@dataclass(frozen=True, kw_only=True)
class CheckUse:
    """One check with the parameters it is used with."""

    check: str
    params: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Falsifier:
    """The executable form of a claim. All of ``checks`` must survive; ``sabotage`` must be caught."""

    check: str
    experiment: str
    params: Mapping[str, Any]
    also: tuple[CheckUse, ...] = ()
    profiles: Mapping[str, Mapping[str, Any]]
    needs: tuple[str, ...] = ()
    min_observations: int = 1
    timeout_s: float | None = None
    sabotage: tuple[str, ...] = ()

    @property
    def checks(self) -> tuple[CheckUse, ...]:
        """Return every check, the primary one first."""
        return (CheckUse(check=self.check, params=self.params), *self.also)

    def for_profile(self, name: str) -> "Falsifier":
        """Return the falsifier as it applies on profile ``name``: its overrides merged in, and none left to apply."""
        override = self.profiles.get(name, {})
        return replace(
            self,
            params=merge(self.params, override.get("params", {})),
            timeout_s=override.get("timeout_s", self.timeout_s),
            min_observations=override.get("min_observations", self.min_observations),
            profiles={},
        )


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One entry of ``falsification_tests``.

    ``falsifier`` is None for a prose claim; ``prose`` is the entry as read, a bare string under ``rule``. ``work`` is
    what ``falsifier.work`` says: it stands apart because it bounds what may be claimed, not what a run shows.
    """

    contract: str
    id: str
    rule: str
    prediction: str
    if_fails: str
    line: int
    falsifier: Falsifier | None
    prose: Mapping[str, Any]
    work: Mapping[str, Any] | None = None

    @property
    def key(self) -> str:
        """Return the claim's identity, ``contract::id``."""
        return f"{self.contract}::{self.id}"


@dataclass(frozen=True, kw_only=True)
class Contract:
    """One contract file. ``raw`` is the whole document; ``warnings`` are things that load but are probably mistakes."""

    name: str
    path: str
    status: Status
    superseded_by: str | None
    description: str
    claims: tuple[Claim, ...]
    raw: Mapping[str, Any]
    sha256: str
    warnings: tuple[str, ...] = ()


def merge(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """Merge mappings key by key (RFC 7386): mappings merge, null removes the key, anything else replaces it."""
    result = dict(base)
    for key, value in override.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, Mapping):
            below = result.get(key)
            result[key] = merge(below if isinstance(below, Mapping) else {}, value)
        else:
            result[key] = value
    return result


def default_contracts_folder() -> Path:
    """Return the folder of the contracts installed with the package."""
    return Path(str(importlib.resources.files("q4kd.contracts")))


def contract_files(folder: Path) -> list[Path]:
    """Return the contract files directly inside ``folder``, sorted by name.

    Raises:
        InputError: when it is not a folder or holds no contract: a set of nothing would pass everything.
    """
    if not folder.is_dir():
        raise InputError(
            str(folder), expected="a folder of contracts", got="no such folder", remedy="name one with --contracts"
        )
    found = sorted(
        path for path in folder.iterdir() if path.suffix in (".yaml", ".yml") and not path.name.startswith(".")
    )
    if not found:
        raise InputError(
            str(folder),
            expected="at least one *.yaml contract",
            got="none",
            remedy="name a folder that holds contracts",
        )
    return found


def load_contracts(folder: Path) -> list[Contract]:
    """Load every contract of a folder, sorted by name.

    Raises:
        InputError: when the folder is empty, a file does not load, or two claims share an identity.
    """
    profiles = known_profiles(folder)
    return check_identities([load_contract(path, profiles=profiles) for path in contract_files(folder)])


def check_identities(contracts: list[Contract]) -> list[Contract]:
    """Return ``contracts`` unchanged when no two share a name, and so no two claims an identity (InputError)."""
    seen: dict[str, str] = {}
    for contract in contracts:
        if contract.name in seen:
            raise InputError(
                contract.path,
                expected="each contract name once",
                got=f"{contract.name} again (first in {seen[contract.name]})",
                remedy="rename one of the two files",
            )
        seen[contract.name] = contract.path
    return contracts


def known_profiles(folder: Path) -> tuple[str, ...]:
    """Return the names of the installed profiles and of those that a contracts folder brings itself."""
    return KNOWN_PROFILES + tuple(file.stem for file in sorted((folder / "profiles").glob("*.yaml")))


def load_contract(path: Path, names: KnownNames | None = None, profiles: Sequence[str] | None = None) -> Contract:
    """Load one contract file (see ``parse_contract``). Profiles beside the file extend those that may be named."""
    known = known_profiles(path.parent) if profiles is None else profiles
    return parse_contract(path.stem, read_bounded(path, MAX_BYTES), str(path), profiles=known, names=names)


def parse_contract(
    name: str, data: bytes, origin: str, profiles: Sequence[str] | None = None, names: KnownNames | None = None
) -> Contract:
    """Parse a contract.

    Args:
        name: the file's stem, which is part of every claim's identity.
        data: the file's bytes.
        origin: how to name the file in errors.
        profiles: names that ``profiles:`` may use; None accepts any (a bundle made with someone else's profiles).
        names: experiments and faults that exist; None accepts any (a bundle of a project that is not installed here).

    Raises:
        InputError: quoting the file, the line and its text.
    """
    if not _NAME.fullmatch(name):
        raise InputError(
            printable(origin),
            expected="a file name of letters, digits, . _ -",
            got=repr(name),
            remedy="rename the file",
        )
    document = parse_yaml(data, origin)
    validate(document)
    raw: Mapping[str, Any] = document.value
    metadata = raw.get("metadata") or {}
    warnings: list[str] = []
    entries = read_entries(document, warnings)
    near_misses(document, raw, entries, warnings)
    status = read_status(document, metadata, any("falsifier" in entry.value for entry in entries), warnings)
    claims = tuple(_claim(document, name, entry, status, profiles, names) for entry in entries)
    if not claims:
        warnings.append("no claims: nothing in this file can be falsified")
    return Contract(
        name=name,
        path=origin,
        status=status,
        superseded_by=metadata.get("superseded_by"),
        description=text(metadata.get("description")),
        claims=claims,
        raw=raw,
        sha256=hashlib.sha256(data).hexdigest(),
        warnings=tuple(warnings),
    )


def _claim(
    document: Document,
    contract: str,
    entry: Entry,
    status: Status,
    profiles: Sequence[str] | None,
    names: KnownNames | None,
) -> Claim:
    falsifier = None
    if "falsifier" in entry.value:
        falsifier = _falsifier(document, (*entry.path, "falsifier"), entry.value["falsifier"], status, profiles, names)
    return Claim(
        contract=contract,
        id=entry.id,
        rule=entry.rule,
        prediction=entry.prediction,
        if_fails=entry.if_fails,
        line=document.line(entry.path),
        falsifier=falsifier,
        prose=entry.value,
        work=entry.value["falsifier"].get("work") if falsifier else None,
    )


def _falsifier(
    document: Document,
    path: Path_,
    entry: Mapping[str, Any],
    status: Status,
    profiles: Sequence[str] | None,
    names: KnownNames | None,
) -> Falsifier:
    require_finite(document, path, entry)
    falsifier = Falsifier(
        check=entry["check"],
        experiment=entry["experiment"],
        params=entry.get("params", {}),
        also=tuple(CheckUse(check=use["check"], params=use.get("params", {})) for use in entry.get("also", [])),
        profiles=entry.get("profiles", {}),
        needs=tuple(entry.get("needs", [])),
        min_observations=entry.get("min_observations", 1),
        timeout_s=None if entry.get("timeout_s") is None else float(entry["timeout_s"]),
        sabotage=tuple(entry.get("sabotage", [])),
    )
    check_falsifier(document, path, falsifier, status, profiles, "work" in entry, names)
    return falsifier
