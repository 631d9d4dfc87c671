"""A night, end to end on the cpu profile with small files: killed half way and taken up, never two, bounded disk."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import psutil
import pytest
from filelock import FileLock

from q4kd.harness.claims.profile import load_profile
from q4kd.harness.cli.nightly import unit_text
from q4kd.harness.nightly import disk as nightly_disk
from q4kd.harness.nightly.disk import Bounds, is_green, needed_memory, packed_in, preflight, prune_bundles
from q4kd.harness.nightly.state import Night, read_night, take_up
from q4kd.harness.runs.user_inputs import GivenFiles
from q4kd.trainer.demo import student_path, teacher_path
from q4kd.trainer.errors import InputError

TESTS = str(Path(__file__).parents[2] / "support")
CONTRACT = """
falsification_tests:
- id: FT-1
  rule: values stay low
  prediction: at most 50
  if_fails: look
  falsifier: {check: fake, experiment: EXPERIMENT, params: {ceiling: 50}, sabotage: [inflate]}
"""
# The real command in the fake world; so are its stages.
CODE = """
import sys
from fakeworld.plugin import install
install()
from q4kd.harness import falsify
from q4kd.harness.nightly import stage as nightly_stage
from q4kd.harness.__main__ import main
real = falsify.pytest_command
falsify.pytest_command = lambda *args: [*real(*args), "-p", "fakeworld.plugin"]
nightly_stage.COMMAND = (sys.executable, __file__)
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def night(tmp_path: Path):
    """Start ``q4kd nightly`` in the fake world, with its own folder of locks so that no other night is met."""
    (tmp_path / "claims").mkdir()
    (tmp_path / "tmp").mkdir()
    script = tmp_path / "q4kd_fake.py"
    script.write_text(CODE)

    def start(experiment: str = "measure", *options: str) -> subprocess.Popen[str]:
        (tmp_path / "claims" / "c.yaml").write_text(CONTRACT.replace("EXPERIMENT", experiment))
        command = [sys.executable, str(script), "nightly", "--profile", "cpu", "--contracts", "claims", "--out", "out"]
        given = ["--teacher", str(teacher_path()), "--student", str(student_path())]
        env = {**os.environ, "PYTHONPATH": TESTS, "XDG_RUNTIME_DIR": str(tmp_path / "tmp"), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [*command, *given, *options],
            cwd=tmp_path,
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    return start


def state(folder: Path) -> dict:
    path = folder / "out" / "state.json"
    return json.loads(path.read_text()) if path.exists() else {"stages": {}}


def test_a_night_killed_half_way_is_taken_up_and_not_repeated(night, tmp_path: Path) -> None:
    process = night("slow")
    deadline = time.monotonic() + 60
    while "sabotage" not in state(tmp_path)["stages"]:  # the second stage has begun when the first is recorded
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    stages = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert list(state(tmp_path)["stages"]) == ["sabotage"]

    out, err = (second := night("slow")).communicate(timeout=90)
    assert second.returncode == 0, out + err
    assert not [child for child in stages if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    assert "goes on after sabotage" in out
    assert "[sabotage] finished before, code 0" in out
    recorded = state(tmp_path)
    assert set(recorded["stages"]) == {"sabotage", "falsify", "bundle", "verify", "index"}
    assert {entry["code"] for entry in recorded["stages"].values()} == {0}
    assert len(recorded["boots"]) == 1 and recorded["boots"][0]
    (bundle,) = (tmp_path / "out" / "bundles").glob("*.tar.xz")
    assert is_green(bundle)
    with tarfile.open(bundle) as archive:
        plan, inputs = (json.load(archive.extractfile(name)) for name in ("plan.json", "inputs.json"))
        text = b"".join(archive.extractfile(member).read() for member in archive if member.isfile()).decode(
            "utf-8", "replace"
        )
    assert plan["given"] == {"teacher": teacher_path().name, "student": "student"}
    assert f"given/teacher/{teacher_path().name}" in inputs
    assert str(teacher_path().parent) not in text
    assert list((tmp_path / "out" / "work").iterdir()) == []
    assert bundle.name.removesuffix(".tar.xz") in (tmp_path / "out" / "site" / "index.html").read_text()
    assert (tmp_path / "out" / "kills" / "cpu" / "records.json").is_file()

    out, err = (third := night("slow")).communicate(timeout=60)
    assert third.returncode == 0, out + err
    assert "nothing left to do" in out
    assert len(list((tmp_path / "out" / "bundles").glob("*.tar.xz"))) == 1


def test_a_night_told_to_stop_ends_its_stage_and_remembers_nothing_of_it(night, tmp_path: Path) -> None:
    process = night("hang")
    deadline = time.monotonic() + 60
    while not (tmp_path / "out" / "work").exists() or not list((tmp_path / "out" / "work").rglob("stdout.log")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    stages = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "q4kd: interrupted\n")
    assert stages and not [child for child in stages if child.is_running()]
    assert state(tmp_path)["stages"] == {}


def test_a_killed_night_leaves_no_stage_that_goes_on(night, tmp_path: Path) -> None:
    process = night("slow")
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out").rglob("stdout.log")):  # the first planted fault runs
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    stages = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(stages, timeout=60)
    assert stages and not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]
    assert not list((tmp_path / "out").rglob("records.json"))  # it did not live to write what it saw


def test_another_code_or_contract_is_another_night(tmp_path: Path) -> None:
    from q4kd.harness.nightly.night import NightlyOptions, night_key

    def key() -> dict:
        bounds, given = Bounds(keep=1, max_bytes=1), GivenFiles()
        options = {"out": tmp_path, "profile": "cpu", "contracts": tmp_path, "given": given, "bounds": bounds}
        return night_key(NightlyOptions(**options, faults="all"))

    (tmp_path / "c.yaml").write_text(CONTRACT)
    before = key()
    assert key() == before and len(before["code"]) == 64
    (tmp_path / "c.yaml").write_text(CONTRACT.replace("50", "51"))
    assert key()["contracts"] != before["contracts"]


def test_the_exit_code_is_that_of_falsify_and_the_log_has_times(night, tmp_path: Path) -> None:
    out, err = (process := night("compare", "--sabotage", "none")).communicate(timeout=90)
    # No kill record, so no one has shown that the falsifier can fail.
    assert process.returncode == 2, out + err
    assert state(tmp_path)["stages"]["falsify"]["code"] == 2
    assert state(tmp_path)["stages"]["verify"]["code"] == 0
    (log,) = (tmp_path / "out" / "logs").glob("*.log")
    lines = log.read_text().splitlines()
    assert all(line[4] == "-" and line[19:22] == "Z [" for line in lines)
    assert any("[preflight] nothing is missing" in line for line in lines)


def test_never_two_at_once(night, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for lock in (tmp_path / "out" / ".nightly.lock", tmp_path / "tmp" / "q4kd-nightly.lock"):
        with FileLock(lock):
            out, err = (process := night()).communicate(timeout=60)
        assert process.returncode == 2
        assert "another that runs" in err and err.count("\n") == 1
        assert out == ""


def test_a_night_is_taken_up_only_when_it_is_the_same_work() -> None:
    noon = 1_780_000_000.0 - 1_780_000_000.0 % 86400 + 43200
    old = Night(key={"commit": "a"}, name="n1", started=noon, stages={"falsify": {"code": 1}}, boots=["x"])
    assert take_up(old, {"commit": "a"}, "n2", "index", noon + 3600).name == "n1"
    assert take_up(old, {"commit": "a"}, "n2", "index", noon + 23 * 3600).name == "n1"  # cut off, past midnight
    assert take_up(old, {"commit": "b"}, "n2", "index", noon + 3600).name == "n2"
    assert take_up(old, {"commit": "a"}, "n2", "index", noon + 25 * 3600).name == "n2"
    assert take_up(old, {"commit": "a"}, "n2", "index", noon - 10).name == "n2"
    finished = Night(key=old.key, name="n1", started=noon, stages={"index": {"code": 0}})
    assert take_up(finished, old.key, "n2", "index", noon + 3600).name == "n1"
    assert take_up(finished, old.key, "n2", "index", noon + 20 * 3600).name == "n2"
    assert take_up(None, old.key, "n2", "index", noon).stages == {}


@pytest.mark.parametrize(
    "text",
    ["[]", "{}", '{"schema": "q4kd-nightly/1", "key": {}, "name": "../x", "started": 1, "stages": {}, "boots": []}'],
)
def test_a_spoilt_state_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(InputError, match="remove it"):
        read_night(tmp_path / "state.json")


def bundle(folder: Path, name: str, code: int | None) -> Path:
    path = folder / f"{name}.tar.gz"
    source = folder / "findings.json"
    source.write_text(json.dumps({"exit_code": code}) if code is not None else "not json")
    with tarfile.open(path, "w:gz") as archive:
        archive.add(source, "findings.json")
    source.unlink()
    return path


def test_old_bundles_go_but_never_the_last_green_one(tmp_path: Path) -> None:
    codes = {"1": 0, "2": 0, "3": 1, "4": None, "5": 2}
    paths = {name: bundle(tmp_path, name, code) for name, code in codes.items()}
    assert [is_green(path) for path in paths.values()] == [True, True, False, False, False]
    assert prune_bundles(packed_in(tmp_path), Bounds(keep=5, max_bytes=10**9)) == []
    assert prune_bundles(packed_in(tmp_path), Bounds(keep=3, max_bytes=10**9)) == [paths["1"], paths["3"]]
    assert prune_bundles(packed_in(tmp_path), Bounds(keep=3, max_bytes=1)) == [paths["4"]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2.tar.gz", "5.tar.gz"]
    (tmp_path / "6.tar.xz").write_bytes(b"newer than all, in the format of today")
    assert prune_bundles(packed_in(tmp_path), Bounds(keep=2, max_bytes=10**9)) == [paths["5"]]


def test_a_night_leaves_what_is_not_a_nights(night, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name in ("work/thesis/a.txt", "logs/app1.log", "logs/app2.log", "bundles/b1.tar.gz", "bundles/b2.tar.gz"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("years of work")
    for _ in range(2):
        said, err = (process := night("measure", "--keep", "1", "--again")).communicate(timeout=120)
        assert process.returncode == 0, said + err
    assert len([path for path in out.rglob("*") if path.is_file() and path.read_bytes() == b"years of work"]) == 5
    assert len(list((out / "bundles").glob("*.tar.xz"))) == 1  # its own of before was pruned
    assert (out / "site" / "index.html").is_file() and (out / "kills" / "cpu" / "records.json").is_file()
    (out / "site" / "index.html").write_text("a page of mine")
    _, err = (process := night("measure", "--again")).communicate(timeout=60)
    assert process.returncode == 2
    assert (
        "site/index.html: expected nothing, or what q4kd made, got a file that was changed since q4kd wrote it" in err
    )
    assert (out / "site" / "index.html").read_text() == "a page of mine"


def test_preflight_names_what_a_night_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = GivenFiles(teacher=teacher_path(), student=student_path())
    assert needed_memory(given, cuda=True) > needed_memory(GivenFiles(), cuda=True) + teacher_path().stat().st_size
    monkeypatch.setattr(nightly_disk.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1 << 30}))
    found = {line.subject: line for line in preflight(load_profile("gb10"), given, tmp_path)}
    assert found["disk"].state == "missing" and "--out" in found["disk"].remedy
    assert found["profile"].state == "missing"
    assert found["teacher"].found == teacher_path().name
    smaller = {line.subject: line for line in preflight(load_profile("cpu"), GivenFiles(), tmp_path)}
    assert smaller["profile"].state == "ok"


def test_a_night_that_lacks_something_does_not_begin(night, tmp_path: Path) -> None:
    out, _ = (process := night("measure", "--profile", "gb10")).communicate(timeout=60)
    assert process.returncode == 2
    assert "[preflight] missing:" in out and "profile" in out
    assert state(tmp_path)["stages"] == {}


@pytest.mark.parametrize("kind", ["service", "timer"])
def test_the_units_are_whole(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    from q4kd.harness.__main__ import build_parser, main

    assert main(["nightly", "--print-unit", kind]) == 0
    assert capsys.readouterr().out == unit_text(kind)
    sections: dict[str, list[tuple[str, str]]] = {}
    for line in unit_text(kind).splitlines():
        if line.startswith("["):
            sections[line.strip("[]")] = current = []
        elif line and not line.startswith("#"):
            key, separator, value = line.partition("=")
            assert separator and key.isalpha()
            current.append((key, value))
    assert set(sections) == ({"Unit", "Service"} if kind == "service" else {"Unit", "Timer", "Install"})
    if kind == "service":
        service = dict(sections["Service"])
        words = service["ExecStart"].split()
        assert words[0].endswith("/bin/q4kd")
        args = build_parser().parse_args(words[1:])
        assert (args.profile, args.sabotage) == ("gb10", "all")
        # SIGTERM to every process at once would be recorded as stages that ended.
        assert service["KillMode"] == "mixed"
    else:
        assert ("Persistent", "true") in sections["Timer"]


def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    import shutil

    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed")
    for kind in ("service", "timer"):
        text = unit_text(kind)
        if kind == "service":  # the paths are the user's
            line = next(line for line in text.splitlines() if line.startswith("ExecStart="))
            text = text.replace(line.split()[0], f"ExecStart={sys.executable}")
        (tmp_path / f"q4kd-nightly.{kind}").write_text(text)
    units = [str(tmp_path / f"q4kd-nightly.{kind}") for kind in ("service", "timer")]
    env = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    done = subprocess.run(
        [analyze, "--user", "--man=no", "verify", *units], capture_output=True, text=True, timeout=60, env=env
    )
    told = [line for line in done.stderr.splitlines() if "q4kd-nightly" in line]
    if done.returncode and not told:
        pytest.skip(f"systemd-analyze does not work here: {done.stderr.strip()[:120]}")
    assert done.returncode == 0, done.stderr
    assert told == []
