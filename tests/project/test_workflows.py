"""The workflows are valid, pinned to commits, and ask for no permission to write."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

FOLDER = Path(__file__).parents[2] / ".github" / "workflows"
WORKFLOWS = sorted(FOLDER.glob("*.yml"))


def test_there_is_one_before_merge_and_one_for_the_night() -> None:
    assert [path.name for path in WORKFLOWS] == ["nightly-gb10.yml", "pre-merge.yml"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_the_linter_accepts_it(path: Path) -> None:
    pytest.importorskip("check_jsonschema", reason="check-jsonschema is not installed: pip install 'q4kd[dev]'")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_it_reads_only_and_runs_pinned_actions(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert "permissions" not in job and job["timeout-minutes"] <= 600
        for step in job["steps"]:
            if "uses" in step:
                assert re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", step["uses"])
            if "checkout" in step.get("uses", ""):
                assert step["with"]["persist-credentials"] is False
            # What a pull request may name must not become part of a script.
            assert "${{" not in step.get("run", "")


def test_the_night_runs_on_its_own_machine_and_keeps_its_bundle() -> None:
    job = yaml.safe_load((FOLDER / "nightly-gb10.yml").read_text())["jobs"]["nightly"]
    assert {"self-hosted", "ARM64", "gb10"} <= set(job["runs-on"])
    (night,) = [step["run"] for step in job["steps"] if "nightly" in step.get("run", "") and "--profile" in step["run"]]
    from q4kd.harness.__main__ import build_parser

    words = night.replace('"', "").split()
    args = build_parser().parse_args(["nightly", *words[words.index("--") + 1 :]])
    (upload,) = [step for step in job["steps"] if "upload-artifact" in step.get("uses", "")]
    assert f"{args.out}/bundles" in upload["with"]["path"]
    assert upload["if"] == "always()"
