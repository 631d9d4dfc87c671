"""The evidence bundle: its layout, its seal and its archive. ``verify.py`` reads what is written here."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from q4kd.harness.bundle.dsse import ENVELOPE
from q4kd.harness.bundle.environment import environment
from q4kd.harness.claims.folder import contract_files
from q4kd.harness.claims.plan import Plan
from q4kd.harness.claims.profile import profile_bytes
from q4kd.harness.judging.results import Findings
from q4kd.harness.records.json_types import JsonObject
from q4kd.harness.records.packing import gzip_bytes, packed_as, stem_of, tar_bytes
from q4kd.harness.records.store import MAX_FILE, DirectoryStore, Store, open_store
from q4kd.harness.records.tar_archive import REMEDY, safe_name
from q4kd.trainer.errors import InputError
from q4kd.trainer.files import read_bounded, sha256_file, write_atomic, write_json
from q4kd.trainer.yaml_lines import MAX_BYTES

MANIFEST = "MANIFEST.sha256"
FOLDERS = ("contracts/profiles", "runs", "sabotage")
_MAX_MANIFEST = 16 << 20  # 20,000 files with the longest names take 10 MB
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def open_bundle(folder: Path, contracts: Path, profile: str, plan: Plan, inputs: JsonObject) -> None:
    """Start a bundle: its folders, the contracts and profile as run, the plan, the machine and the inputs' digests.

    ``inputs`` maps names of weights and data, never paths outside the run, to ``{"sha256": …, "bytes": …}``.

    Raises:
        InputError: when the folder holds a finished bundle.
    """
    for name in ("findings.json", MANIFEST):
        if (folder / name).exists():
            remedy = "choose another --out folder"
            raise InputError(str(folder), expected="a new folder", got="a finished bundle", remedy=remedy)
    # The bundle may lie among the contracts: they are read before there is something of it to be found.
    kept = {path.name: read_bounded(path, MAX_BYTES) for path in contract_files(contracts)}
    kept[f"profiles/{profile}.yaml"] = profile_bytes(profile, contracts)
    for name in FOLDERS:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name, data in kept.items():
        write_atomic(folder / "contracts" / name, data)
    write_json(folder / "plan.json", plan.to_json())
    write_json(folder / "environment.json", environment(profile))
    write_json(folder / "inputs.json", dict(inputs))


def write_findings(folder: Path, findings: Findings) -> None:
    """Write ``findings.json`` atomically."""
    write_json(folder / "findings.json", findings.to_json())


def manifest_of(store: Store) -> dict[str, str]:
    """Return name → SHA-256 of every file of a store but the manifest itself and the signature over it."""
    return {name: hashlib.sha256(store.read(name, MAX_FILE)).hexdigest() for name in _sealed(store)}


def manifest_text(digests: Mapping[str, str]) -> bytes:
    """Return a manifest in its one form, that of ``sha256sum``, sorted by name."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items())).encode()


def _sealed(store: Store) -> list[str]:
    return [name for name in store.names() if name not in (MANIFEST, ENVELOPE)]


def seal(folder: Path) -> str:
    """Write ``MANIFEST.sha256`` over all other files and return its own SHA-256. An older signature no longer fits.

    Raises:
        InputError: when the folder holds a link or anything else that a bundle may not.
    """
    data = manifest_text({name: sha256_file(folder / name) for name in _sealed(DirectoryStore(folder))})
    write_atomic(folder / MANIFEST, data)
    return hashlib.sha256(data).hexdigest()


def parse_manifest(data: bytes, origin: str) -> dict[str, str]:
    """Return name → SHA-256 from a manifest's bytes (InputError when it is malformed or names a file twice)."""
    result: dict[str, str] = {}
    for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), 1):
        match = _LINE.fullmatch(line)
        if match is None or match.group(2) in result:
            expected = "`<sha256>  <name>`, each name once"
            raise InputError(f"{origin}:{number}", expected=expected, got=repr(line[:80]), remedy=REMEDY)
        result[safe_name(match.group(2), origin)] = match.group(1)
    return result


def seal_problems(store: Store) -> list[str]:
    """Return, one line each, where the files of a bundle are not those its manifest lists.

    Raises:
        InputError: there is neither a manifest nor anything else of a bundle.
    """
    names = store.names()
    if MANIFEST not in names and {"findings.json", "plan.json"} & set(names):
        return [f"missing file: {MANIFEST}"]
    data = store.read(MANIFEST, _MAX_MANIFEST)
    try:
        recorded = parse_manifest(data, MANIFEST)
    except InputError as error:
        return [f"changed file: {error}"]
    actual = manifest_of(store)
    lines = [f"missing file: {name}" for name in recorded if name not in actual]
    lines += [f"added file: {name}" for name in actual if name not in recorded]
    lines += [f"changed file: {name}" for name in recorded if name in actual and actual[name] != recorded[name]]
    # Bytes that change no line, such as a lost line end, count as well.
    return lines if data == manifest_text(recorded) else [*lines, f"changed file: {MANIFEST}"]


def pack_bytes(folder: Path) -> bytes:
    """Return the files below ``folder`` as a ``.tar.gz`` that depends on their names and contents only."""
    return gzip_bytes(tar_bytes(DirectoryStore(folder)))


def pack(bundle: Path, out: Path | None = None) -> Path:
    """Write a bundle, a folder or an archive, as one archive and return its path: ``out``, or ``<bundle>.tar.xz``.

    The same files always give the same bytes.

    Raises:
        InputError: there is no bundle, or ``out`` has a suffix that no archive has.
    """
    target = out or bundle.with_name(f"{stem_of(bundle)}.tar.xz")
    write_atomic(target, packed_as(target.name, open_store(bundle)))
    return target
