import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fakeworld.plugin import install

from q4kd.harness.claims.contract import load_contract
from q4kd.harness.judging.kills import Kills
from q4kd.harness.kill_matrix import kill_matrix
from q4kd.harness.records.store import open_store
from q4kd.harness.runs.experiment import Inputs
from q4kd.harness.runs.runner import ExperimentRunner

pytest_plugins = "pytester"
TESTS = Path(__file__).parents[1] / "support"
# They cost a session a second of importing and have nothing to do in it. Users may have them: the first tests below run
# with every plugin that is installed.
OTHERS = ("no:hypothesispytest", "no:anyio")


def entry(claim_id, *, experiment="measure", ceiling=50, sabotage="[inflate]", extra=""):
    return f"""
- id: {claim_id}
  rule: values stay low
  prediction: at most {ceiling}
  if_fails: look at the \\x1b[31mprogram
  falsifier:
    check: fake
    experiment: {experiment}
    params: {{ceiling: {ceiling}}}
    sabotage: {sabotage}
    timeout_s: 30
{extra}"""


def contract(*entries, status="active"):
    return f"metadata: {{status: {status}}}\nfalsification_tests:\n" + "".join(entries)


@pytest.fixture(scope="module")
def kills(tmp_path_factory):
    """Kill records of every claim that the tests write, made by the real matrix."""
    folder = tmp_path_factory.mktemp("kills")
    patch = pytest.MonkeyPatch()
    try:
        install(patch.setattr)
        patch.setenv("PYTHONPATH", str(TESTS))
        work = folder / "work"
        runner = ExperimentRunner(work, Inputs(folder / "inputs", "cpu"), "cpu")
        store = Kills(folder / "kills")
        for name, text in CONTRACTS.items():
            (folder / f"{name}.yaml").write_text(text)
            loaded = load_contract(folder / f"{name}.yaml")
            usable = [
                c for c in loaded.claims if c.falsifier and c.falsifier.experiment in ("measure", "compare", "slow")
            ]
            kill_matrix(usable, "cpu", store, runner, changed=True)
    finally:
        patch.undo()
    return folder / "kills"


GOOD = contract(entry("FT-A-001"), entry("FT-A-002", ceiling=60))
CONTRACTS = {
    "good": GOOD,
    "compared": contract(entry("FT-C-001", experiment="compare", sabotage="[inflate-b]")),
    "bad": contract(entry("FT-B-001", ceiling=5), entry("FT-B-002")),
    "blind": contract(entry("FT-L-001", sabotage="[harmless]")),
    "demoted": contract(entry("FT-D-001", ceiling=5), status="demoted"),
    "needy": contract(entry("FT-N-001", extra="    needs: [cuda]\n")),
    "prosaic": contract("\n- {id: FT-P-001, rule: r, prediction: p, if_fails: f}\n"),
    "broken": contract(entry("FT-H-001", experiment="unprepared"), entry("FT-H-002", experiment="unmeasured")),
    "alone": contract(entry("FT-E-001", experiment="slow"), entry("FT-E-002", experiment="slow", ceiling=60)),
    "crashing": contract(
        entry("FT-X-001").replace("{ceiling: 50}", "{ceiling: 50, crash: true}"),
        entry("FT-X-002", experiment="unstarted"),
    ),
}


@pytest.fixture
def world(pytester, monkeypatch, kills):
    monkeypatch.setenv("PYTHONPATH", str(TESTS))

    class World:
        folder = pytester.path / "claims"
        bundle = pytester.path / "bundle"

        def write(self, *names):
            self.folder.mkdir(exist_ok=True)
            for name in names:
                (self.folder / f"{name}.yaml").write_text(CONTRACTS[name])

        def run(self, *names, args=(), use=kills, without=OTHERS):
            self.write(*names)
            base = ["-p", "fakeworld.plugin", "--contracts", str(self.folder)]
            base += [word for name in without for word in ("-p", name)]
            if "cacheprovider" not in args:
                base += ["-p", "no:cacheprovider"]
            base += ["--profile", "cpu", "--bundle", str(self.bundle), "--kills", str(use)]
            return pytester.runpytest_subprocess(*base, *args)

        @property
        def findings(self):
            return json.loads((self.bundle / "findings.json").read_text())

        def verdicts(self):
            return {row["key"]: (row["verdict"], row["reason"]) for row in self.findings["findings"]}

    return World()


def test_without_contracts_the_plugin_does_nothing_and_imports_nothing(pytester, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    pytester.makepyfile("def test_a(): pass")
    result = pytester.runpytest_subprocess()
    assert result.ret == 0
    assert not (pytester.path / "bundles").exists()
    code = (
        "import sys, q4kd.harness.plugin; print([m for m in sys.modules if m.startswith(('q4kd.', 'yaml', 'numpy'))])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "['q4kd.harness', 'q4kd.harness.plugin']"


def test_corroborated_claims_make_a_green_run_and_a_whole_bundle(world):
    result = world.run("good", "compared", args=["-v"], without=())
    assert result.ret == 0
    result.stdout.fnmatch_lines(["*good::FT-A-001*PASSED*", "*claims*", "corroborated*good::FT-A-001*"])
    assert world.verdicts() == dict.fromkeys(
        ["good::FT-A-001", "good::FT-A-002", "compared::FT-C-001"], ("corroborated", None)
    )
    assert world.findings["exit_code"] == 0
    names = set(open_store(world.bundle).names())
    assert {
        "plan.json",
        "environment.json",
        "inputs.json",
        "contracts/good.yaml",
        "contracts/profiles/cpu.yaml",
        "runs/measure/exit.json",
        "runs/compare.b/facts.json",
        "sabotage/kills.json",
        "sabotage/inflate--measure.tar",
        "junit.xml",
        "ctrf.json",
        "statement.intoto.json",
        "report.html",
        "MANIFEST.sha256",
    } <= names
    assert not [name for name in names if name.startswith(".") or "/." in name]
    assert list(json.loads((world.bundle / "inputs.json").read_text())) == ["seed.txt"]


def test_a_falsified_claim_fails_with_its_counterexample(world):
    result = world.run("bad")
    assert result.ret == 1
    assert world.verdicts() == {
        "bad::FT-B-001": ("falsified", None),
        "bad::FT-B-002": ("corroborated", None),
    }
    text = result.stdout.str()
    assert "fake: falsified: measured 10 in measure, bound at most 5" in text
    assert "counterexample: measure measured 10" in text
    assert "if this fails: look at the" in text
    assert f"evidence  {world.bundle / 'runs' / 'measure'}" in text
    assert "Traceback" not in text
    assert "\x1b[31mprogram" not in text


@pytest.mark.parametrize(
    ("name", "claim", "reason"),
    [("blind", "blind::FT-L-001", "not shown to fail"), ("prosaic", "prosaic::FT-P-001", "prose")],
)
def test_an_inconclusive_claim_is_not_green(world, name, claim, reason):
    result = world.run("good", name)
    assert result.ret == 2
    assert world.verdicts()[claim] == ("inconclusive", reason)
    result.stdout.fnmatch_lines([f"{claim}: inconclusive ({reason})", "*1 failed, 2 passed*"])


def test_without_kill_records_nothing_is_corroborated(world, tmp_path):
    result = world.run("good", use=tmp_path / "none")
    assert result.ret == 2
    assert set(world.verdicts().values()) == {("inconclusive", "kill record stale")}
    assert "fault inflate: kill record stale: this fault was never run" in result.stdout.str()


def test_a_failure_of_the_harness_is_inconclusive(world):
    result = world.run("broken")
    assert result.ret == 2
    assert set(world.verdicts().values()) == {("inconclusive", "harness error")}
    assert "prepare: RuntimeError: no inputs in {inputs}" in result.stdout.str()
    assert "collect: RuntimeError: cannot measure" in result.stdout.str()


def test_a_check_that_fails_and_a_program_that_does_not_start_are_no_verdict(world):
    result = world.run("crashing")
    assert result.ret == 2
    assert set(world.verdicts().values()) == {("inconclusive", "harness error")}
    assert "measured RuntimeError: the check itself is broken" in result.stdout.str()
    assert "start: ValueError: embedded null byte" in result.stdout.str()


def test_claims_out_of_scope_are_shown_and_never_count(world):
    result = world.run("good", "needy")
    assert result.ret == 0
    result.assert_outcomes(passed=2, skipped=1)
    result.stdout.fnmatch_lines(["out of scope*needy::FT-N-001*needs cuda*"])
    assert "needy::FT-N-001" not in world.verdicts()
    scopes = {e["key"]: e["scope"] for e in json.loads((world.bundle / "plan.json").read_text())["entries"]}
    assert scopes["needy::FT-N-001"] == "out_of_scope"


def test_nothing_but_claims_out_of_scope_is_not_a_pass(world):
    assert world.run("needy").ret == 2


def test_a_demoted_contract_is_judged_and_never_gates(world):
    result = world.run("good", "demoted")
    assert result.ret == 0
    result.assert_outcomes(passed=2, xfailed=1)
    assert world.verdicts()["demoted::FT-D-001"] == ("falsified", None)


def test_a_selection_is_partial_and_cannot_pass(world):
    result = world.run("good", args=["-k", "FT-A-001"])
    result.assert_outcomes(passed=1, deselected=1)
    assert result.ret == 2
    assert world.findings["scope"] == "partial"
    assert list(world.verdicts()) == ["good::FT-A-001"]


def waive(world, claim, expires):
    path = world.folder.parent / "waivers.yaml"
    path.write_text(
        f"waivers:\n- {{claim: '{claim}', owner: Jo, reason: the fault is rewritten, expires: {expires}}}\n"
    )
    return ["--waivers", str(path)]


@pytest.mark.parametrize("workers", [[], ["-n", "2"]])
def test_a_waived_claim_is_inconclusive_in_sight_and_does_not_fail_the_gate(world, workers):
    result = world.run("good", "blind", args=[*waive(world, "blind::FT-L-001", "2999-12-31"), "-rx", *workers])
    assert result.ret == 0
    result.assert_outcomes(passed=2, xfailed=1)
    assert world.verdicts()["blind::FT-L-001"] == ("inconclusive", "not shown to fail")
    result.stdout.fnmatch_lines(["*waived by Jo until 2999-12-31: the fault is rewritten*"])
    assert "2 claims corroborated, 1 inconclusive and waived on profile cpu" in result.stdout.str()
    assert json.loads((world.bundle / "plan.json").read_text())["waivers"][0]["owner"] == "Jo"
    assert "waived by Jo until 2999-12-31" in (world.bundle / "report.html").read_text()


def test_an_expired_waiver_is_an_error_and_does_not_apply(world):
    result = world.run("good", "blind", args=waive(world, "blind::FT-L-001", "2026-01-31"))
    assert result.ret == 2
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(["error: the waiver of blind::FT-L-001 by Jo expired on 2026-01-31*"])


def test_a_falsified_claim_cannot_be_waived(world):
    result = world.run("bad", args=waive(world, "bad::FT-B-001", "2999-12-31"))
    assert result.ret == 1
    result.assert_outcomes(passed=1, failed=1)
    assert world.verdicts()["bad::FT-B-001"] == ("falsified", None)
    assert "waived" not in world.findings["findings"][0]


def test_a_waiver_of_no_claim_is_refused_before_anything_runs(world):
    result = world.run("good", args=waive(world, "good::FT-A-003", "2999-12-31"))
    assert result.ret == 4
    result.stderr.fnmatch_lines(["*waivers.yaml:2*expected contract::id of a claim*FT-A-003*"])
    assert not world.bundle.exists()


@pytest.mark.parametrize("args", [["-x"], ["--maxfail=1"]])
def test_claims_not_reached_are_not_run(world, args):
    result = world.run("broken", "good", args=args)
    assert result.ret == 2
    assert ("inconclusive", "not run") in world.verdicts().values()


def test_one_claim_by_its_id(world):
    world.write("good")
    result = world.run(args=[f"{world.folder / 'good.yaml'}::FT-A-002"])
    result.assert_outcomes(passed=1)
    assert result.ret == 2
    assert world.verdicts()["good::FT-A-001"] == ("inconclusive", "not run")


def test_collect_only_lists_and_writes_nothing(world):
    result = world.run("good", args=["--collect-only", "-q"])
    assert result.ret == 0
    result.stdout.fnmatch_lines(["good::FT-A-001", "good::FT-A-002"])
    assert not world.bundle.exists()


@pytest.mark.parametrize(
    ("expression", "ran", "out_of_scope", "code"),
    [("claim and not needs_cuda", 2, 0, 0), ("needs_cuda", 0, 1, 2)],
)
def test_markers_select_claims_and_what_is_left_out_is_not_run(world, expression, ran, out_of_scope, code):
    result = world.run("good", "needy", args=["-m", expression, "--strict-markers"])
    assert result.ret == code
    result.assert_outcomes(passed=ran, skipped=out_of_scope, deselected=3 - ran - out_of_scope)
    assert len([v for v in world.verdicts().values() if v[0] == "corroborated"]) == ran
    assert len([v for v in world.verdicts().values() if v == ("inconclusive", "not run")]) == 2 - ran


def test_last_failed_runs_only_those_and_is_not_a_pass(world):
    world.write("good", "bad")
    cache = ["-p", "cacheprovider", "--rootdir", str(world.folder.parent)]
    assert world.run(args=cache).ret == 1
    world.bundle = world.bundle.with_name("again")
    again = world.run(args=[*cache, "--lf"])
    again.assert_outcomes(failed=1)
    assert world.verdicts()["bad::FT-B-001"] == ("falsified", None)
    assert {v for k, v in world.verdicts().items() if k != "bad::FT-B-001"} == {("inconclusive", "not run")}


def test_exclusive_experiments_of_two_sessions_never_overlap(world, pytester, kills):
    world.write("alone", "good")
    base = [sys.executable, "-m", "pytest", "-p", "fakeworld.plugin", "--contracts", str(world.folder), "-n", "auto"]
    base += ["--profile", "cpu", "--kills", str(kills)]
    env = {**os.environ, "PYTEST_XDIST_AUTO_NUM_WORKERS": "2"}
    bundles = [pytester.path / "b0", pytester.path / "b1"]
    running = [subprocess.Popen([*base, "--bundle", str(b)], env=env, stdout=subprocess.PIPE) for b in bundles]
    assert [process.communicate(timeout=60)[0] and process.returncode for process in running] == [0, 0]
    spans = []
    for bundle in bundles:
        ending = json.loads((bundle / "runs" / "slow" / "exit.json").read_text())
        spans.append((ending["start_t"], ending["end_t"]))
        assert ending["wall_s"] > 0.8
    (_, first_end), (second_start, _) = sorted(spans)
    assert first_end <= second_start


def test_workers_share_one_run_and_one_bundle(world):
    result = world.run("good", "compared", "bad", args=["-n", "2"])
    assert result.ret == 1
    assert world.findings["summary"]["corroborated"] == 4
    assert sorted(path.name for path in (world.bundle / "runs").iterdir()) == ["compare.a", "compare.b", "measure"]
    pids = {json.loads((path / "exit.json").read_text())["pid"] for path in (world.bundle / "runs").iterdir()}
    assert len(pids) == 3
    assert (world.bundle / "MANIFEST.sha256").exists()
    assert not (world.bundle / ".partial").exists()


@pytest.mark.parametrize("workers", [[], ["-n", "2"]])
def test_no_code_in_the_folder_of_contracts_is_run(world, pytester, workers):
    world.write("good")
    evil = "import pathlib; pathlib.Path({!r}).write_text('ran')\ndef test_evil(): pass\n"
    mark = pytester.path / "ran"
    for name in ("conftest.py", "__init__.py", "test_evil.py", "deep/conftest.py", "deep/test_evil.py"):
        (world.folder / name).parent.mkdir(exist_ok=True)
        (world.folder / name).write_text(evil.format(str(mark)))
    (world.folder / "deep" / "good.yaml").write_text(CONTRACTS["good"])
    (world.folder / "good.yaml").unlink()
    (world.folder / ".hidden.yaml").write_text("not: [a contract")
    result = world.run(args=workers)
    assert not mark.exists()
    result.assert_outcomes(passed=2)
    assert result.ret == 0
    result.stdout.fnmatch_lines(["contracts skipped: .hidden.yaml (hidden)"])
    assert (world.bundle / "contracts" / "good.yaml").read_text() == CONTRACTS["good"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("metadata: {}\nfalsification_tests:\n- {id: A, falsifier: {check: nope}}\n", "*q4kd:*bad.yaml*"),
        (None, "*q4kd:*at least one *.yaml contract*"),
    ],
)
def test_contracts_that_do_not_load_stop_the_run(world, text, said):
    world.folder.mkdir()
    if text is not None:
        (world.folder / "bad.yaml").write_text(text)
    result = world.run()
    assert result.ret == 4
    result.stderr.fnmatch_lines([said])
    assert not world.bundle.exists()


def test_evidence_is_never_written_over(world):
    world.run("good")
    before = (world.bundle / "findings.json").read_bytes()
    assert world.run("good").ret == 4
    assert (world.bundle / "findings.json").read_bytes() == before


def test_ordinary_tests_may_run_beside_and_count_too(world, pytester):
    world.write("good")
    test = pytester.makepyfile(test_other="def test_fails(): assert 0")
    result = world.run(args=[str(world.folder), str(test)])
    assert world.findings["exit_code"] == 0
    assert result.ret == 1


def test_verify_agrees_with_the_session(world, monkeypatch):
    world.run("good", "bad", "blind", "needy", "broken")
    install(monkeypatch.setattr)
    from q4kd.harness.bundle.verify import verify_bundle

    result = verify_bundle(world.bundle, world.folder)
    assert result.problems == ()
    assert result.recomputed == 5
    exit_file = world.bundle / "runs" / "measure" / "facts.json"
    exit_file.write_text(exit_file.read_text().replace("10", "11"))
    assert verify_bundle(world.bundle).exit_code == 1


@pytest.mark.parametrize("given", [(), ("tests",)])
def test_own_tests_and_their_conftest_run_beside_the_claims(world, pytester, given):
    tests = pytester.mkdir("tests")
    (tests / "conftest.py").write_text("import pytest\n\n@pytest.fixture\ndef two():\n    return 2\n")
    (tests / "test_own.py").write_text(
        "def test_own(two):\n    assert two == 3\n\ndef test_fine(two):\n    assert two\n"
    )
    (world.folder).mkdir()
    (world.folder / "conftest.py").write_text("raise SystemExit('a conftest among the contracts was run')\n")
    (world.folder / "test_evil.py").write_text("raise SystemExit('a test among the contracts was run')\n")
    result = world.run("good", args=given)
    result.assert_outcomes(passed=3, failed=1)  # two claims and a test; a test that fails
    assert result.ret == 1
    assert set(world.verdicts().values()) == {("corroborated", None)}
    result.stdout.fnmatch_lines(["*test_own.py::test_own - assert 2 == 3*"])
