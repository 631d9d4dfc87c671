"""The evidence bundle: its layout, its seal and its archive. ``verify.py`` reads what is written here."""

import gzip
import hashlib
import io
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from q4kd.harness.contract import contract_files
from q4kd.harness.environment import environment
from q4kd.harness.interchange import write_interchange
from q4kd.harness.plan import Plan
from q4kd.harness.profile import profile_bytes
from q4kd.harness.redact import redact
from q4kd.harness.store import MAX_FILE, REMEDY, DirectoryStore, Store, safe_name
from q4kd.harness.yaml_lines import MAX_BYTES
from q4kd.trainer.errors import InputError
from q4kd.trainer.files import read_bounded, sha256_file, write_atomic, write_json

__all__ = [
    "close",
    "environment",
    "manifest_of",
    "open_bundle",
    "pack",
    "pack_bytes",
    "redact",
    "seal",
    "write_findings",
]

MANIFEST = "MANIFEST.sha256"
FOLDERS = ("contracts/profiles", "runs", "sabotage")
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def open_bundle(folder: Path, contracts: Path, profile: str, plan: Plan, inputs: Mapping[str, Any]) -> None:
    """Start a bundle: its folders, the contracts and profile as run, the plan, the machine and the inputs' digests.

    Args:
        folder: where to write; created, and refused when it already holds a bundle's findings.
        contracts: folder of the contracts in force.
        profile: name of the profile in force.
        plan: the plan made from both.
        inputs: name → ``{"sha256": …, "bytes": …}`` of weights and data; names, never paths outside the run.

    Raises:
        InputError: when the folder holds another bundle.
    """
    for name in ("findings.json", MANIFEST):
        if (folder / name).exists():
            raise InputError(
                str(folder), expected="a new folder", got="a finished bundle", remedy="choose another --out folder"
            )
    for name in FOLDERS:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for path in contract_files(contracts):
        write_atomic(folder / "contracts" / path.name, read_bounded(path, MAX_BYTES))
    write_atomic(folder / "contracts" / "profiles" / f"{profile}.yaml", profile_bytes(profile, contracts))
    write_json(folder / "plan.json", plan.to_json())
    write_json(folder / "environment.json", environment(profile))
    write_json(folder / "inputs.json", dict(inputs))


def write_findings(folder: Path, findings: Mapping[str, Any]) -> None:
    """Write ``findings.json`` atomically."""
    write_json(folder / "findings.json", dict(findings))


def close(folder: Path) -> None:
    """Finish a bundle whose findings are written: interchange formats, the report, then the seal over everything."""
    from q4kd.harness.report import render  # matplotlib and jinja2 are only needed here

    store = DirectoryStore(folder)
    write_interchange(folder, store)
    write_atomic(folder / "report.html", render(store).encode())
    seal(folder)


def manifest_of(store: Store) -> dict[str, str]:
    """Return name → SHA-256 of every file of a store but the manifest itself."""
    return {name: hashlib.sha256(store.read(name, MAX_FILE)).hexdigest() for name in store.names() if name != MANIFEST}


def seal(folder: Path) -> str:
    """Write ``MANIFEST.sha256`` (the format of ``sha256sum``) over all other files and return its own SHA-256.

    Raises:
        InputError: when the folder holds a link or anything else that a bundle may not.
    """
    names = [name for name in DirectoryStore(folder).names() if name != MANIFEST]
    lines = [f"{sha256_file(folder / name)}  {name}\n" for name in names]
    data = "".join(lines).encode()
    write_atomic(folder / MANIFEST, data)
    return hashlib.sha256(data).hexdigest()


def parse_manifest(data: bytes, origin: str) -> dict[str, str]:
    """Return name → SHA-256 from a manifest's bytes (InputError when it is malformed or names a file twice)."""
    result: dict[str, str] = {}
    for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), 1):
        match = _LINE.fullmatch(line)
        if match is None or match.group(2) in result:
            raise InputError(
                f"{origin}:{number}", expected="`<sha256>  <name>`, each name once", got=repr(line[:80]), remedy=REMEDY
            )
        result[safe_name(match.group(2), origin)] = match.group(1)
    return result


def pack_bytes(folder: Path) -> bytes:
    """Return the files below ``folder`` as a ``.tar.gz`` that depends on their names and contents only."""
    store = DirectoryStore(folder)
    buffer = io.BytesIO()
    with (
        gzip.GzipFile(filename="", fileobj=buffer, mode="wb", compresslevel=6, mtime=0) as stream,
        tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for name in store.names():
            data = store.read(name)
            member = tarfile.TarInfo(name)
            member.size, member.mode, member.mtime = len(data), 0o644, 0
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def pack(folder: Path, out: Path | None = None) -> Path:
    """Write ``<folder>.tar.gz`` (or ``out``) and return its path. The same folder always gives the same bytes."""
    target = out or folder.with_name(folder.name + ".tar.gz")
    write_atomic(target, pack_bytes(folder))
    return target
