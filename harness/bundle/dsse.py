"""Signed statements: Ed25519 keys and DSSE envelopes (github.com/secure-systems-lab/dsse, protocol 1.0.2).

An envelope here has one written form, byte for byte, so that a change to any byte of it is a change of the signature.
"""

import base64
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from q4kd.harness.records.store import parse_shallow
from q4kd.trainer.errors import InputError
from q4kd.trainer.files import read_bounded

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

ENVELOPE = "statement.dsse.json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
MAX_SIGNATURES = 32
_MAX_KEY = 64 << 10
_MAX_ENVELOPE = 16 << 20
_MAKE_KEY = "make one with `openssl genpkey -algorithm ed25519 -out key.pem`"
_MAKE_PUBLIC = "make it with `openssl pkey -in key.pem -pubout`, or name the .pub of `ssh-keygen -t ed25519`"


@dataclass(frozen=True)
class Envelope:
    """A DSSE envelope: its payload and, for each key id in order, one 64-byte Ed25519 signature."""

    payload: bytes
    signatures: Mapping[str, bytes]


def pae(payload_type: str, payload: bytes) -> bytes:
    """Return the bytes that a DSSE signature covers: ``DSSEv1 LEN(type) type LEN(payload) payload``."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def load_private_key(path: Path) -> "Ed25519PrivateKey":
    """Read an Ed25519 private key, PEM (PKCS #8) or OpenSSH, and warn on stderr when others can read its file.

    Raises:
        InputError: unreadable, not a private key, of another algorithm, or protected by a passphrase.
    """
    data = _key_bytes(path)
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key

    def refuse(got: str, remedy: str = _MAKE_KEY) -> InputError:
        return InputError(str(path), expected="an Ed25519 private key, PEM or OpenSSH", got=got, remedy=remedy)

    locked = refuse(
        "one protected by a passphrase",
        "write a copy without one: `openssl pkey -in key.pem -out copy.pem`, or `ssh-keygen -p` on a copy",
    )
    openssh = b"BEGIN OPENSSH PRIVATE KEY" in data
    if not openssh and b"ENCRYPTED" in data:
        raise locked
    try:
        key = load_ssh_private_key(data, None) if openssh else load_pem_private_key(data, None)
    except TypeError as error:  # the library's word for "a password is needed"
        raise locked from error
    except (ValueError, UnsupportedAlgorithm) as error:
        if b"BEGIN PUBLIC KEY" in data or data.startswith(b"ssh-"):
            raise refuse("a public key", "name the private one") from error
        raise refuse("something else") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise refuse(f"a key of another kind ({type(key).__name__.lstrip('_')})")
    if path.stat().st_mode & 0o077:
        print(f"q4kd: warning: {path} can be read by others; chmod 600 it", file=sys.stderr)
    return key


def load_public_key(path: Path) -> "Ed25519PublicKey":
    """Read an Ed25519 public key, PEM (SubjectPublicKeyInfo) or one OpenSSH line.

    Raises:
        InputError: unreadable, not a public key, or of another algorithm.
    """
    data = _key_bytes(path)
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key, load_ssh_public_key

    def refuse(got: str) -> InputError:
        return InputError(str(path), expected="an Ed25519 public key, PEM or OpenSSH", got=got, remedy=_MAKE_PUBLIC)

    if b"PRIVATE KEY" in data:
        raise refuse("a private key, which should stay with its owner")
    try:
        # The library reads the first line of an OpenSSH file only; a second key would be ignored without a word.
        lines = [line for line in data.splitlines() if line.strip() and not line.startswith(b"#")]
        openssh = bool(lines) and not lines[0].startswith(b"-----")
        if openssh and len(lines) > 1:
            raise refuse(f"{len(lines)} keys in one file")
        key = load_ssh_public_key(lines[0]) if openssh else load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise refuse("something else") from error
    if not isinstance(key, Ed25519PublicKey):
        raise refuse(f"a key of another kind ({type(key).__name__.lstrip('_')})")
    return key


def _key_bytes(path: Path) -> bytes:
    try:
        import cryptography  # noqa: F401 - everything but signatures works without it
    except ImportError as error:
        expected, remedy = "the package cryptography", "pip install cryptography"
        raise InputError(str(path), expected=expected, got="it is not installed", remedy=remedy) from error
    return read_bounded(path, _MAX_KEY)


def fingerprint(key: "Ed25519PublicKey") -> str:
    """Return ``SHA256:…`` of a public key, as ``ssh-keygen -l`` prints it. It is also the key id in an envelope."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    line = key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    digest = hashlib.sha256(base64.b64decode(line.split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def encode_payload(statement: Mapping[str, Any]) -> bytes:
    """Return the bytes of a statement that are signed: compact JSON with sorted keys."""
    return json.dumps(statement, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def sign(payload: bytes, key: "Ed25519PrivateKey", others: Mapping[str, bytes] | None = None) -> bytes:
    """Return the envelope of ``payload`` signed by ``key``, beside the signatures of ``others`` over the same payload.

    Raises:
        InputError: more than ``MAX_SIGNATURES`` signatures.
    """
    signatures = {**(others or {}), fingerprint(key.public_key()): key.sign(pae(PAYLOAD_TYPE, payload))}
    if len(signatures) > MAX_SIGNATURES:
        expected = f"at most {MAX_SIGNATURES} signatures"
        raise InputError(ENVELOPE, expected=expected, got="more", remedy="remove the file, sign again")
    return _write(Envelope(payload, signatures))


def _write(envelope: Envelope) -> bytes:
    document = {
        "payload": base64.b64encode(envelope.payload).decode(),
        "payloadType": PAYLOAD_TYPE,
        "signatures": [
            {"keyid": keyid, "sig": base64.b64encode(signature).decode()}
            for keyid, signature in sorted(envelope.signatures.items())
        ],
    }
    return (json.dumps(document, indent=1) + "\n").encode()


def read_envelope(data: bytes) -> Envelope:
    """Read an envelope as ``sign`` writes it.

    Raises:
        InputError: any other form, payload type, or set of keys.
    """
    try:
        document = parse_shallow(data, ENVELOPE, _MAX_ENVELOPE)
        signatures = {
            str(entry["keyid"]): base64.b64decode(entry["sig"], validate=True) for entry in document["signatures"]
        }
        envelope = Envelope(base64.b64decode(document["payload"], validate=True), signatures)
        if not 0 < len(signatures) <= MAX_SIGNATURES or _write(envelope) != data:
            raise ValueError("another form than is written here")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        expected = f"a DSSE envelope of {PAYLOAD_TYPE} as `q4kd evidence sign` writes it"
        got, remedy = f"{type(error).__name__}: {error}"[:200], "ask its author to sign the bundle again"
        raise InputError(ENVELOPE, expected=expected, got=got, remedy=remedy) from error
    return envelope


def unsigned_by(envelope: Envelope, keys: Sequence["Ed25519PublicKey"]) -> list[str]:
    """Return a line for each key without a valid signature over the envelope's payload."""
    if not keys:
        return []
    from cryptography.exceptions import InvalidSignature

    covered = pae(PAYLOAD_TYPE, envelope.payload)
    lines: list[str] = []
    for key in keys:
        name = fingerprint(key)
        signature = envelope.signatures.get(name)
        if signature is None:
            lines.append(f"not signed by {name}, but by {', '.join(envelope.signatures)}")
            continue
        try:
            key.verify(signature, covered)
        except InvalidSignature:
            lines.append(f"the signature by {name} does not fit: the statement or the signature was altered")
    return lines
