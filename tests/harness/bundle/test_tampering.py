"""A thousand random cases of every kind of tampering. With `pytest -rP`, each test prints its count."""

import random
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from example_bundle import CONTRACT, PAIR, PROSE, build, register
from tampering import (
    EDITS,
    Files,
    add_a_byte,
    change_a_byte,
    damage,
    derive,
    drop_a_byte,
    judge_again,
    loosen,
    other_format_edited,
    seal,
)

from q4kd.harness.bundle.signing import sign_bundle
from q4kd.harness.bundle.verify import VerifyResult, verify_store
from q4kd.harness.records.packing import gzip_bytes, tar_bytes
from q4kd.harness.records.store import MemoryStore, TarStore, open_store, snapshot
from q4kd.trainer.errors import InputError

CASES = 1000
SEED = 20261123
TEXT = CONTRACT + PROSE + PAIR


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with ``bundle/`` (signed), ``contracts/``, ``key.pem`` and ``key.pub``."""
    with pytest.MonkeyPatch.context() as patch:
        register(patch)
        root = tmp_path_factory.mktemp("tampering")
        folder = build(root, text=TEXT, samples=6)
        key = Ed25519PrivateKey.generate()
        (root / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        (root / "key.pem").chmod(0o600)
        public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        (root / "key.pub").write_bytes(public)
        sign_bundle(folder, root / "key.pem")
        yield root


@pytest.fixture(scope="module")
def signed(world: Path) -> Files:
    return snapshot(open_store(world / "bundle"), "bundle").files


@pytest.fixture(scope="module")
def files(signed: Files) -> Files:
    return {name: data for name, data in signed.items() if name != "statement.dsse.json"}


def verdict(changed: Mapping[str, bytes], **options: Any) -> VerifyResult | None:
    """Verify files; None when they were refused outright, which is exit code 2."""
    try:
        return verify_store(MemoryStore(changed, "bundle"), **options)
    except InputError:
        return None


def report(kind: str, kinds: Counter[str], missed: list[str], cases: int = CASES) -> None:
    print(f"{kind}: {kinds.total()} cases, {kinds.total() - len(missed)} caught: {dict(sorted(kinds.items()))}")
    assert kinds.total() == cases and not missed, missed[:5]


def test_the_bundle_is_consistent_before_anything_is_changed(world: Path, files: Files, signed: Files) -> None:
    for changed, options in ((files, {}), (signed, {}), (signed, {"public_keys": [world / "key.pub"]})):
        result = verdict(changed, contracts=world / "contracts", **options)
        assert result is not None and result.problems == () and result.status == "consistent"


# Without sealing again


@pytest.mark.parametrize("sign", [False, True], ids=["unsigned", "signed"])
def test_any_byte_or_file_changed_without_sealing_again_is_a_mismatch(
    world: Path, files: Files, signed: Files, sign: bool
) -> None:
    draw, kinds, missed = random.Random(SEED + sign), Counter[str](), []
    options: dict[str, Any] = {"public_keys": [world / "key.pub"]} if sign else {}
    for _ in range(CASES):
        kind, changed = damage(draw, signed if sign else files)
        kinds[kind] += 1
        result = verdict(changed, **options)
        if result is None or result.status != "mismatch":
            missed.append(f"{kind}: {sorted(set(changed) ^ set(files))}")
    report(f"without sealing again, {'signed' if sign else 'unsigned'}", kinds, missed)


def test_any_byte_changed_in_an_archive_changes_nothing_or_is_refused(files: Files) -> None:
    """A few bits of a gzip stream carry nothing; whatever does carry something is a mismatch."""
    draw, kinds, missed = random.Random(SEED), Counter[str](), []
    packed = gzip_bytes(tar_bytes(MemoryStore(files, "bundle")))
    for _ in range(CASES):
        data = draw.choice([change_a_byte, drop_a_byte, add_a_byte])(draw, packed)
        try:
            same = TarStore(data).files == files
        except InputError:
            kinds["refused"] += 1
            continue
        kinds["of no effect" if same else "read"] += 1
        if not same:
            missed.append("other files were read from it")
    report("archives", kinds, missed)


# With sealing again


def test_edits_sealed_again_fail_by_recomputation(files: Files) -> None:
    draw, kinds, missed, results = random.Random(SEED), Counter[str](), [], Counter[str]()
    for number in range(CASES):
        change = EDITS[number % len(EDITS)]
        changed = dict(files)
        change(draw, changed)
        if change is not other_format_edited and draw.random() < 0.7:
            derive(changed)
        kinds[change.__name__] += 1
        result = verdict(seal(changed))
        results[result.status if result else "refused"] += 1
        if result is not None and result.status == "consistent":
            missed.append(f"case {number}: {change.__name__}")
    print(dict(results))
    report("sealed again", kinds, missed)


# Loosened, judged again and sealed again: nothing in the bundle contradicts anything else


@pytest.mark.parametrize("part", [0, 1])
def test_loosened_bounds_sealed_again_fail_against_contracts_or_a_signature(
    world: Path, files: Files, signed: Files, part: int
) -> None:
    """Half of the cases each. With neither at hand the words say that authenticity is not established."""
    draw, kinds, missed = random.Random(SEED + part), Counter[str](), []
    for number in range(CASES // 2):
        changed = dict(files)
        kind = loosen(draw, changed)
        kinds[kind] += 1
        judge_again(changed)
        seal(changed)
        alone = verdict(changed)
        by_contracts = verdict(changed, contracts=world / "contracts")
        if draw.random() < 0.8:  # else the signature is stripped
            changed["statement.dsse.json"] = signed["statement.dsse.json"]
        by_key = verdict(changed, public_keys=[world / "key.pub"])
        assert alone is not None and by_contracts is not None and by_key is not None
        # What the machine has, llama.cpp say, may be a caveat too.
        said = alone.status == "consistent" and any("authenticity not established" in one for one in alone.caveats)
        if not (said and by_contracts.status == by_key.status == "mismatch"):
            missed.append(f"case {number}: {kind}: {alone}, {by_contracts.status}, {by_key.status}")
    report("loosened", kinds, missed, CASES // 2)
