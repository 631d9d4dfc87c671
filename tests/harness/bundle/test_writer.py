import getpass
import hashlib
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from example_bundle import build, register

from q4kd.harness.bundle.environment import environment, git_state, instruction_limits
from q4kd.harness.bundle.writer import (
    MANIFEST,
    manifest_of,
    open_bundle,
    pack,
    pack_bytes,
    parse_manifest,
    seal,
    seal_problems,
)
from q4kd.harness.claims.contract import load_contracts
from q4kd.harness.claims.plan import make_plan
from q4kd.harness.claims.profile import load_profile
from q4kd.harness.inputs.arrays import save_arrays
from q4kd.harness.records.packing import SUFFIXES, tar_bytes, xz_bytes
from q4kd.harness.records.redact import redact
from q4kd.harness.records.store import DirectoryStore, TarStore
from q4kd.trainer.errors import InputError


def test_the_seal_covers_every_file_and_sha256sum_agrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)
    folder = build(tmp_path)
    text = (folder / MANIFEST).read_bytes()
    assert parse_manifest(text, MANIFEST) == manifest_of(DirectoryStore(folder))
    assert {"findings.json", "plan.json", "report.html", "contracts/profiles/cpu.yaml"} <= set(
        parse_manifest(text, "m")
    )
    assert subprocess.run(["sha256sum", "-c", "--quiet", MANIFEST], cwd=folder, check=False).returncode == 0
    assert seal(folder) == hashlib.sha256(text).hexdigest()


@pytest.mark.parametrize("change", ["end", "order", "return", "blank"])
def test_a_manifest_has_one_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    register(monkeypatch)
    folder = build(tmp_path)
    data = (folder / MANIFEST).read_bytes()
    assert seal_problems(DirectoryStore(folder)) == []
    lines = data.splitlines(keepends=True)
    changed = {
        "end": data[:-1],
        "order": b"".join(reversed(lines)),
        "return": data.replace(b"\n", b"\r\n", 1),
        "blank": data + b"\n",
    }[change]
    (folder / MANIFEST).write_bytes(changed)
    assert any("changed file: MANIFEST.sha256" in line for line in seal_problems(DirectoryStore(folder)))


@pytest.mark.parametrize("line", ["nonsense", f"{'a' * 64}  ../x", f"{'a' * 64}  x\n{'b' * 64}  x", f"{'A' * 64}  x"])
def test_a_malformed_manifest_is_refused(line: str) -> None:
    with pytest.raises(InputError):
        parse_manifest(line.encode(), MANIFEST)


def test_packing_is_deterministic_and_reads_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)
    folder = build(tmp_path)
    store = DirectoryStore(folder)
    names = [f"b{suffix}" for suffix in SUFFIXES]
    first = {name: pack(folder, tmp_path / name).read_bytes() for name in names}
    for path in folder.rglob("*"):
        path.touch()
    for name, data in first.items():
        packed = TarStore(data)
        assert pack(folder, tmp_path / name).read_bytes() == data
        assert {kept: packed.read(kept) for kept in packed.names()} == {
            kept: store.read(kept) for kept in store.names()
        }
    assert pack_bytes(folder) == first["b.tar.gz"] == first["b.tgz"]
    assert first["b.tar.gz"][4:8] == bytes(4)  # no time of packing in the header
    assert pack(tmp_path / "b.tgz").read_bytes() == first["b.tar.xz"] == pack(folder).read_bytes()
    with pytest.raises(InputError, match=r"\.tar\.xz"):
        pack(folder, tmp_path / "b.zip")


def test_equal_arrays_of_two_runs_take_the_place_of_one(tmp_path: Path) -> None:
    noise = np.random.default_rng(1).standard_normal(50_000).astype(np.float32)
    one, two = tmp_path / "one", tmp_path / "two"
    between = bytes(9 << 20)  # farther than xz looks back by itself
    for folder, names in ((one, ["a"]), (two, ["a", "z"])):
        folder.mkdir()
        for name in names:
            save_arrays(folder / f"{name}.npz", {"subject": noise, "other": noise[: 3 * len(name)]})
        (folder / "between").write_bytes(between)
    alone, twice = (len(xz_bytes(tar_bytes(DirectoryStore(folder)))) for folder in (one, two))
    assert alone > 0.8 * noise.nbytes and twice - alone < 0.05 * noise.nbytes


def test_a_finished_bundle_is_never_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)
    folder = build(tmp_path)
    contracts = tmp_path / "contracts"
    plan = make_plan(load_contracts(contracts), load_profile("cpu"))
    with pytest.raises(InputError, match="--out"):
        open_bundle(folder, contracts, "cpu", plan, {})


def test_a_link_in_a_bundle_cannot_be_sealed(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "x").symlink_to("/etc/passwd")
    with pytest.raises(InputError, match="link"):
        seal(tmp_path)


def test_the_environment_is_an_allow_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnopqrstuvwxyz")
    monkeypatch.setenv("USER", "someone")
    found = environment("cpu")
    assert set(found) == {
        "schema", "profile", "commit", "dirty", "python", "implementation", "platform", "packages", "cpu",
        "memory_bytes", "gpu", "boot_id",
    }  # fmt: skip
    text = json.dumps(found)
    assert (
        "hf_abc" not in text
        and "someone" not in text
        and str(Path.home()) not in text.replace("/root", str(Path.home()))
    )
    assert found["packages"]["numpy"] and found["memory_bytes"] > 0


def test_the_commit_and_whether_it_is_dirty(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        options = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *options, *words], check=True, capture_output=True)

    assert git_state(tmp_path) == (None, None)
    git("init", "-q")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-qm", "m")
    commit, dirty = git_state(tmp_path)
    assert commit is not None and len(commit) == 40 and dirty is False
    (tmp_path / "a").write_text("2")
    assert git_state(tmp_path) == (commit, True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("open /people/ada/models/a.gguf", "open {home}/models/a.gguf"),
        ("/people/adabody", "/people/adabody"),
        ("/home/alice/x and /Users/bob/y", "/home/{user}/x and /Users/{user}/y"),
        ("\x1b[31mred\x1b[0m\tx\r\ny\x07", "red\tx\ny"),
        ("\x1b]0;title\x07after", "after"),
        ("a\u202eb\x9bc\ud800", "abc"),
        ("token hf_abcdefghijklmnopqrstuvwx.", "token {token}."),
        ("nvapi-abcdefghijklmnopqrstuvwx AKIAABCDEFGHIJKLMNOP", "{token} {token}"),
        ("get https://ada:s3cret@example.org/x", "get https://{token}@example.org/x"),
        ("see https://example.org:8080/a@b", "see https://example.org:8080/a@b"),
        ("/data/models/q.gguf", "{inputs}/q.gguf"),
        ("plain text\n", "plain text\n"),
    ],
)
def test_free_text_is_redacted(text: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/people/ada")
    assert redact(text, {"/data/models": "{inputs}"}) == expected


def test_the_user_name_goes_from_paths_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(getpass, "getuser", lambda: "gordon")
    assert redact("/scratch/gordon/run by gordon") == "/scratch/{user}/run by gordon"


def test_limits_of_instructions_are_recorded_and_nothing_else_of_the_environment() -> None:
    given = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "ATEN_CPU_CAPABILITY": "/home/someone", "HOME": "/home/someone"}
    assert instruction_limits(given) == {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "ATEN_CPU_CAPABILITY": "not a level"}
    assert environment("cpu")["cpu"]["instruction_limits"] == instruction_limits(os.environ)  # type: ignore[call-overload, index]
