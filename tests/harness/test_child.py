import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from q4kd.harness.runs import faults as registry
from q4kd.harness.runs.faults import (
    VOID_EXIT,
    Fault,
    MissingTarget,
    fault,
    patch,
    plant,
    register,
    replace,
    resolve,
)

TESTS = str(Path(__file__).parents[1] / "support")


def child(folder, *arguments, module="fakeworld.launch", env=None):
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": TESTS, **(env or {})},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_without_a_fault_the_program_runs_as_it_is(tmp_path):
    done = child(tmp_path, "--", "probe", "fake", "x")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("measured 10 in")


def test_a_fault_changes_the_program_and_only_by_its_option(tmp_path):
    assert child(tmp_path, "--fault", "inflate", "--", "probe", "fake").stdout.startswith("measured 100 ")
    stray = {"Q4KD_FAULT": "inflate", "FAULT": "inflate", "Q4KD_SABOTAGE": "inflate"}
    assert child(tmp_path, "--", "probe", "fake", env=stray).stdout.startswith("measured 10 ")


def test_an_unknown_fault_names_the_known_ones(tmp_path):
    done = child(tmp_path, "--fault", "inflat", "--", "probe", "fake")
    assert done.returncode == 2
    assert "did you mean inflate?" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("absent", "VOID: fakeworld.program:gone missing"),
        ("forgets", "VOID: fakeworld.program:measured missing"),
        ("breaks", "VOID: breaks could not be planted: RuntimeError: cannot plant"),
    ],
)
def test_a_fault_that_tests_nothing_is_void_before_anything_runs(tmp_path, fault, said):
    done = child(tmp_path, "--fault", fault, "--", "probe", "fake")
    assert done.returncode == VOID_EXIT
    assert done.stderr == said + "\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["probe", "fake"],
        ["--"],
        ["--fault", "--", "probe"],
        ["--fault", "a", "b", "--", "x"],
        ["-x", "a", "--", "x"],
    ],
)
def test_anything_but_the_one_form_is_refused(tmp_path, arguments):
    done = child(tmp_path, *arguments)
    assert done.returncode == 2
    assert "expected [--fault NAME] -- ARGUMENTS" in done.stderr


def test_an_unknown_probe_is_refused(tmp_path):
    done = child(tmp_path, "--", "probe", "fak")
    assert done.returncode == 2
    assert "expected one of: fake" in done.stderr


def test_a_run_hears_what_nohup_and_a_background_ignore(tmp_path):
    (tmp_path / "told.py").write_text(
        "import signal as s; print([s.getsignal(n) is s.SIG_IGN for n in (s.SIGINT, s.SIGHUP)])"
    )
    command = [sys.executable, "-m", "q4kd.harness.child", "--", "module", "told"]
    code = (
        "import signal, subprocess, sys\n"
        "for number in (signal.SIGINT, signal.SIGHUP): signal.signal(number, signal.SIG_IGN)\n"
        f"sys.exit(subprocess.run({command!r}).returncode)"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[False, False]"


def test_the_child_dies_with_its_supervisor(tmp_path):
    code = f"""
import subprocess, sys
command = [sys.executable, "-m", "fakeworld.launch", "--", "probe", "fake", "hang"]
child = subprocess.Popen(command, cwd={str(tmp_path)!r})
print(child.pid, flush=True)
child.wait()
"""
    env = {**os.environ, "PYTHONPATH": TESTS}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=env) as supervisor:
        pid = int(supervisor.stdout.readline())
        wait_for((tmp_path / "events.jsonl").exists)
        assert psutil.pid_exists(pid)
        supervisor.kill()
    assert wait_for(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def original():
    return 1


class Thing:
    @staticmethod
    def static():
        return 1

    @classmethod
    def made(cls):
        return cls.__name__

    def plain(self):
        return 1


class Heir(Thing):
    pass


HERE = __name__


def test_replace_reaches_functions_methods_and_copies(monkeypatch):
    import q4kd.harness.runs.exit_cause as holder

    here = sys.modules[HERE]
    monkeypatch.setattr(here, "original", original)
    monkeypatch.setattr(holder, "a_copy", original, raising=False)
    before = original
    replace(f"{HERE}:original", lambda function: lambda: function() + 1)
    assert here.original() == 2
    assert holder.a_copy() == 2  # `from x import f` binds a copy
    assert before() == 1
    for name in ("static", "made", "plain"):
        monkeypatch.setattr(Thing, name, vars(Thing)[name])
    replace(f"{HERE}:Thing.static", lambda function: lambda: function() + 1)
    replace(f"{HERE}:Thing.made", lambda function: lambda cls: function(cls) + "!")
    replace(f"{HERE}:Thing.plain", lambda function: lambda self: function(self) + 1)
    assert (Thing.static(), Thing().static(), Thing.made(), Thing().plain()) == (2, 2, "Thing!", 2)


@pytest.mark.parametrize(
    "target",
    [
        "no.such.module:f",
        "q4kd.harness.runs.exit_cause:nothing",
        "q4kd.harness.runs.exit_cause:KernelLog.nothing",
        "q4kd.harness.runs.exit_cause:nothing.below",
        f"{HERE}:Heir.plain",  # inherited: it belongs to Thing
    ],
)
def test_a_missing_target_is_named(target):
    with pytest.raises(MissingTarget) as caught:
        resolve(target)
    assert caught.value.target == target


@pytest.fixture
def empty_registry(monkeypatch):
    monkeypatch.setattr(registry, "_FAULTS", {})


def test_the_registry_is_closed_to_mistakes(empty_registry):
    fault = Fault("a", "t", "loss", ("m:f",), lambda: None)
    assert register(fault) is fault
    with pytest.raises(ValueError, match="twice"):
        register(Fault("a", "other", "loss", ("m:f",), lambda: None))
    with pytest.raises(ValueError, match="unknown family"):
        register(Fault("b", "t", "weather", ("m:f",), lambda: None))
    for targets in ((), ("m.f",), ("a:b:c",)):
        with pytest.raises(ValueError, match="needs targets"):
            register(Fault("c", "t", "loss", targets, lambda: None))


def test_no_target_is_touched_unless_all_exist(monkeypatch):
    here = sys.modules[HERE]
    monkeypatch.setattr(here, "original", original)
    targets = (f"{HERE}:original", f"{HERE}:nothing")
    with pytest.raises(MissingTarget):
        plant(Fault("x", "t", "loss", targets, lambda: replace(targets[0], lambda _: lambda: 9)))
    assert here.original() == 1


def test_a_patch_stands_in_for_each_target_and_in_tables_of_them(monkeypatch):
    here = sys.modules[HERE]
    monkeypatch.setattr(registry, "_FAULTS", {})
    monkeypatch.setattr(here, "original", original)
    monkeypatch.setattr(here, "TABLE", {"it": original, "other": len}, raising=False)

    @patch("loss", "tenfold", "gives ten times as much", f"{HERE}:original", f"{HERE}:TABLE", arms=(None, "a"))
    def tenfold(real, *arguments, **options):
        return 10 * real(*arguments, **options)

    planted = registry._FAULTS["tenfold"]
    assert (planted.targets, planted.arms) == ((f"{HERE}:original", f"{HERE}:TABLE"), (None, "a"))
    plant(planted)
    assert here.original() == here.TABLE["it"]() == 10
    assert here.TABLE["other"] is len
    assert tenfold(lambda: 7) == 70


def test_a_declared_fault_plants_by_the_decorated_function(monkeypatch):
    here = sys.modules[HERE]
    monkeypatch.setattr(registry, "_FAULTS", {})
    monkeypatch.setattr(here, "original", original)

    @fault("loss", "nine", "gives nine", f"{HERE}:original", declared_exit=("stalled",))
    def nine():
        replace(f"{HERE}:original", lambda _real: lambda: 9)

    assert registry._FAULTS["nine"].declared_exit == ("stalled",)
    plant(registry._FAULTS["nine"])
    assert here.original() == 9
    with pytest.raises(ValueError, match="targets of the form"):
        fault("loss", "targetless", "breaks nothing")(nine)


def test_a_missing_fault_module_is_an_error(monkeypatch):
    monkeypatch.setattr(registry, "subject_modules", lambda kind: (f"q4kd.harness.subjects.no_such_{kind}",))
    with pytest.raises(ModuleNotFoundError):
        registry.all_faults()
