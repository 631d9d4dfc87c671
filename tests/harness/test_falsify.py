import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from q4kd.harness import falsify as module
from q4kd.harness.falsify import exit_code, falsify, new_bundle_path, pytest_command, refuse_used
from q4kd.trainer.errors import InputError

TESTS = str(Path(__file__).parents[1] / "support")
CONTRACT = """
metadata: {status: active}
falsification_tests:
- id: FT-1
  rule: values stay low
  prediction: at most CEILING
  if_fails: look
  falsifier:
    check: fake
    experiment: EXPERIMENT
    params: {ceiling: CEILING}
    sabotage: [inflate]
"""
# The real commands, in the fake world: pytest gets its plugin, and so does this process.
CODE = """
import sys
from pathlib import Path
from fakeworld.plugin import install
install()
from q4kd.harness import falsify
from q4kd.harness.__main__ import main
real = falsify.pytest_command
falsify.pytest_command = lambda *args: [*real(*args), "-p", "fakeworld.plugin"]
import q4kd.harness.cli.main as entry
entry.COMMAND_MODULES = ("q4kd.harness.cli.falsify",)
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def q4kd(tmp_path, monkeypatch):
    (tmp_path / "claims").mkdir()
    write(tmp_path)

    def call(*arguments, wait=True):
        command = [sys.executable, "-c", CODE, *arguments]
        env = {**os.environ, "PYTHONPATH": TESTS, "PYTEST_ADDOPTS": "--no-such-option", "PYTEST_PLUGINS": "no_such"}
        process = subprocess.Popen(
            command, cwd=tmp_path, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        if not wait:
            return process
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    return call


def write(folder, ceiling=50, experiment="measure"):
    text = CONTRACT.replace("CEILING", str(ceiling)).replace("EXPERIMENT", experiment)
    (folder / "claims" / "c.yaml").write_text(text)


COMMON = ("--contracts", "claims", "--profile", "cpu", "--kills", "kills")


def test_sabotage_then_falsify_then_a_broken_promise(q4kd, tmp_path):
    code, out, _ = q4kd("sabotage", *COMMON)
    assert code == 0
    assert "1 caught" in out
    code, out, _ = q4kd("sabotage", "--changed", *COMMON)
    assert code == 0
    assert "caught (record)" in " ".join(out.split())

    code, out, err = q4kd("falsify", *COMMON, "--out", "b0")
    assert (code, err) == (0, "")
    assert "verify it with: q4kd evidence verify b0" in out
    assert "corroborated" in out  # pytest's own output is streamed
    code, out, _ = q4kd("falsify", *COMMON, "--out", "b1", "--workers", "1")
    assert code == 0

    code, _, err = q4kd("falsify", *COMMON, "--out", "b1")
    assert code == 2
    assert err.count("\n") == 1
    assert "a new or empty folder" in err

    write(tmp_path, ceiling=5)
    code, out, _ = q4kd("falsify", *COMMON, "--out", "b2")
    assert code == 1
    assert "counterexample" in out
    write(tmp_path, ceiling=70)
    assert q4kd("falsify", *COMMON, "--out", "b3")[0] == 2  # a new bound: the kill record is stale
    findings = json.loads((tmp_path / "b3" / "findings.json").read_text())
    assert findings["findings"][0]["reason"] == "kill record stale"


def test_a_missed_fault_fails_the_matrix(q4kd, tmp_path):
    write(tmp_path, ceiling=1000)
    code, out, _ = q4kd("sabotage", *COMMON)
    assert code == 1
    assert "1 missed" in out


def test_a_selection_that_matches_nothing_is_not_a_pass(q4kd):
    assert q4kd("falsify", *COMMON, "--out", "b", "-k", "nothing")[0] == 2
    code, _, err = q4kd("sabotage", *COMMON, "-k", "nothing")
    assert code == 2
    assert "no claim in scope names a fault" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--contracts", "nowhere"), "nowhere: expected a folder of contracts"),
        (("--contracts", "claims", "--profile", "abacus"), "--profile: expected one of"),
        (("--contracts", "claims", "--profile", "cpu", "--workers", "-1"), "--workers: expected 0 to 256"),
    ],
)
def test_bad_options_are_one_line(q4kd, arguments, said):
    code, _, err = q4kd("falsify", *arguments)
    assert code == 2
    assert said in err
    assert err.count("\n") == 1


def test_a_termination_leaves_no_process_behind(q4kd, tmp_path):
    write(tmp_path, experiment="hang")
    (tmp_path / "fast").write_text("")
    process = q4kd("falsify", *COMMON, "--out", "b", wait=False)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("b/runs/hang/events.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.02)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode in (2, 130)
    _, alive = psutil.wait_procs(family, timeout=10)
    assert len(family) >= 1
    assert alive == []


@pytest.mark.parametrize(
    ("findings", "status", "code"),
    [
        ({"exit_code": 0}, 0, 0),
        ({"exit_code": 1}, 1, 1),
        ({"exit_code": 2}, 2, 2),
        ({"exit_code": 2}, 5, 2),
        ({"exit_code": 0}, 3, 2),  # pytest broke after the findings were written
        ({"exit_code": 0}, -9, 2),
        ({"exit_code": 1}, -9, 1),
        ({"exit_code": 7}, 0, 2),
        ({}, 0, 2),
        ([], 0, 2),
        (None, 0, 2),
        (None, 4, 2),
    ],
)
def test_the_exit_code_is_that_of_the_findings(tmp_path, findings, status, code):
    if findings is not None:
        (tmp_path / "findings.json").write_text(json.dumps(findings))
    assert exit_code(tmp_path, status) == code


def test_pytest_gets_no_conftest_no_cache_and_no_foreign_plugin(tmp_path):
    command = pytest_command(tmp_path, "cpu", "FT", tmp_path / "b", 0, None, tmp_path / "pytest.ini")
    assert "--noconftest" in command
    assert command[command.index("-c") + 1] == str(tmp_path / "pytest.ini")
    assert command[command.index("-k") + 1] == "FT"
    assert "xdist.plugin" not in command
    command = pytest_command(tmp_path, "cpu", None, tmp_path / "b", 2, None, tmp_path / "pytest.ini")
    assert command[command.index("--run-workers") + 1] == "2"


def test_a_bundle_folder_must_be_new_or_empty(tmp_path):
    assert refuse_used(tmp_path / "new") == tmp_path / "new"
    assert refuse_used(tmp_path) == tmp_path
    (tmp_path / "x").write_text("")
    for used in (tmp_path, tmp_path / "x"):
        with pytest.raises(InputError):
            refuse_used(used)


def test_bundle_names_are_distinct():
    assert new_bundle_path("cpu") != new_bundle_path("cpu")
    assert "-cpu-" in new_bundle_path("cpu").name


def test_an_unusable_contract_stops_before_pytest(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_run", lambda command: pytest.fail("pytest was started"))
    (tmp_path / "c.yaml").write_text("falsification_tests: [")
    with pytest.raises(InputError):
        falsify(tmp_path, "cpu", None, tmp_path / "out", 0)


def test_a_bundle_can_be_signed_as_it_is_made(q4kd, tmp_path):
    key = Ed25519PrivateKey.generate()
    (tmp_path / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "key.pub").write_bytes(public)
    assert q4kd("sabotage", *COMMON)[0] == 0
    code, out, _ = q4kd("falsify", *COMMON, "--out", "b", "--sign", "key.pem")
    assert code == 0 and "signed by SHA256:" in out
    assert (tmp_path / "b" / "statement.dsse.json").is_file()
    code, _, err = q4kd("falsify", *COMMON, "--out", "c", "--sign", "key.pub")
    assert code == 2 and "name the private one" in err and not (tmp_path / "c").exists()
