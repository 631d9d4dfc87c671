"""A folder of contracts: what is found in it, in depth, what is skipped by name, and what is refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from q4kd.harness.__main__ import main
from q4kd.harness.claims import folder as folders
from q4kd.harness.claims.contract import load_contracts
from q4kd.harness.claims.folder import contract_files, find_contracts
from q4kd.trainer.errors import InputError

PROSE = "metadata: {description: d}\nfalsification_tests: [{id: A-1, rule: r}]\n"


def write(path: Path, text: str = PROSE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path / "claims" / "a.yaml")
    write(tmp_path / "claims" / "deep" / "deeper" / "b.yml")
    write(tmp_path / "claims" / "deep" / "c.yaml")
    return tmp_path / "claims"


def test_folders_are_looked_through_in_depth(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [path.relative_to(root).as_posix() for path in contract_files(root)]
    assert names == ["a.yaml", "deep/c.yaml", "deep/deeper/b.yml"]
    assert [contract.name for contract in load_contracts(root)] == ["a", "c", "b"]
    assert main(["contracts", "validate", str(root)]) == 0
    assert "3 contracts (3 active), 3 claims" in capsys.readouterr().out
    assert main(["contracts", "show", "b::A-1", "--contracts", str(root)]) == 0
    assert "deeper/b.yml:2" in capsys.readouterr().out
    assert main(["contracts", "diff", str(root), str(root)]) == 0


def test_a_nested_contract_that_does_not_load_fails_the_whole(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(root / "deep" / "deeper" / "b.yml", "falsification_tests: [{id: A-1, falsifier: {check: nope}}]\n")
    assert main(["contracts", "validate", str(root)]) == 2
    captured = capsys.readouterr()
    assert "deeper/b.yml:1" in captured.err and "1 failed to load" in captured.out
    with pytest.raises(InputError, match=r"b\.yml"):
        load_contracts(root)


def test_a_nested_contract_may_name_the_profiles_of_the_root(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile = Path(folders.default_contracts_folder()) / "profiles" / "cpu.yaml"
    write(root / "profiles" / "shop.yaml", profile.read_text())
    falsifier = "{check: table, experiment: superblock, params: {table: t, expected: {a: 1}}, sabotage: [scale-cache]"
    claim = f"{{id: A-1, rule: r, prediction: p, if_fails: f, falsifier: {falsifier}, profiles: {{shop: {{}}}}}}}}"
    write(root / "deep" / "d.yaml", f"falsification_tests: [{claim}]\n")
    assert main(["contracts", "validate", str(root)]) == 0, capsys.readouterr().err
    assert main(["contracts", "diff", str(root), str(root)]) == 0


def test_what_is_skipped_is_named(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (".x.yaml", ".git/y.yaml", "deep/.z.yml", "LOUD.YAML", "profiles/deep/p.yaml", "profiles/p.yml"):
        write(root / name, "not: [a contract")
    write(root / "README.md", "no contract")
    reason = "a profile is a *.yaml directly in profiles/"
    assert find_contracts(root).skipped == (
        ".git/ (hidden)",
        ".x.yaml (hidden)",
        "LOUD.YAML (a contract's suffix is .yaml or .yml)",
        "deep/.z.yml (hidden)",
        f"profiles/deep/ ({reason})",
        f"profiles/p.yml ({reason})",
    )
    assert main(["contracts", "validate", str(root)]) == 0
    assert capsys.readouterr().out.count("skipped: ") == 6
    assert main(["contracts", "show", "a", "--contracts", str(root)]) == 0
    assert capsys.readouterr().err.count("contracts skipped: ") == 6
    write(root.parent / "empty" / ".only.yaml")
    with pytest.raises(InputError, match=r"at least one .* got none \(skipped: \.only\.yaml \(hidden\)\)"):
        contract_files(root.parent / "empty")


def test_a_bundle_among_the_contracts_is_skipped(root: Path) -> None:
    before = contract_files(root)
    for name in ("plan.json", "environment.json", "contracts/a.yaml", "contracts/profiles/cpu.yaml"):
        write(root / "bundles" / "of-yesterday" / name, "{}")
    assert contract_files(root) == before
    assert find_contracts(root).skipped == ("bundles/of-yesterday/ (in a bundle)",)


@pytest.mark.parametrize("second", ["deep/deeper/a.yaml", "deep/a.yml"])
def test_two_files_of_one_name_are_refused_by_name(root: Path, second: str, capsys: pytest.CaptureFixture[str]) -> None:
    write(root / second)
    with pytest.raises(InputError, match=r"each contract name once.*a again \(first in .*claims/a\.yaml\)"):
        contract_files(root)
    assert main(["contracts", "validate", str(root)]) == 2
    assert second in capsys.readouterr().err


def test_links_must_stay_in_the_folder(root: Path) -> None:
    outside = write(root.parent / "outside.yaml")
    (root / "deep" / "linked.yaml").symlink_to("../a.yaml")
    assert len(contract_files(root)) == 4
    for target in (outside, "../../outside.yaml", "nowhere.yaml", "link.yaml"):
        (root / "deep" / "link.yaml").symlink_to(target)
        with pytest.raises(InputError, match="link that leaves"):
            contract_files(root)
        (root / "deep" / "link.yaml").unlink()
    for target in (root.parent, root, root / "deep" / "deeper"):
        (root / "deep" / "link").symlink_to(target)
        with pytest.raises(InputError, match="link to a folder"):
            contract_files(root)
        (root / "deep" / "link").unlink()
    named = root.parent / "named"
    named.symlink_to(root)
    assert len(contract_files(named)) == 4  # the folder itself may be named by a link


def test_what_is_no_file_is_refused(root: Path) -> None:
    os.mkfifo(root / "deep" / "pipe.yaml")
    with pytest.raises(InputError, match=r"pipe\.yaml: expected a file"):
        contract_files(root)


def test_profiles_below_the_root_are_refused(root: Path) -> None:
    write(root / "deep" / "profiles" / "cpu.yaml")
    with pytest.raises(InputError, match="deep/profiles: expected profiles/ in"):
        contract_files(root)


def test_depth_and_number_are_bounded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(root.joinpath(*["d"] * folders.MAX_DEPTH) / "deepest.yaml")
    assert len(contract_files(root)) == 4
    (root.joinpath(*["d"] * (folders.MAX_DEPTH + 1))).mkdir()
    with pytest.raises(InputError, match="at most 16 folders in each other"):
        contract_files(root)
    monkeypatch.setattr(folders, "MAX_ENTRIES", 5)
    with pytest.raises(InputError, match="at most 5 files and folders"):
        contract_files(root)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_a_folder_that_cannot_be_listed_is_refused(root: Path) -> None:
    (root / "deep").chmod(0)
    try:
        with pytest.raises(InputError, match="a folder that can be listed"):
            contract_files(root)
    finally:
        (root / "deep").chmod(0o700)


def test_sabotage_names_what_it_skips(root: Path) -> None:
    write(root / ".hidden.yaml", "not: [a contract")
    words = ["sabotage", "--contracts", str(root), "--profile", "cpu", "--kills", str(root.parent / "kills")]
    done = subprocess.run(
        [sys.executable, "-m", "q4kd.harness", *words], capture_output=True, text=True, check=False, timeout=60
    )
    assert "contracts skipped: .hidden.yaml (hidden)" in done.stderr
