import base64
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from example_bundle import CONTRACT, build, register

from q4kd.harness.__main__ import main
from q4kd.harness.bundle.dsse import (
    ENVELOPE,
    MAX_SIGNATURES,
    PAYLOAD_TYPE,
    fingerprint,
    load_private_key,
    load_public_key,
    pae,
    read_envelope,
    sign,
)
from q4kd.harness.bundle.signing import sign_bundle
from q4kd.harness.bundle.verify import verify_bundle
from q4kd.harness.bundle.writer import MANIFEST, pack, seal
from q4kd.trainer.errors import InputError

PLAIN = NoEncryption()


@pytest.fixture(autouse=True)
def checks(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return build(tmp_path)


def write_pair(folder: Path, name: str, kind: str = "pem", key: Any = None, secret: Any = PLAIN) -> tuple[Path, Path]:
    """Write a key pair as openssl (``pem``) or ssh-keygen (``ssh``) would; return both files."""
    key = key or ed25519.Ed25519PrivateKey.generate()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    if kind == "pem":
        private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, secret))
        public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    else:
        private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, secret))
        public.write_bytes(key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b" ada@host\n")
    private.chmod(0o600)
    return private, public


def problems(bundle: Path, *keys: Path) -> str:
    return "\n".join(verify_bundle(bundle, public_keys=keys).problems)


def test_the_encoding_is_that_of_the_specification() -> None:
    # The test vector of the protocol.
    assert pae("http://example.com/HelloWorld", b"hello world") == (
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )
    assert pae("é", b"") == b"DSSEv1 2 \xc3\xa9 0 "


@pytest.mark.parametrize("kind", ["pem", "ssh"])
@pytest.mark.parametrize("packed", [False, True], ids=["folder", "archive"])
def test_a_signed_bundle_verifies_under_its_key_and_no_other(
    bundle: Path, tmp_path: Path, kind: str, packed: bool
) -> None:
    path = pack(bundle) if packed else bundle
    private, public = write_pair(tmp_path, "a", kind)
    _, other = write_pair(tmp_path, "b", kind)
    name = sign_bundle(path, private)
    result = verify_bundle(path, public_keys=[public])
    assert (result.status, result.problems, result.signed_by) == ("consistent", (), (name,))
    assert not any("authenticity" in caveat for caveat in result.caveats)
    wrong = verify_bundle(path, public_keys=[other])
    assert wrong.exit_code == 1 and wrong.signed_by == ()
    assert wrong.problems == (f"not signed by {fingerprint(load_public_key(other))}, but by {name}",)
    unchecked = verify_bundle(path)
    # Beside a GPU another caveat may come first: the plan of this bundle counts on none.
    said = any("authenticity not established" in caveat for caveat in unchecked.caveats)
    assert unchecked.status == "consistent" and said
    assert any("not checked, for want of --public-key" in caveat for caveat in unchecked.caveats)


def test_the_signature_covers_the_manifest_and_the_key_stays_out(bundle: Path, tmp_path: Path) -> None:
    private, public = write_pair(tmp_path, "a")
    sign_bundle(bundle, private)
    document = json.loads((bundle / ENVELOPE).read_bytes())
    statement = json.loads(base64.b64decode(document["payload"]))
    digest = hashlib.sha256((bundle / MANIFEST).read_bytes()).hexdigest()
    assert document["payloadType"] == PAYLOAD_TYPE and statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["subject"][0] == {"name": MANIFEST, "digest": {"sha256": digest}}
    # An independent check of the signature, as any DSSE verifier would make it.
    payload = base64.b64decode(document["payload"])
    covered = b"DSSEv1 28 application/vnd.in-toto+json " + str(len(payload)).encode() + b" " + payload
    load_public_key(public).verify(base64.b64decode(document["signatures"][0]["sig"]), covered)
    secret = private.read_bytes().splitlines()[1]
    assert not [path for path in bundle.rglob("*") if path.is_file() and secret in path.read_bytes()]


def test_a_public_key_on_an_unsigned_bundle_fails(bundle: Path, tmp_path: Path) -> None:
    _, public = write_pair(tmp_path, "a")
    assert "not signed: a public key was given" in problems(bundle, public)


def edit_envelope(bundle: Path, change: Any) -> None:
    document = json.loads((bundle / ENVELOPE).read_bytes())
    change(document)
    (bundle / ENVELOPE).write_text(json.dumps(document, indent=1) + "\n")


def test_an_altered_payload_or_signature_is_found(bundle: Path, tmp_path: Path) -> None:
    private, public = write_pair(tmp_path, "a")
    sign_bundle(bundle, private)
    whole = (bundle / ENVELOPE).read_bytes()

    def payload(document: dict[str, Any]) -> None:
        changed = base64.b64decode(document["payload"]).replace(b"PASSED", b"FAILED")
        document["payload"] = base64.b64encode(changed).decode()

    edit_envelope(bundle, payload)
    assert "does not fit" in problems(bundle, public)
    assert "is not the one that the findings give" in problems(bundle)  # even without the key
    (bundle / ENVELOPE).write_bytes(whole)

    def signature(document: dict[str, Any]) -> None:
        document["signatures"][0]["sig"] = base64.b64encode(bytes(64)).decode()

    edit_envelope(bundle, signature)
    assert "does not fit" in problems(bundle, public)
    (bundle / ENVELOPE).write_bytes(whole)

    def keyid(document: dict[str, Any]) -> None:
        document["signatures"][0]["keyid"] = "SHA256:somebody"

    edit_envelope(bundle, keyid)
    assert "but by SHA256:somebody" in problems(bundle, public)


def test_a_signature_of_another_bundle_does_not_serve(tmp_path: Path) -> None:
    private, public = write_pair(tmp_path, "a")
    strict, loose = build(tmp_path / "a"), build(tmp_path / "b", text=CONTRACT.replace("100.5", "500.5"))
    sign_bundle(strict, private)
    shutil.copy(strict / ENVELOPE, loose / ENVELOPE)
    for keys in ([public], []):
        assert "signed for another bundle" in problems(loose, *keys)


def test_a_bundle_sealed_again_after_it_was_signed_fails(bundle: Path, tmp_path: Path) -> None:
    private, public = write_pair(tmp_path, "a")
    sign_bundle(bundle, private)
    (bundle / "report.html").write_text("all is well")
    seal(bundle)
    assert "or for this one before it was changed" in problems(bundle, public)
    with pytest.raises(InputError, match="a bundle that verifies"):
        sign_bundle(bundle, private)


def test_several_signatures(bundle: Path, tmp_path: Path) -> None:
    pairs = [write_pair(tmp_path, name, kind) for name, kind in (("a", "pem"), ("b", "ssh"), ("c", "pem"))]
    names = [sign_bundle(bundle, private) for private, _ in pairs[:2]]
    sign_bundle(bundle, pairs[0][0])  # again: it replaces its own
    assert sorted(read_envelope((bundle / ENVELOPE).read_bytes()).signatures) == sorted(names)
    both = verify_bundle(bundle, public_keys=[pairs[0][1], pairs[1][1]])
    assert both.status == "consistent" and both.signed_by == tuple(names)
    third = fingerprint(load_public_key(pairs[2][1]))
    assert f"not signed by {third}, but by" in problems(bundle, pairs[0][1], pairs[2][1])
    edit_envelope(bundle, lambda d: d["signatures"].reverse())
    assert "as `q4kd evidence sign` writes it" in problems(bundle)


def test_signatures_are_bounded() -> None:
    others = {f"SHA256:{number}": bytes(64) for number in range(MAX_SIGNATURES)}
    with pytest.raises(InputError, match="at most 32"):
        sign(b"{}", ed25519.Ed25519PrivateKey.generate(), others)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"[]", b"{}", b'{"payload": 1, "payloadType": "x", "signatures": []}', b"\xff", b"[" * 100_000,
        b'{"payload": "e30=", "payloadType": "application/vnd.in-toto+json", "signatures": []}',
        b'{"payload": "e30=", "payloadType": "application/vnd.in-toto+json", "signatures": [3]}',
        b'{"payload": "e30=", "payloadType": "application/vnd.in-toto+json", "signatures": {"a": 1}}',
        b'{"payload": "!", "payloadType": "application/vnd.in-toto+json", "signatures": [{"keyid": "a", "sig": ""}]}',
    ],
)  # fmt: skip
def test_a_malformed_envelope_is_a_mismatch(bundle: Path, data: bytes) -> None:
    (bundle / ENVELOPE).write_bytes(data)
    result = verify_bundle(bundle)
    assert result.status == "mismatch"
    assert "a DSSE envelope" in result.problems[0] or "strict JSON" in result.problems[0]


def test_a_damaged_bundle_is_not_signed(bundle: Path, tmp_path: Path) -> None:
    private, _ = write_pair(tmp_path, "a")
    (bundle / "plan.json").write_text("{}")
    with pytest.raises(InputError, match="mismatch: changed file: plan"):
        sign_bundle(bundle, private)
    assert not (bundle / ENVELOPE).exists()


@pytest.mark.parametrize("kind", ["pem", "ssh"])
def test_keys_that_cannot_sign_are_named_for_what_they_are(tmp_path: Path, kind: str) -> None:
    elliptic = ec.generate_private_key(ec.SECP256R1())
    private, public = write_pair(tmp_path, "ec", kind, elliptic)
    for load, path in ((load_private_key, private), (load_public_key, public)):
        with pytest.raises(InputError, match="a key of another kind"):
            load(path)
    private, public = write_pair(tmp_path, "ed", kind)
    with pytest.raises(InputError, match="a public key; name the private one"):
        load_private_key(public)
    with pytest.raises(InputError, match="a private key, which should stay with its owner"):
        load_public_key(private)
    for path, data in ((private, b"nonsense"), (private, b""), (private, b"x" * 100_000)):
        path.write_bytes(data)
        for load in (load_private_key, load_public_key):
            with pytest.raises(InputError):
                load(path)


def test_a_locked_pem_key_is_refused(tmp_path: Path) -> None:
    private, _ = write_pair(tmp_path, "a", secret=BestAvailableEncryption(b"secret"))
    with pytest.raises(InputError, match=r"protected by a passphrase; .*openssl pkey"):
        load_private_key(private)


def test_a_file_of_two_public_keys_is_refused(tmp_path: Path) -> None:
    _, one = write_pair(tmp_path, "a", "ssh")
    _, two = write_pair(tmp_path, "b", "ssh")
    one.write_bytes(one.read_bytes() + two.read_bytes())
    with pytest.raises(InputError, match="2 keys in one file"):
        load_public_key(one)


def test_rsa_is_refused_too(tmp_path: Path) -> None:
    private, _ = write_pair(tmp_path, "rsa", "pem", rsa.generate_private_key(65537, 1024))
    with pytest.raises(InputError, match="RSAPrivateKey"):
        load_private_key(private)


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed")
def test_a_locked_key_of_ssh_keygen_is_refused_and_an_open_one_signs(bundle: Path, tmp_path: Path) -> None:
    def make(name: str, passphrase: str) -> Path:
        path = tmp_path / name
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", passphrase, "-f", str(path)]
        subprocess.run(command, check=True)
        return path

    with pytest.raises(InputError, match="protected by a passphrase"):
        load_private_key(make("locked", "secret"))
    free = make("free", "")
    name = sign_bundle(bundle, free)
    listed = subprocess.run(["ssh-keygen", "-lf", str(free)], check=True, capture_output=True, text=True).stdout
    assert name in listed
    assert verify_bundle(bundle, public_keys=[tmp_path / "free.pub"]).signed_by == (name,)


def test_a_key_that_others_can_read_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    private, _ = write_pair(tmp_path, "a")
    load_private_key(private)
    assert capsys.readouterr().err == ""
    private.chmod(0o644)
    load_private_key(private)
    assert "can be read by others; chmod 600 it" in capsys.readouterr().err


def test_a_key_inside_the_bundle_is_refused(bundle: Path) -> None:
    private, _ = write_pair(bundle, "a")
    with pytest.raises(InputError, match="outside the bundle"):
        sign_bundle(bundle, private)


def test_the_commands(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    private, public = write_pair(tmp_path, "a")
    _, other = write_pair(tmp_path, "b")
    assert main(["evidence", "verify", str(bundle), "--public-key", str(public)]) == 1
    assert "not signed" in capsys.readouterr().out
    assert main(["evidence", "sign", str(bundle), "--key", str(private)]) == 0
    assert "signed by SHA256:" in capsys.readouterr().out
    assert main(["evidence", "verify", str(bundle), "--public-key", str(public)]) == 0
    said = capsys.readouterr().out
    assert "it covers every file" in said and "authenticity not established" not in said
    assert main(["evidence", "verify", str(bundle), "--public-key", str(public), "--public-key", str(other)]) == 1
    assert "not signed by SHA256:" in capsys.readouterr().out
    assert main(["evidence", "verify", str(bundle), "--public-key", str(tmp_path / "none")]) == 2
    assert main(["evidence", "sign", str(bundle), "--key", str(public)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 2 and "name the private one" in said


def test_without_the_library_only_signatures_are_out_of_reach(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, public = write_pair(tmp_path, "a")
    sign_bundle(bundle, private)
    for name in [name for name in sys.modules if name.partition(".")[0] == "cryptography"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match="pip install cryptography"):
        verify_bundle(bundle, public_keys=[public])
    assert verify_bundle(bundle).status == "consistent"
