"""Signing a bundle: its in-toto statement, with the manifest as first subject, in a DSSE envelope beside the manifest.

The manifest holds the digest of every other file, so one signature covers them all. The private key is read, used and
never written anywhere.
"""

from collections.abc import Mapping
from pathlib import Path

from q4kd.harness.bundle.dsse import ENVELOPE, encode_payload, fingerprint, load_private_key, read_envelope, sign
from q4kd.harness.bundle.exporters import signed_statement, statement_of
from q4kd.harness.bundle.findings import read_findings
from q4kd.harness.bundle.verify import verify_store
from q4kd.harness.bundle.writer import MANIFEST
from q4kd.harness.records.packing import packed_as
from q4kd.harness.records.store import MemoryStore, Store, open_store, snapshot
from q4kd.trainer.errors import InputError
from q4kd.trainer.files import write_atomic


def sign_bundle(path: Path, key: Path) -> str:
    """Sign a sealed bundle in place, folder, ``.tar.xz`` or ``.tar.gz``, and return the fingerprint of the key.

    Signatures by other keys are kept.

    Raises:
        InputError: a key that cannot be used or lies in the bundle; a bundle that does not verify, or that was changed
            after somebody else signed it.
    """
    private = load_private_key(key)
    if path.is_dir() and key.resolve().is_relative_to(path.resolve()):
        remedy = "move it out; use another key"
        raise InputError(str(key), expected="a key outside the bundle", got="one in it", remedy=remedy)
    store = snapshot(open_store(path), str(path))
    result = verify_store(store)
    if result.status != "consistent":
        got, remedy = f"{result.status}: {result.problems[0]}", "see `q4kd evidence verify`; sign what it accepts"
        raise InputError(str(path), expected="a bundle that verifies", got=got, remedy=remedy)
    payload = encode_payload(signed_statement(statement_of(store, read_findings(store)), store.read(MANIFEST)))
    envelope = sign(payload, private, _others(store))
    if path.is_dir():
        write_atomic(path / ENVELOPE, envelope)
    else:
        write_atomic(path, packed_as(path.name, MemoryStore({**store.files, ENVELOPE: envelope}, str(path))))
    return fingerprint(private.public_key())


def _others(store: Store) -> Mapping[str, bytes]:
    """Return the signatures already there; ``verify_store`` has seen that they are about this very bundle."""
    return read_envelope(store.read(ENVELOPE)).signatures if ENVELOPE in store.names() else {}
