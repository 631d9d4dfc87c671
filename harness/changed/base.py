"""The bundle that runs are carried from: found, verified, and what of it a change cannot have touched."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from q4kd.harness.bundle.carried import DEPENDENCIES, run_digest
from q4kd.harness.bundle.findings import read_findings
from q4kd.harness.bundle.verify import verify_store
from q4kd.harness.bundle.writer import MANIFEST, seal_problems
from q4kd.harness.changed.dependencies import Dependencies, machine_of
from q4kd.harness.judging.results import Carried, Findings
from q4kd.harness.records.json_types import JsonRecord
from q4kd.harness.records.packing import SUFFIXES, stem_of
from q4kd.harness.records.raw_run import RawRun, read_runs
from q4kd.harness.records.store import MemoryStore, open_store, read_object, snapshot
from q4kd.harness.runs.experiment import get_experiment
from q4kd.trainer.errors import InputError
from q4kd.trainer.yaml_lines import printable

_WITHOUT = "run falsify without --changed"


@dataclass(frozen=True, kw_only=True)
class Base:
    """A bundle that verifies, held in memory: nobody can change it between being verified and being copied from."""

    path: Path
    store: MemoryStore
    digest: str
    findings: Findings
    dependencies: Dependencies
    runs: Mapping[str, RawRun]

    @property
    def name(self) -> str:
        """Return what the bundle is called, as a new bundle and its reports may say it."""
        return bundle_name(self.path)

    def origin(self, experiment: str) -> Carried:
        """Return where an experiment's runs come from: this bundle, or the one that this bundle took them from."""
        for entry in self.findings.carried:
            if entry.experiment == experiment:
                return entry
        arms = [get_experiment(experiment).run_name(arm) for arm in get_experiment(experiment).arms]
        return Carried(
            experiment=experiment,
            bundle=self.digest,
            name=self.name,
            created=self.findings.created,
            runs={run: run_digest(self.store, run) for run in arms},
        )

    def unfit(self, experiment: str) -> str | None:
        """Return why an experiment's runs in this bundle cannot stand for new ones, or None when they can."""
        arms = {get_experiment(experiment).run_name(arm) for arm in get_experiment(experiment).arms}
        if not arms <= self.runs.keys() or any(self.runs[run].harness_error is not None for run in arms):
            return "the base holds no whole run of it"
        for row in self.findings.rows:
            if row.experiment == experiment and row.verdict != "corroborated":
                return f"{row.id} was {row.verdict} there"
        return None

    def words(self, experiments: Iterable[str]) -> dict[str, set[str]]:
        """Return the arguments that all runs of each experiment had here; none for one that was not run here."""
        return words_of(experiments, self.runs)


def bundle_name(path: Path) -> str:
    """Return the name of a bundle without its archive's suffix, of letters that a report may show."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", stem_of(path))[:100] or "bundle"


def words_of(experiments: Iterable[str], runs: Mapping[str, RawRun]) -> dict[str, set[str]]:
    """Return the arguments, after the launcher's ``--``, of all whole runs of each experiment that are there.

    Raises:
        InputError: a record of the arguments that is none.
    """
    found: dict[str, set[str]] = {}
    for name in experiments:
        experiment = get_experiment(name)
        mine = [runs[run] for arm in experiment.arms if (run := experiment.run_name(arm)) in runs]
        found[name] = {word for run in mine if run.harness_error is None for word in _words(run)}
    return found


def _words(run: RawRun) -> list[str]:
    try:
        argv = list(map(str, run.argv["argv"]))
        return argv[argv.index("--") + 1 :]
    except (KeyError, TypeError, ValueError) as error:
        expected = "the arguments of a run, with -- before the program's"
        raise InputError(f"{run.name}/argv.json", expected=expected, got=str(error)[:100], remedy=_WITHOUT) from error


def find_base(given: Path | None, profile: str, environment: JsonRecord, folder: Path = Path("bundles")) -> Base:
    """Return the base that was named, or else the newest in ``folder`` that can be one.

    Raises:
        InputError: it does not verify, or is of another profile or machine, or does not say what its runs depend on; or
            there is none.
    """
    if given is not None:
        return open_base(given.resolve(), profile, environment)
    newest = sorted(_candidates(folder, profile), key=lambda found: found[0], reverse=True)
    refused = "none"
    for _, path in newest:
        try:
            return open_base(path.resolve(), profile, environment)
        except InputError as error:
            refused = str(error) if refused == "none" else refused
    expected = f"a verified bundle of profile {profile} in {folder}/"
    raise InputError("--changed", expected=expected, got=printable(refused, 300), remedy=f"name one, or {_WITHOUT}")


def open_base(path: Path, profile: str, environment: JsonRecord) -> Base:
    """Verify a bundle as ``evidence verify`` does and return it as a base. Raises as ``find_base`` does."""
    store = snapshot(open_store(path), str(path))
    result = verify_store(store)
    if result.status != "consistent":
        expected, got = "a bundle that verifies", f"{result.status}: {result.problems[0]}"
        raise InputError(str(path), expected=expected, got=got, remedy=f"name another, or {_WITHOUT}")
    findings = read_findings(store)
    if findings.profile != profile:
        expected = f"a bundle of profile {profile}"
        raise InputError(str(path), expected=expected, got=findings.profile, remedy=f"name another, or {_WITHOUT}")
    if DEPENDENCIES not in store.names():
        expected, got = f"{DEPENDENCIES}, which says what its runs depend on", "none: it was made by an older q4kd"
        raise InputError(str(path), expected=expected, got=got, remedy=f"name another, or {_WITHOUT}")
    dependencies = Dependencies.from_json(read_object(store, DEPENDENCIES), DEPENDENCIES)
    here = machine_of(environment)
    other = sorted(name for name in {*here, *dependencies.machine} if here.get(name) != dependencies.machine.get(name))
    if other:
        then, now = (
            "; ".join(f"{name} {machine.get(name, 'unknown')}" for name in other)
            for machine in (dependencies.machine, here)
        )
        raise InputError(
            str(path),
            expected=f"a bundle of this machine ({now})",
            got=f"one of another machine ({printable(then, 200)})",
            remedy=_WITHOUT,
        )
    return Base(
        path=path,
        store=store,
        digest=hashlib.sha256(store.read(MANIFEST)).hexdigest(),
        findings=findings,
        dependencies=dependencies,
        runs=read_runs(store),
    )


def reopen(path: Path, digest: str) -> MemoryStore:
    """Return the files of a base that was verified a moment ago (InputError when they are not those any more)."""
    store = snapshot(open_store(path), str(path))
    if seal_problems(store) or hashlib.sha256(store.read(MANIFEST)).hexdigest() != digest:
        expected = "the bundle that was verified"
        raise InputError(str(path), expected=expected, got="a changed one", remedy="see who writes to it; try again")
    return store


def _candidates(folder: Path, profile: str) -> Iterable[tuple[str, Path]]:
    """Yield the bundles of a folder that are whole and of this profile, with the time they were made."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if not (path.is_dir() or path.name.endswith(SUFFIXES)):
            continue
        try:
            findings = read_findings(open_store(path))
        except InputError:
            continue
        if findings.profile == profile and findings.scope == "full":
            yield findings.created, path
