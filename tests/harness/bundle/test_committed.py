"""The committed bundles: a change of judge, checks or format that breaks old evidence is seen here."""

from pathlib import Path

import pytest

from q4kd.harness.__main__ import main
from q4kd.harness.bundle.findings import read_findings
from q4kd.harness.bundle.recheck import KILLS
from q4kd.harness.bundle.writer import write_findings
from q4kd.harness.judging.kill_records import kill_records, read_kill_records
from q4kd.harness.records.store import open_store, read_object
from q4kd.trainer.files import write_json

FOLDER = Path(__file__).parents[3] / "evidence" / "bundles"
BUNDLES = sorted(FOLDER.glob("*.tar.*"))
MAX_BYTES = 10_000_000


def test_there_is_a_bundle_of_the_cpu_profile_and_nothing_else_in_the_folder() -> None:
    assert any("cpu" in path.name for path in BUNDLES)
    assert sorted(FOLDER.iterdir()) == BUNDLES


@pytest.mark.parametrize("path", BUNDLES, ids=lambda path: path.name)
def test_a_committed_bundle_still_verifies(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert path.stat().st_size < MAX_BYTES
    code, said = main(["evidence", "verify", str(path)]), capsys.readouterr().out
    assert code == 0, said
    findings = read_object(open_store(path), "findings.json")["findings"]
    # Every verdict of the bundle, and not only those that are still understood.
    assert findings and f"verified: {len(findings)} verdicts recomputed from raw files" in " ".join(said.split())


@pytest.mark.parametrize("path", BUNDLES, ids=lambda path: path.name)
def test_findings_and_kill_records_are_written_as_they_were_read(path: Path, tmp_path: Path) -> None:
    store = open_store(path)
    write_findings(tmp_path, read_findings(store))
    write_json(tmp_path / "kills.json", kill_records(read_kill_records(read_object(store, KILLS), KILLS)))
    assert (tmp_path / "findings.json").read_bytes() == store.read("findings.json")
    assert (tmp_path / "kills.json").read_bytes() == store.read(KILLS)
