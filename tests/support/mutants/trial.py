"""One mutant, planted: which claim turns, and which unit test fails."""

import ast
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mutants.clean import CleanExperiment, CleanStore, CleanTests, failed_tests, log_tail, pytest_words
from mutants.operators import CONTROL, Mutant
from mutants.tree import Tree

# What the claims said: "inconclusive" where one turned without being falsified, "unreached" where no experiment
# executes the line.
ByClaims = Literal["falsified", "inconclusive", "survived", "unreached"]
# What the tests said: "none" where no test of the module executes the line.
ByTests = Literal["failed", "timeout", "survived", "none", "not run"]


@dataclass(frozen=True)
class Trial:
    """What was seen of one mutant.

    Attributes:
        by_claims: see ``ByClaims``.
        claim, detail: the claim that decided, and what it measured.
        judged: experiments that ran.
        by_tests: see ``ByTests``.
        test: the first test that failed.
        claims_s, tests_s: seconds of both.
    """

    key: str
    module: str
    function: str
    line: int
    operator: str
    original: str
    mutant: str
    by_claims: ByClaims
    claim: str
    detail: str
    judged: list[str]
    by_tests: ByTests
    test: str
    claims_s: float
    tests_s: float

    @property
    def control(self) -> bool:
        """Whether nothing was changed."""
        return self.operator == CONTROL

    @property
    def turned(self) -> bool:
        """Whether a claim is no longer corroborated."""
        return self.by_claims in ("falsified", "inconclusive")

    @property
    def seen(self) -> bool:
        """Whether a claim or a test sees it."""
        return self.turned or self.by_tests in ("failed", "timeout")


def try_mutant(
    mutant: Mutant, tree: Tree, clean: CleanStore, experiments: Sequence[CleanExperiment], *, tests_always: bool
) -> Trial:
    """Plant a mutant in a tree and ask the claims that reach it, cheapest first, then the tests of its module that do.

    The first that turns ends the asking of claims, and the first test that fails that of tests.

    Args:
        mutant: what to plant.
        tree: a private copy, unchanged.
        clean: what the unchanged sources give.
        experiments: all of them.
        tests_always: ask the tests also where a claim turned.

    Raises:
        Stopped: when the session ends meanwhile.
    """
    source = (tree.checkout / mutant.module).read_bytes()
    reached = in_order([run for run in experiments if run.claims], mutant, source)
    with tree.changed(mutant.module, mutant.apply(source)):
        started = time.monotonic()
        by_claims, claim, detail, judged = _ask_claims(tree, clean, reached)
        claims_s = time.monotonic() - started
    by_tests: ByTests = "not run"
    test, tests_s = "", 0.0
    asked_enough = not tests_always and by_claims in ("falsified", "inconclusive")
    if mutant.operator != CONTROL and not asked_enough:
        by_tests = "none"
        for file in files_shown(tree.checkout, mutant.module):
            known = clean.tests(tree, file)  # before the change is there
            if file not in known.failing and known.reaches(mutant.module, mutant.lines):
                with tree.changed(mutant.module, mutant.apply(source)):
                    started = time.monotonic()
                    by_tests, test = _ask_tests(tree, known)
                    tests_s += time.monotonic() - started
            if by_tests in ("failed", "timeout"):
                break
    where = (mutant.key, mutant.module, mutant.function, mutant.line, mutant.operator, mutant.original, mutant.mutant)
    return Trial(*where, by_claims, claim, detail, judged, by_tests, test, round(claims_s, 1), round(tests_s, 1))


def in_order(runs: Iterable[CleanExperiment], mutant: Mutant, source: bytes) -> list[CleanExperiment]:
    """Return the experiments that execute a mutant's lines, cheapest first.

    What stands outside of functions is executed by whatever imports the module: those that also execute a function of
    it come first, because there its value is more likely to matter.
    """
    reached = [run for run in runs if run.reaches(mutant.module, mutant.lines)]
    bodies = [
        (node.body[0].lineno, node.end_lineno or 0)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    uses = {id(run): any(run.reaches(mutant.module, lines) for lines in bodies) for run in reached}
    return sorted(reached, key=lambda run: (not uses[id(run)], run.seconds))


def _ask_claims(
    tree: Tree, clean: CleanStore, reached: Sequence[CleanExperiment]
) -> tuple[ByClaims, str, str, list[str]]:
    if not reached:
        return "unreached", "", "", []
    rows = clean.judge(tree, [clean.request(run.name, run.claims, run.limit_s) for run in reached], stop=True)
    judged = list(dict.fromkeys(str(row["experiment"]) for row in rows))
    turned = sorted(
        (row for row in rows if row["verdict"] != "corroborated"), key=lambda row: row["verdict"] != "falsified"
    )
    if turned:
        verdict: ByClaims = "falsified" if turned[0]["verdict"] == "falsified" else "inconclusive"
        return verdict, str(turned[0]["claim"]), f"{turned[0]['reason']} {turned[0]['detail']}".strip(), judged
    if len(judged) < len(reached):  # the harness itself ended: on these sources no claim is corroborated
        return "inconclusive", reached[len(judged)].claims[0], log_tail(tree.folder / "judge.log"), judged
    return "survived", "", "", judged


def _ask_tests(tree: Tree, known: CleanTests) -> tuple[ByTests, str]:
    deselected = [word for name in known.failing for word in ("--deselect", name)]
    log = tree.folder / "tests.log"
    ended = tree.run(pytest_words([known.file], "-x", *deselected), 60.0 + 5.0 * known.seconds, log)
    if ended.code is None:
        return "timeout", ""
    if ended.code in (0, 5):
        return "survived", ""
    return "failed", next(iter(failed_tests(log)), log_tail(log))


def files_shown(checkout: Path, module: str) -> list[str]:
    """Return the test files that a mutant of a module is shown to: its own, its folder's, and those that import it."""
    place = Path(module)
    folder = Path("tests") / place.parent
    own = folder / f"test_{place.stem}.py"
    beside = sorted(path.relative_to(checkout) for path in (checkout / folder).glob("test_*.py"))
    imported = f"q4kd.{'.'.join(place.with_suffix('').parts)}"
    home, _, name = imported.rpartition(".")
    words = (f"{imported} import", f"import {imported}\n", f"from {home} import {name}\n", f'"{imported}')
    elsewhere = [
        path.relative_to(checkout)
        for path in sorted((checkout / "tests/trainer").rglob("test_*.py"))
        if path.parent != checkout / folder and any(word in path.read_text(encoding="utf-8") for word in words)
    ]
    files = [*([own] if own in beside else []), *(path for path in beside if path != own), *elsewhere]
    return [path.as_posix() for path in files]


def read_trials(path: Path) -> list[Trial]:
    """Return the trials that a session has written, the last line of a session that was killed perhaps cut."""
    trials = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            trials.append(Trial(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return trials
