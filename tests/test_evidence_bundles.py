"""The committed bundles: a change of judge, checks or format that breaks old evidence is seen here."""

from pathlib import Path

import pytest

from q4kd.harness.__main__ import main
from q4kd.harness.raw import open_store
from q4kd.harness.store import read_object
from q4kd.harness.verify import verify_bundle

FOLDER = Path(__file__).parents[1] / "evidence" / "bundles"
BUNDLES = sorted(FOLDER.glob("*.tar.gz"))
MAX_BYTES = 10_000_000


def test_there_is_a_bundle_of_the_cpu_profile_and_nothing_else_in_the_folder() -> None:
    assert any("cpu" in path.name for path in BUNDLES)
    assert sorted(FOLDER.iterdir()) == BUNDLES


@pytest.mark.parametrize("path", BUNDLES, ids=lambda path: path.name)
def test_a_committed_bundle_still_verifies(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert path.stat().st_size <= MAX_BYTES
    assert main(["evidence", "verify", str(path)]) == 0, capsys.readouterr().out
    result = verify_bundle(path, None, [])
    findings = read_object(open_store(path), "findings.json")["findings"]
    # Every verdict of the bundle, and not only those that are still understood.
    assert result.recomputed == len(findings) > 0
