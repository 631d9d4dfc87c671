"""Claims about given files, judged on the demo's pair: without files they are out of scope, and their errors unseen.

A fault counts as caught when its claim is falsified. A claim that is falsified by every run would catch all of them.
"""

from collections.abc import Mapping
from pathlib import Path

import pytest

from q4kd.harness.claims.contract import load_contracts
from q4kd.harness.claims.folder import default_contracts_folder
from q4kd.harness.claims.model import Claim
from q4kd.harness.judging.judge import judge_claim
from q4kd.harness.records.raw_run import RawRun
from q4kd.harness.runs.experiment import Inputs
from q4kd.harness.runs.runner import ExperimentRunner, HarnessError
from q4kd.harness.runs.user_inputs import GivenFiles
from q4kd.trainer.demo import student_path, teacher_path

CLAIMS = {
    claim.id: claim
    for contract in load_contracts(default_contracts_folder())
    for claim in contract.claims
    if claim.falsifier is not None and claim.falsifier.experiment in ("real-pair", "cuda-real-pair")
}
ON_CPU = sorted(name for name in CLAIMS if not name.endswith("-CUDA"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, RawRun]:
    folder = tmp_path_factory.mktemp("real-pair")
    return ExperimentRunner(folder / "work", Inputs(folder / "inputs", "cpu"), "cpu").run("real-pair")


def test_the_claims_are_those_of_the_contract() -> None:
    assert [f"REAL-{name}-001" for name in ("EXPORT", "LEARN", "PLAN", "RESUME")] == ON_CPU


@pytest.mark.parametrize("name", [name for name in ON_CPU if name != "REAL-PLAN-001"])
def test_a_claim_about_given_files_holds_of_the_demo(runs: Mapping[str, RawRun], name: str) -> None:
    result = judge_claim(CLAIMS[name], runs, "cpu")
    assert result.verdict == "corroborated", result


def test_the_plan_of_the_demo_holds_of_its_whole_run(runs: Mapping[str, RawRun]) -> None:
    """Of the smaller run, which follows in the same process, the plan says 372 MB where 303 are taken.

    By part: 34 MB are the buffer of the student's digest, which is there when the growth begins to be counted (see
    ``_taken``). 36 MB are scratch of the teacher: the plan has its bound, 42 MB, and a pass of this one, whose width is
    256, takes 4 MB with its activations. Of the whole run, which begins without that buffer, 611 of 624 MB are taken,
    and with a real pair's sizes both rows are within 3 %. A fault in the plan is told by the first row.
    """
    rows = runs["real-pair"].array("plan")
    assert rows["subject"].shape == rows["reference"].shape == (2, 1)
    assert rows["subject"][0, 0] == pytest.approx(rows["reference"][0, 0], rel=0.15)


@pytest.mark.parametrize("name", ON_CPU)
def test_the_claims_on_a_gpu_expect_the_same_tables(name: str) -> None:
    assert tables(CLAIMS[name]) == tables(CLAIMS[f"{name}-CUDA"])


def tables(claim: Claim) -> dict[object, object]:
    assert claim.falsifier is not None
    return {use.params["table"]: use.params["expected"] for use in claim.falsifier.checks if use.check == "table"}


def test_text_of_which_nothing_is_held_out_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("decoder", "encoder"):
        (tmp_path / "data" / f"{name}.py").write_text("pass\n" * 500)
    given = GivenFiles(teacher=teacher_path(), student=student_path(), data=tmp_path / "data")
    runner = ExperimentRunner(tmp_path / "work", Inputs(tmp_path / "inputs", "cpu", given), "cpu")
    with pytest.raises(HarnessError, match=r"prepare: .*held out.*give a folder with more files"):
        runner.run("real-pair")
    assert not (tmp_path / "work" / "runs" / "real-pair" / "stdout.log").exists()
