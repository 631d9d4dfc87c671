"""Which mutants a session plants: those of the modules that claims name, in an order that a seed decides."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

from mutants import exclusions
from mutants.clean import CleanExperiment
from mutants.operators import Mutant, plan_mutants

EQUIVALENT = Path(__file__).with_name("equivalent.json")


def population(
    checkout: Path, named: Iterable[str], experiments: Sequence[CleanExperiment], patterns: Sequence[str]
) -> list[Mutant]:
    """Return every mutant of the modules in scope, by module and place.

    In scope is a module that a planted fault names, or in whose functions an experiment executes a line.

    Args:
        checkout: root of the sources.
        named: modules that faults name.
        experiments: what experiments execute.
        patterns: only modules that match one of these, such as ``trainer/loss`` or ``trainer/*/sums.py``; empty means
            all.
    """
    faulted, found = set(named), []
    for path in sorted((checkout / "trainer").rglob("*.py")):
        module = path.relative_to(checkout).as_posix()
        if exclusions.why_not(module) is not None or not _matches(module, patterns):
            continue
        mutants = plan_mutants(module, path.read_bytes())
        inside = [mutant.lines for mutant in mutants if mutant.function]
        if module in faulted or any(run.reaches(module, lines) for run in experiments for lines in inside):
            found += mutants
    return found


def _matches(module: str, patterns: Sequence[str]) -> bool:
    return not patterns or any(fnmatch(module, pattern) or module.startswith(f"{pattern}/") for pattern in patterns)


def draw(mutants: Iterable[Mutant], seed: int) -> list[Mutant]:
    """Return one mutant of each place and kind, in an order that depends on the seed and on each mutant alone."""

    def rank(mutant: Mutant) -> str:
        return hashlib.sha256(f"{seed} {mutant.key}".encode()).hexdigest()

    chosen: dict[tuple[str, int, int, str], Mutant] = {}
    for mutant in sorted(mutants, key=rank):
        chosen.setdefault(mutant.site, mutant)
    return list(chosen.values())


def load_equivalent(path: Path = EQUIVALENT) -> dict[tuple[str, str, str, str], str]:
    """Return the reasons why mutants change nothing, by module, function, original and mutant."""
    records = json.loads(path.read_text(encoding="utf-8"))
    return {(r["module"], r["function"], r["original"], r["mutant"]): r["reason"] for r in records}


def split_equivalent(
    mutants: Iterable[Mutant], known: Mapping[tuple[str, str, str, str], str]
) -> tuple[list[Mutant], list[tuple[Mutant, str]]]:
    """Return the mutants that change behaviour, and those known to change nothing with the reason."""
    live: list[Mutant] = []
    equal: list[tuple[Mutant, str]] = []
    for mutant in mutants:
        reason = known.get((mutant.module, mutant.function, mutant.original, mutant.mutant))
        if reason is None:
            live.append(mutant)
        else:
            equal.append((mutant, reason))
    return live, equal
