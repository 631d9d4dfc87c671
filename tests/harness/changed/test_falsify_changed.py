"""The real command in the fake world: what is carried, what is run, and what is refused."""

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from q4kd.harness.bundle.writer import MANIFEST, pack, seal

SUPPORT = Path(__file__).parents[2] / "support"
CODE = """
import sys
from fakeworld.plugin import install
install()
from q4kd.harness import falsify
from q4kd.harness.__main__ import main
real = falsify.pytest_command
falsify.pytest_command = lambda *args: [*real(*args), "-p", "fakeworld.plugin"]
import q4kd.harness.cli.main as entry
entry.COMMAND_MODULES = ("q4kd.harness.cli.falsify", "q4kd.harness.cli.evidence")
sys.exit(main(sys.argv[1:]))
"""
CLAIM = """
- id: FT-{number}
  rule: values stay low
  prediction: at most 50
  if_fails: look
  falsifier: {{check: fake, experiment: {experiment}, params: {{ceiling: 50}}, sabotage: [{fault}]}}
"""
CLAIMS = (("measure", "inflate"), ("compare", "inflate-b"), ("alone", "inflate"))
Run = Callable[..., tuple[int, str]]


def write_world(folder: Path) -> None:
    shutil.copytree(SUPPORT / "fakeworld", folder / "world" / "fakeworld")
    (folder / "claims").mkdir()
    rows = [CLAIM.format(number=n, experiment=name, fault=fault) for n, (name, fault) in enumerate(CLAIMS)]
    (folder / "claims" / "c.yaml").write_text("metadata: {status: active}\nfalsification_tests:\n" + "".join(rows))


def run_in(folder: Path, *arguments: str) -> tuple[int, str]:
    """Run ``q4kd`` in the fake world of a folder; return its exit code and what it said."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder / "world"), "PYTHONDONTWRITEBYTECODE": "1"},
        text=True,
        capture_output=True,
        timeout=180,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def q4kd(tmp_path: Path) -> Run:
    write_world(tmp_path)
    return functools.partial(run_in, tmp_path)


COMMON = ("--contracts", "claims", "--profile", "cpu", "--kills", "kills")


def decided(out: str) -> dict[str, str]:
    """Return, by experiment, the first word of what was said of it: carried or run."""
    lines = [line.split() for line in out.splitlines() if line.startswith(("carried  ", "run      "))]
    return {words[1].rstrip(":"): words[0] for words in lines}


def edit(tmp_path: Path, old: str, new: str) -> None:
    path = tmp_path / "world" / "fakeworld" / "experiments.py"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def spoil(path: Path, change: Callable[[Any], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_what_a_change_did_not_touch_is_carried_and_said_to_be(q4kd: Run, tmp_path: Path) -> None:
    assert q4kd("sabotage", *COMMON)[0] == 0
    code, out = q4kd("falsify", *COMMON, "--changed")
    assert code == 2 and "a verified bundle of profile cpu in bundles/" in out

    base = tmp_path / "bundles" / "base"
    code, out = q4kd("falsify", *COMMON, "--out", str(base))
    assert code == 0 and "re-judged" not in out and not decided(out)

    # Other words, and nothing else: everything is carried from the newest bundle there is.
    edit(tmp_path, "# Count how often", "# It is counted how often")
    code, out = q4kd("falsify", *COMMON, "--changed", "--out", "two")
    assert code == 0 and decided(out) == dict.fromkeys(("measure", "compare", "alone"), "carried")
    assert "3 re-judged from base, 0 run" in out and "3 of 3 experiments are carried, 0 are run" in out
    for run in ("measure", "compare.a", "compare.b", "alone"):
        for name in ("exit.json", "facts.json", "stdout.log"):
            assert (tmp_path / "two" / "runs" / run / name).read_bytes() == (base / "runs" / run / name).read_bytes()
    code, out = q4kd("evidence", "verify", "two")
    assert code == 0 and "3 re-judged from base, 0 run" in out
    assert "3 re-judged from base, 0 run" in (tmp_path / "two" / "findings.md").read_text()
    assert "3 re-judged from base, 0 run" in (tmp_path / "two" / "report.html").read_text()

    # One operator of one experiment: it runs, the others are carried, and where they first came from is kept.
    edit(tmp_path, 'Arm("a", command(), 30)', 'Arm("a", command(), 30 + 1)')
    archive = pack(tmp_path / "two")
    code, out = q4kd("falsify", *COMMON, "--changed", str(archive), "--out", "three")
    assert decided(out) == {"measure": "carried", "compare": "run", "alone": "carried"}
    assert "run      compare: experiment" in out and "2 re-judged from base, 1 run" in out
    origins = [
        {entry["experiment"]: (entry["bundle"], entry["name"], entry["created"]) for entry in carried}
        for carried in (
            json.loads((tmp_path / name / "findings.json").read_text())["carried"] for name in ("two", "three")
        )
    ]
    assert origins[1] == {name: origins[0][name] for name in ("measure", "alone")}
    assert q4kd("evidence", "verify", "three")[0] == 0
    assert (tmp_path / "three/runs/compare.a/exit.json").read_bytes() != (
        base / "runs/compare.a/exit.json"
    ).read_bytes()

    # Without --changed everything is run, whatever bundles there are.
    code, out = q4kd("falsify", *COMMON, "--out", "four")
    assert not decided(out) and "carried" not in json.loads((tmp_path / "four" / "findings.json").read_text())

    # A run that was taken over is the one that was recorded, also for one who seals the bundle again.
    log = tmp_path / "two" / "runs" / "alone" / "stdout.log"
    log.write_text(log.read_text() + "one line more\n")
    seal(tmp_path / "two")
    code, out = q4kd("evidence", "verify", "two")
    assert code == 1 and "carried: alone: run alone is not the one that was taken over" in out
    code, out = q4kd("falsify", *COMMON, "--changed", "two", "--out", "five")
    assert code == 2 and "expected a bundle that verifies, got mismatch" in out and not (tmp_path / "five").exists()


@pytest.fixture(scope="module")
def with_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a fake world with kill records of one claim and ``base``, the bundle of a session of it."""
    folder = tmp_path_factory.mktemp("base")
    write_world(folder)
    run_in(folder, "sabotage", *COMMON, "-k", "FT-0")
    assert run_in(folder, "falsify", *COMMON, "-k", "FT-0", "--out", "base")[0] == 2  # a selection cannot pass
    return folder


@pytest.fixture
def base(q4kd: Run, with_base: Path, tmp_path: Path) -> Path:
    for name in ("kills", "base"):
        shutil.copytree(with_base / name, tmp_path / name)
    return tmp_path / "base"


def test_a_base_is_refused_by_name(q4kd: Run, base: Path, tmp_path: Path) -> None:
    def refused(name: str, *words: str) -> None:
        code, out = q4kd("falsify", *COMMON, "--changed", name, "--out", "new")
        assert code == 2 and not (tmp_path / "new").exists(), out
        assert all(word in out for word in words), out

    def copy(name: str) -> Path:
        return Path(shutil.copytree(base, tmp_path / name))

    tampered = copy("tampered") / "runs" / "measure" / "stdout.log"
    tampered.write_text("nothing of note\n")
    refused("tampered", "a bundle that verifies", "mismatch", "changed file: runs/measure/stdout.log")

    other = copy("other")
    spoil(other / "dependencies.json", lambda value: value["machine"].update(processor="Another Processor 9"))
    seal(other)
    refused("other", "one of another machine", "Another Processor 9")

    older = copy("older")
    (older / "dependencies.json").unlink()
    seal(older)
    refused("older", "dependencies.json", "made by an older q4kd")

    hostile = copy("hostile")
    (hostile / "dependencies.json").write_text('{"format": "q4kd-dependencies/1", "machine": []}')
    seal(hostile)
    refused("hostile", "a q4kd-dependencies/1 document")
    refused("nowhere", "no such file")


def test_a_run_that_did_not_corroborate_is_run_again(q4kd: Run, base: Path, tmp_path: Path) -> None:
    out = q4kd("falsify", *COMMON, "--changed", "base", "--out", "two")[1]
    assert decided(out) == {"measure": "carried", "compare": "run", "alone": "run"}
    assert "run      alone: it is not in the base" in out
    shutil.rmtree(tmp_path / "kills")
    out = q4kd("falsify", *COMMON, "--out", "unshown")[1]
    assert "inconclusive" in out
    out = q4kd("falsify", *COMMON, "--changed", "unshown", "--out", "three")[1]
    assert decided(out) == dict.fromkeys(("measure", "compare", "alone"), "run")
    assert "run      measure: FT-0 was inconclusive there" in out


def test_other_packages_and_other_settings_are_named(q4kd: Run, base: Path) -> None:
    spoil(base / "dependencies.json", lambda value: value["packages"].update(numpy="0.1"))
    seal(base)
    out = q4kd("falsify", *COMMON, "-k", "FT-0", "--changed", "base", "--out", "two")[1]
    assert "run      measure: numpy 0.1 → " in out
    os.environ["CUDA_VISIBLE_DEVICES"] = "nothing"
    try:
        out = q4kd("falsify", *COMMON, "-k", "FT-0", "--changed", "two", "--out", "three")[1]
    finally:
        del os.environ["CUDA_VISIBLE_DEVICES"]
    assert "run      measure: environment variables" in out


def test_runs_of_two_boots_do_not_mix_without_a_word(q4kd: Run, base: Path) -> None:
    def later(value: dict[str, Any]) -> None:
        value.update(boot_id="another", boot_id_end="another")

    spoil(base / "runs" / "measure" / "exit.json", later)
    seal(base)
    code, out = q4kd("evidence", "verify", "base")
    assert code == 1 and "runs/measure: of another boot than the bundle, and not said to be carried" in out
    assert (base / MANIFEST).is_file()
