"""Another project, with a package of its own named ``harness``, uses the wheel to falsify a program not ours."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = Path(__file__).parents[1] / "example_project"
Run = Callable[..., subprocess.CompletedProcess[str]]


def environment(site: Path) -> dict[str, str]:
    """Return variables by which an interpreter sees ``site``, then the packages that this one sees (several folders
    where an environment lies over another)."""
    paths = [str(site), *[path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with both wheels installed, and an environment that knows nothing of this checkout."""
    work = tmp_path_factory.mktemp("install")
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "bundles", "tests")
    shutil.copytree(ROOT, work / "q4kd", ignore=unwanted)
    shutil.copytree(EXAMPLE, work / "acme", ignore=unwanted)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(work / "wheels")]
    subprocess.run([*build, str(work / "q4kd"), str(work / "acme")], check=True, timeout=300)
    wheels = sorted(map(str, (work / "wheels").glob("*.whl")))
    install = [*pip, "install", "--no-deps", "--no-compile", "--no-index", "--target", str(work / "site")]
    subprocess.run([*install, *wheels], check=True, timeout=120)
    # An interpreter of its own: on PYTHONPATH, this one's packages bring no editable install with them.
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(work / "venv")], check=True, timeout=120)
    shutil.rmtree(work / "q4kd")
    shutil.rmtree(work / "acme")
    return work


@pytest.fixture
def q4kd(installed: Path, tmp_path: Path) -> Run:
    shutil.copytree(EXAMPLE / "contracts", tmp_path / "contracts")
    shutil.copytree(installed / "site", tmp_path / "site", symlinks=True)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(installed / "venv/bin/python"), "-m", "q4kd.harness", *arguments]
        env = environment(tmp_path / "site")
        return subprocess.run(command, cwd=tmp_path, env=env, text=True, capture_output=True, timeout=120, check=False)

    return run


def test_nothing_comes_from_this_checkout(installed: Path) -> None:
    env = environment(installed / "site")
    code = (
        "import harness, q4kd.harness, q4kd.trainer, q4kd.evidence as e; print(harness, q4kd.harness, q4kd.trainer, e)"
    )
    command = [str(installed / "venv/bin/python"), "-c", code]
    done = subprocess.run(command, cwd=installed, env=env, text=True, capture_output=True, timeout=60, check=True)
    assert done.stdout.count(str(installed / "site")) == 4, done.stdout
    assert str(ROOT) not in done.stdout


COMMON = ("--contracts", "contracts", "--profile", "cpu", "--kills", "kills")


def test_green_then_broken_then_red(q4kd: Run, tmp_path: Path) -> None:
    done = q4kd("sabotage", *COMMON)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 caught, 0 missed, 0 misfire, 0 VOID" in done.stdout
    done = q4kd("falsify", *COMMON, "--out", "green")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "L2: 2 of 2 planted faults caught" in done.stdout
    assert q4kd("evidence", "verify", "green").returncode == 0

    program = tmp_path / "site" / "harness" / "sorting.py"
    text = program.read_text()
    program.write_text(text.replace("if right[j] < left[i]:", "if right[j] < left[i] - 1:"))
    assert program.read_text() != text
    done = q4kd("falsify", *COMMON, "--out", "red")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "counterexample" in done.stdout and "equal numbers are the usual suspects" in done.stdout
    (finding,) = json.loads((tmp_path / "red" / "findings.json").read_text())["findings"]
    assert all("changed since: target merge" in record["detail"] for record in finding["sabotage"])


# Where other projects have been told to import from; each is written here as this checkout's example says it now.
PUBLIC_PATHS = {
    "experiments.py": ("q4kd.harness.runs.experiment", "q4kd.harness.experiment"),
    "faults.py": ("q4kd.harness.runs.faults", "q4kd.harness.sabotage.registry"),
    "sorted_output.py": ("q4kd.harness.records.raw_run", "q4kd.harness.raw"),
}


def test_the_public_import_paths_give_the_same_and_age_no_kill_record(q4kd: Run, tmp_path: Path) -> None:
    done = q4kd("sabotage", *COMMON)
    assert done.returncode == 0, done.stdout + done.stderr
    for name, (inner, public) in PUBLIC_PATHS.items():
        path = tmp_path / "site" / "harness" / name
        text = path.read_text()
        assert text.count(f"from {inner} import ") == 1
        path.write_text(text.replace(inner, public))
    done = q4kd("falsify", *COMMON, "--out", "green")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "L2: 2 of 2 planted faults caught" in done.stdout


def entry_points(site: Path) -> Path:
    return next(site.glob("acme_sort-*.dist-info")) / "entry_points.txt"


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("harness.experiments", "harness.gone", "q4kd.experiments 'sorting' of acme-sort 1.0: "),
        ("harness.faults:FAULTS", "harness.faults:_MERGE", "q4kd.faults 'sorting' of acme-sort 1.0: "),
        ("sorted_output = harness.sorted_output", "parity = harness.sorted_output", "the name of a built-in check"),
        ("sorted_output = harness.sorted_output", "other = harness.sorted_output", "NAME is 'sorted_output'"),
        ("sorted_output = harness.sorted_output", "sorted_output = harness.sorting", "no attribute 'NAME'"),
    ],
)
def test_a_broken_extension_is_one_line_that_names_its_distribution(
    q4kd: Run, tmp_path: Path, before: str, after: str, said: str
) -> None:
    points = entry_points(tmp_path / "site")
    text = points.read_text()
    points.write_text(text.replace(before, after))
    assert points.read_text() != text
    done = q4kd("contracts", "validate", "contracts")
    assert done.returncode == 2
    assert said in done.stderr and "acme-sort 1.0" in done.stderr and done.stderr.count("\n") == 1
