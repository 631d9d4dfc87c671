"""``nox -s mutants``: what is planted, that the checkout stays as it is, and that a blind suite is called blind."""

import ast
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from copied_sources import copy_sources
from mutants import exclusions
from mutants.clean import CleanExperiment, CleanTests
from mutants.lines import read_lines, start_recording, stop_recording
from mutants.operators import plan_mutants
from mutants.report import passes
from mutants.sample import draw, load_equivalent, population, split_equivalent
from mutants.tree import Stopped, Tree
from mutants.trial import Trial, files_shown, in_order
from small_contracts import SIZES

ROOT = Path(__file__).parents[2]
MODULE = '''"""Docstring with 3."""
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    LIMIT = 4

SIZE: int | None = 8


def scaled(values: list[float], low: float, high: float, *, by: float = 2.0) -> float:
    """Return 5."""
    total = 0.0
    for value in values:
        if value < low and not value == high:
            continue
        total += clip(low, high, key=by)
    if total > 9:
        raise ValueError(f"{total + 1}", 1 + 1)
    log(f"{total:.3f}")
    return (total if by else -total) / 2


class Point:
    def __repr__(self) -> str:
        return str(1 + 1)
'''


def changes(operator: str) -> set[tuple[str, str]]:
    return {(m.original, m.mutant) for m in plan_mutants("trainer/m.py", MODULE.encode()) if m.operator == operator}


def test_each_operator_changes_what_it_is_named_after() -> None:
    assert changes("comparison") == {
        ("value < low", "(value <= low)"),
        ("value < low", "(value >= low)"),
        ("value == high", "(value != high)"),
        ("total > 9", "(total >= 9)"),
        ("total > 9", "(total <= 9)"),
    }
    assert changes("arithmetic") == {
        ("total += clip(low, high, key=by)", "total -= clip(low, high, key=by)"),
        ("(total if by else -total) / 2", "((total if by else -total) * 2)"),
        ("-total", "(total)"),
    }
    assert changes("boolean") == {
        ("value < low and not value == high", "(value < low or not value == high)"),
        ("not value == high", "(value == high)"),
    }
    assert {change for change in changes("constant") if change[0] == "8"} == {("8", "9"), ("8", "16"), ("8", "0")}
    assert changes("dropped argument") == {("clip(low, high, key=by)", "without key=by")}
    assert changes("exchanged arguments") == {("clip(low, high, key=by)", "clip(… high, low …)")}
    condition = "value < low and not value == high"
    assert changes("branch") == {
        (condition, f"not ({condition})"),
        (condition, "False"),
        ("continue", "break"),
        ("total > 9", "not (total > 9)"),
        ("total > 9", "False"),
        ("total if by else -total", "(-total if by else total)"),
    }
    assert changes("return value") == {("(total if by else -total) / 2", "None")}
    assert changes("statement") == {
        ("total += clip(low, high, key=by)", "(dropped)"),
        ('log(f"{total:.3f}")', "(dropped)"),
    }


def test_texts_annotations_and_blocks_for_type_checkers_are_left_alone() -> None:
    lines = MODULE.splitlines()
    left = {
        n for n, line in enumerate(lines, 1) if any(w in line for w in ("3.", "LIMIT", "Return 5", "raise", "str("))
    }
    assert not left & {mutant.line for mutant in plan_mutants("trainer/m.py", MODULE.encode())}


def test_what_only_a_gpu_runs_is_left_alone_and_what_runs_elsewhere_is_not() -> None:
    device = "    if device {} 'cuda':\n        return n + 1\n"
    source = "def f(device, n):\n" + device.format("==") + device.format("!=")
    found = {(m.line, m.operator) for m in plan_mutants("trainer/m.py", source.encode())}
    assert (2, "branch") in found and (5, "arithmetic") in found and not [line for line, _ in found if line == 3]


def test_every_mutant_of_the_trainer_is_another_program_and_has_its_own_key() -> None:
    found = population(
        ROOT, ["trainer/loss/divergence.py", "trainer/data/packing.py"], [], ["trainer/loss", "trainer/data"]
    )
    assert {mutant.module for mutant in found} == {"trainer/loss/divergence.py", "trainer/data/packing.py"}
    assert len({mutant.key for mutant in found}) == len(found) > 100
    sources = {module: (ROOT / module).read_bytes() for module in {mutant.module for mutant in found}}
    for mutant in found:
        changed = mutant.apply(sources[mutant.module])
        assert changed != sources[mutant.module]
        compile(changed, mutant.module, "exec")


def test_a_draw_depends_on_the_seed_and_takes_one_variant_of_each_place() -> None:
    mutants = plan_mutants("trainer/m.py", MODULE.encode())
    first, again, other = draw(mutants, 1), draw(reversed(mutants), 1), draw(mutants, 2)
    assert first == again and [m.key for m in first] != [m.key for m in other]
    assert len({m.site for m in first}) == len(first) == len({m.site for m in mutants})
    edited = plan_mutants("trainer/m.py", MODULE.replace("SIZE: int", "MORE = 1\nSIZE: int").encode())
    assert {m.key for m in mutants} <= {m.key for m in edited}


def test_known_equivalents_are_set_aside_and_each_names_something_that_is_there() -> None:
    known = load_equivalent()
    assert all(len(reason) > 20 for reason in known.values())
    for module, function, original, mutant in known:
        there = {(m.function, m.original, m.mutant) for m in plan_mutants(module, (ROOT / module).read_bytes())}
        assert (function, original, mutant) in there, (module, function, original, mutant)
    mutants = plan_mutants("trainer/m.py", MODULE.encode())
    one = mutants[0]
    live, equal = split_equivalent(
        mutants, {(one.module, one.function, one.original, one.mutant): "the same to rounding"}
    )
    assert equal == [(one, "the same to rounding")] and len(live) == len(mutants) - 1


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a checkout whose one claim and one test see little."""
    made = tmp_path / "checkout"
    copy_sources(ROOT, made)
    for path in (made / "contracts").glob("*.yaml"):
        path.unlink()
    (made / "contracts" / "blind-v1.yaml").write_text(SIZES)
    tests = made / "tests" / "trainer" / "formats" / "blocks"
    tests.mkdir(parents=True)
    (tests / "test_layout.py").write_text(
        "import q4kd.trainer.formats.blocks.layout\n\n\ndef test_nothing():\n    assert True\n"
    )
    return made


@pytest.fixture
def tree(checkout: Path, tmp_path: Path) -> Iterator[Tree]:
    made = Tree(checkout, tmp_path / "tree", threading.Event())
    yield made
    made.remove()


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_change_is_seen_by_the_program_there_and_undone(tree: Tree, checkout: Path, tmp_path: Path) -> None:
    before, file = digests(checkout), tmp_path / "test_layout.py"
    file.write_text(
        "import subprocess, sys\n"
        "def test_size():\n"
        "    code = 'from q4kd.trainer.formats.blocks.layout import SUPERBLOCK; print(SUPERBLOCK)'\n"
        "    assert subprocess.check_output([sys.executable, '-c', code]) == b'256\\n'\n"
    )
    source = (checkout / "trainer/formats/blocks/layout.py").read_bytes()
    words = ["pytest", "-q", "-p", "no:cacheprovider", str(file)]
    changed = source.replace(b"SUPERBLOCK = 256", b"SUPERBLOCK = 255")
    assert changed != source
    with tree.changed("trainer/formats/blocks/layout.py", changed):
        assert tree.run(words, 60, tmp_path / "log").code == 1
    assert tree.run(words, 60, tmp_path / "log").code == 0
    assert digests(checkout) == before


def test_what_does_not_end_is_killed_with_its_children(tree: Tree, tmp_path: Path) -> None:
    file = tmp_path / "test_endless.py"
    file.write_text(
        "import subprocess, sys, time\n"
        "def test_endless():\n"
        "    subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
        "    time.sleep(600)\n"
    )
    ended = tree.run(["pytest", "-q", str(file)], 5, tmp_path / "log")
    assert ended.code is None and running_in(tree.path) == [tree.server.pid]
    threading.Timer(2.0, tree._stop.set).start()
    with pytest.raises(Stopped):
        tree.run(["pytest", "-q", str(file)], 60, tmp_path / "log")
    assert running_in(tree.path) == [tree.server.pid]


def running_in(folder: Path) -> list[int]:
    found = []
    for process in psutil.process_iter():
        try:
            if str(folder) in process.environ().get("PYTHONPATH", ""):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def test_executed_lines_are_recorded_of_children_too(tmp_path: Path) -> None:
    package = tmp_path / "q4kd" / "trainer"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "m.py").write_text("def f(x):\n    if x:\n        return 1\n    return 2\n\n\ndef g():\n    return 3\n")
    start_recording(tmp_path, tmp_path / "lines")
    code = "import os; os.fork() or (__import__('q4kd.trainer.m').trainer.m.f(0), os.kill(os.getpid(), 9)); os.wait()"
    run = [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"]
    subprocess.run(run, env={**os.environ, "PYTHONPATH": str(tmp_path)}, timeout=60, check=True)
    assert read_lines(tmp_path / "lines")["trainer/m.py"] == [1, 2, 4, 7]
    stop_recording(tmp_path)
    assert not (tmp_path / "sitecustomize.py").exists()


def test_the_tests_of_a_module_are_its_own_its_folders_and_those_that_import_it() -> None:
    files = files_shown(ROOT, "trainer/loss/topk.py")
    assert files[0] == "tests/trainer/loss/test_topk.py" and "tests/trainer/loss/test_fused.py" in files
    assert "tests/trainer/data/test_packing.py" not in files
    assert all((ROOT / file).is_file() for file in files)


def trial(by_claims: str, by_tests: str) -> Trial:
    where = ("k", "trainer/m.py", "f", 1, "constant", "1", "2")
    return Trial(*where, by_claims, "", "", [], by_tests, "", 0.0, 0.0)  # type: ignore[arg-type]


def test_the_exit_code_follows_the_shares() -> None:
    seen, tests_only, nobody = trial("falsified", "failed"), trial("survived", "failed"), trial("unreached", "none")
    assert passes([seen] * 9 + [tests_only]) and not passes([seen] * 8 + [tests_only] * 2)
    assert passes([seen] * 98 + [nobody] * 2) and not passes([seen] * 97 + [nobody] * 3)
    assert passes([trial("inconclusive", "timeout")]) and not passes([])


def test_a_range_of_lines_reaches_a_statement_of_several() -> None:
    run = CleanExperiment("e", ["c"], 1.0, {"trainer/m.py": [4]}, {})
    assert run.reaches("trainer/m.py", (3, 5)) and not run.reaches("trainer/m.py", (5, 6))
    assert not run.reaches("trainer/n.py", (3, 5)) and run.limit_s > 30


def session(checkout: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    words = [
        "--checkout",
        str(checkout),
        "--out",
        str(out),
        "--workers",
        "1",
        "--module",
        "trainer/formats/blocks/layout.py",
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "tests/support")}
    command = [sys.executable, "-m", "mutants", *words, *more]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_constants_said_to_change_only_speed_are_there() -> None:
    for module, names in exclusions.PERFORMANCE.items():
        stored = {
            node.id
            for statement in ast.parse((ROOT / module).read_text(encoding="utf-8")).body
            for node in ast.walk(statement)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        }
        assert names.keys() <= stored, (module, names.keys() - stored)
        planned = plan_mutants(module, (ROOT / module).read_bytes())
        lines = (ROOT / module).read_text(encoding="utf-8").splitlines()
        left = [
            m
            for m in planned
            if not m.function and set(names) & set(re.findall(r"\w+", lines[m.line - 1].partition("=")[0]))
        ]
        assert not left, left


def test_who_executes_the_line_is_asked_the_cheapest_first() -> None:
    source = b"SIZE = 1\n\n\ndef f():\n    return SIZE\n"
    [inside, outside] = [
        next(m for m in plan_mutants("trainer/m.py", source) if m.operator == kind)
        for kind in ("return value", "constant")
    ]
    imports = CleanExperiment("imports", ["c"], 1.0, {"trainer/m.py": [1, 4]}, {})
    dear = CleanExperiment("dear", ["c"], 9.0, {"trainer/m.py": [1, 4, 5]}, {})
    cheap = CleanExperiment("cheap", ["c"], 2.0, {"trainer/m.py": [1, 4, 5]}, {})
    other = CleanExperiment("other", ["c"], 0.1, {"trainer/n.py": [1, 4, 5]}, {})
    runs = [imports, dear, cheap, other]
    assert in_order(runs, inside, source) == [cheap, dear]
    assert in_order(runs, outside, source) == [cheap, dear, imports]
    tests = CleanTests("tests/test_m.py", 1.0, [], {"trainer/m.py": [1, 4]})
    assert tests.reaches(outside.module, outside.lines) and not tests.reaches(inside.module, inside.lines)


def test_a_blind_suite_is_called_blind_and_the_checkout_stays_as_it_is(checkout: Path, tmp_path: Path) -> None:
    before, out = digests(checkout), tmp_path / "out"
    shown, _ = (running := session(checkout, out, "--sample", "3")).communicate(timeout=300)
    assert running.returncode == 1, shown
    report = json.loads((out / "report.json").read_text())
    assert len(report["trials"]) == 3 and report["counts"]["nobody"] > 0, report
    blind = [
        t
        for t in report["trials"]
        if t["by_claims"] in ("survived", "unreached") and t["by_tests"] in ("survived", "none")
    ]
    assert len(blind) == report["counts"]["nobody"] and any(t["by_tests"] == "survived" for t in blind)
    text = (out / "report.md").read_text()
    assert all(f"{t['module']}:{t['line']} {t['function']}" in text for t in blind)
    assert digests(checkout) == before
    # Resumed, it plants nothing again; of other sources it refuses to be.
    again, _ = (running := session(checkout, out, "--sample", "3")).communicate(timeout=120)
    assert running.returncode == 1 and "tests survived (" not in again.split("# Mutants")[0], again
    (checkout / "trainer" / "errors.py").write_text("# another\n" + (checkout / "trainer" / "errors.py").read_text())
    other, _ = (running := session(checkout, out, "--sample", "3")).communicate(timeout=60)
    assert running.returncode == 2 and "other sources" in other


def test_an_interruption_leaves_no_process_and_keeps_what_was_found(checkout: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    running = session(checkout, out, "--sample", "3")
    trees, deadline = out / "trees", time.monotonic() + 60
    while len(running_in(trees)) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(running_in(trees)) >= 2  # what forks, and what it has forked
    running.send_signal(signal.SIGTERM)
    shown, _ = running.communicate(timeout=60)
    assert running.returncode == 130 and "the same command goes on" in shown, shown
    assert not running_in(trees)


def test_a_killed_session_takes_its_children_with_it(checkout: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    running = session(checkout, out, "--sample", "3")
    trees, deadline = out / "trees", time.monotonic() + 60
    while len(running_in(trees)) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    running.kill()
    running.wait()
    while running_in(trees) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not running_in(trees)
