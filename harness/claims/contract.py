"""Contracts: YAML files whose claims are compiled into falsifiers.

``load_contract`` → ``parse_yaml`` (lines, bounds) → JSON Schema → rules the schema cannot say → frozen dataclasses.
"""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from q4kd.harness.claims.entries import Entry, read_entries, text
from q4kd.harness.claims.folder import contract_files, known_profiles
from q4kd.harness.claims.model import CheckUse, Claim, Contract, Falsifier, Status
from q4kd.harness.claims.rules import KnownNames, check_falsifier, near_misses, read_status, require_finite, validate
from q4kd.harness.records.json_types import JsonObject, JsonRecord
from q4kd.trainer.errors import InputError
from q4kd.trainer.files import read_bounded
from q4kd.trainer.yaml_lines import MAX_BYTES, Document, parse_yaml, printable

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


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
            expected, got = "each contract name once", f"{contract.name} again (first in {seen[contract.name]})"
            raise InputError(contract.path, expected=expected, got=got, remedy="rename one of the two files")
        seen[contract.name] = contract.path
    return contracts


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
        expected = "a file name of letters, digits, . _ -"
        raise InputError(printable(origin), expected=expected, got=repr(name), remedy="rename the file")
    document = parse_yaml(data, origin)
    raw = validate(document)
    metadata = cast("JsonObject", raw.get("metadata") or {})
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
        superseded_by=cast("str | None", metadata.get("superseded_by")),
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
    stated = cast("JsonRecord | None", entry.value.get("falsifier"))
    falsifier = None
    if stated is not None:
        path = (*entry.path, "falsifier")
        require_finite(document, path, stated)
        falsifier = _falsifier(stated)
        check_falsifier(document, path, falsifier, status, profiles, "work" in stated, names)
    return Claim(
        contract=contract,
        id=entry.id,
        rule=entry.rule,
        prediction=entry.prediction,
        if_fails=entry.if_fails,
        line=document.line(entry.path),
        falsifier=falsifier,
        prose=entry.value,
        work=stated.get("work") if stated is not None else None,
    )


def _falsifier(entry: JsonRecord) -> Falsifier:
    timeout = entry.get("timeout_s")
    return Falsifier(
        check=entry["check"],
        experiment=entry["experiment"],
        params=entry.get("params", {}),
        also=tuple(CheckUse(check=use["check"], params=use.get("params", {})) for use in entry.get("also", [])),
        profiles=entry.get("profiles", {}),
        needs=tuple(entry.get("needs", [])),
        min_observations=entry.get("min_observations", 1),
        timeout_s=None if timeout is None else float(timeout),
        sabotage=tuple(entry.get("sabotage", [])),
    )
