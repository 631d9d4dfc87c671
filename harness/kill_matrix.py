"""The kill matrix: every falsifier against every fault it must catch, run for real and kept as kill records."""

import contextlib
import itertools
import shutil
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from q4kd.harness.bundle.environment import package_versions
from q4kd.harness.claims.contract import load_contracts
from q4kd.harness.claims.folder import default_contracts_folder, skipped_lines
from q4kd.harness.claims.model import Claim
from q4kd.harness.claims.plan import make_plan
from q4kd.harness.claims.profile import detect_profile, find_extras, load_profile
from q4kd.harness.falsify import refuse_used, require_packages
from q4kd.harness.judging.digests import parts_digest, record_parts
from q4kd.harness.judging.judge import JUDGE_VERSION
from q4kd.harness.judging.kill_records import KillRecord
from q4kd.harness.judging.kills import Kills, archive_name, judge_faulted, recorded_seconds, rejudge
from q4kd.harness.judging.mutations import WatchedRun
from q4kd.harness.judging.results import KillOutcome, KillStatus
from q4kd.harness.records.packing import tar_bytes, xz_bytes
from q4kd.harness.records.raw_run import RawRun
from q4kd.harness.records.store import DirectoryStore
from q4kd.harness.runs.ahead import settle_imports, stop
from q4kd.harness.runs.experiment import Inputs, get_experiment
from q4kd.harness.runs.faults import Fault, MissingTarget, get_fault
from q4kd.harness.runs.runner import ExperimentRunner, HarnessError, Isolation, prune
from q4kd.harness.runs.user_inputs import GivenFiles
from q4kd.trainer.errors import InputError
from q4kd.trainer.yaml_lines import printable

_COLOURS: Mapping[KillStatus, str] = {
    KillStatus.CAUGHT: "green",
    KillStatus.MISSED: "red",
    KillStatus.MISFIRE: "yellow",
    KillStatus.VOID: "magenta",
}


# The sabotaged runs of one fault by name, or why there are none.
_Runs = Mapping[str, RawRun] | KillOutcome


@dataclass(frozen=True)
class Cell:
    """One falsifier against one fault. ``fresh`` is False where a valid kill record was judged again instead of run."""

    claim: str
    experiment: str
    fault: str
    mark: KillStatus
    detail: str
    fresh: bool


def sabotage(
    contracts: Path | None,
    profile: str | None,
    keyword: str | None,
    kills: Path | None,
    work: Path | None,
    *,
    changed: bool,
    workers: int | None = None,
    isolation: Isolation = "fork",
    given: GivenFiles | None = None,
) -> int:
    """Run the kill matrix, print it and write the kill records. Returns 1 unless every fault was caught; 2 for none.

    Args:
        contracts: folder of contracts; None means the installed ones.
        profile: machine profile; None means that of the GPU present, else ``cpu``.
        keyword: only claims that match (as ``falsify -k``).
        kills: folder to write the records to, below the place they were made on; None means the installed ones.
        work: folder for the runs, kept; None means one that is removed.
        changed: run only faults that have no valid record, or whose record does not show a catch.
        workers: cores that sabotaged runs take together; None stands for what this machine has. Those that need the
            accelerator for themselves still take turns.
        isolation: whether runs that measure results alone are forked from a process that has imported torch.
        given: files to use in the place of made inputs.

    Raises:
        InputError: for contracts, a profile, a selection or a fault name that cannot be used.
    """
    folder = (contracts or default_contracts_folder()).resolve()
    loaded = load_contracts(folder)
    for line in skipped_lines(folder):
        print(line, file=sys.stderr)
    require_packages(loaded)
    name = profile or detect_profile()
    machine = load_profile(name, folder)
    plan = make_plan(loaded, machine, select=keyword, extras=find_extras())
    scopes = {entry.key: entry.scope for entry in plan.entries}
    claims = [
        claim
        for contract in loaded
        for claim in contract.claims
        if claim.falsifier is not None and scopes.get(claim.key, "out_of_scope") != "out_of_scope"
    ]
    store = Kills.for_profile(machine, kills)
    root = refuse_used(work, "the runs", "--work") if work else Path(tempfile.mkdtemp(prefix="q4kd-sabotage-"))
    root.mkdir(parents=True, exist_ok=True)
    try:
        inputs = Inputs(root.resolve() / "inputs", name, given)
        runner = ExperimentRunner(root.resolve(), inputs, name, workers=workers, isolation=isolation)
        with contextlib.closing(runner):
            cells = kill_matrix(claims, name, store, runner, changed=changed)
    finally:
        if work is None:
            shutil.rmtree(root, ignore_errors=True)
    show(cells, name)
    if not cells:
        print("q4kd: no claim in scope names a fault", file=sys.stderr)
        return 2
    return 0 if all(cell.mark is KillStatus.CAUGHT for cell in cells) else 1


def kill_matrix(
    claims: Sequence[Claim],
    profile: str,
    kills: Kills,
    runner: ExperimentRunner,
    *,
    changed: bool,
) -> list[Cell]:
    """Run each (experiment, fault) once, judge every claim that asks for it, and record what was seen.

    Raises:
        InputError: for an unknown fault; nothing has run then.
    """
    groups: dict[tuple[str, str], list[Claim]] = {}
    cells: list[Cell] = []
    for claim in claims:
        assert claim.falsifier is not None
        outcomes = rejudge(claim, profile, kills) if changed else []
        caught = {outcome.fault: outcome for outcome in outcomes if outcome.caught}
        for name in claim.falsifier.sabotage:
            get_fault(name)
            if name in caught:
                cells.append(_cell(claim, claim.falsifier.experiment, caught[name], fresh=False))
            else:
                groups.setdefault((claim.falsifier.experiment, name), []).append(claim)
    runner.expected = recorded_seconds(kills, {experiment for experiment, _ in groups})
    runner.prepare_forks(experiment for experiment, _ in groups)
    numbers = itertools.count(1)

    def run(group: tuple[str, str]) -> _Runs:
        (experiment, name), asking = group, groups[group]
        print(f"[{next(numbers)}/{len(groups)}] {experiment} with {name}: {len(asking)} falsifier(s)", flush=True)
        return _run_group(experiment, get_fault(name), asking, profile, kills, runner)

    # Those that wait for the accelerator keep nobody from the cores.
    waiting = sum("cuda" in get_experiment(name).needs for name, _ in groups)
    settle_imports(experiment for experiment, _ in groups)
    with ThreadPoolExecutor(runner.cores.total + waiting) as pool:
        futures = {pool.submit(run, group): group for group in sorted(groups, key=lambda group: runner.rank(group[0]))}
        try:
            for future in _as_they_end(futures):
                experiment, name = futures[future]
                asking, runs = groups[experiment, name], future.result()
                with runner.cores.taken(0):
                    judged = _judge_group(experiment, get_fault(name), asking, profile, kills, runner, runs)
                for cell in (cell for cell in judged if cell.mark is not KillStatus.CAUGHT):
                    print(printable(f"  {cell.claim} with {cell.fault}: {cell.detail}", 300), flush=True)
                cells += judged
        except BaseException:  # interrupted: the threads wait for their runs, which a terminal's signal does not reach
            runner.cores.close()
            stop(pool, futures)
            raise
    return cells


def _as_they_end(futures: Collection[Future[_Runs]]) -> Iterator[Future[_Runs]]:
    """Yield each future when it has ended. Whoever waits wakes twice a second, so that a signal is heard at once: on
    one machine a lock without a limit slept through SIGINT until a run ended."""
    pending = set(futures)
    while pending:
        ended, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
        yield from ended


def _run_group(
    experiment: str, fault: Fault, claims: Sequence[Claim], profile: str, kills: Kills, runner: ExperimentRunner
) -> _Runs:
    """Return the sabotaged runs, or what came in their place."""
    try:
        for claim in claims:
            record_parts(claim, fault, experiment, profile, kills.of(claim).place)
        limits = [c.falsifier.for_profile(profile).timeout_s for c in claims if c.falsifier is not None]
        timeout_s = max((t for t in limits if t is not None), default=None)
        return runner.run(experiment, fault=fault.name, timeout_s=timeout_s)
    except MissingTarget as missing:
        return KillOutcome(fault=fault.name, status=KillStatus.VOID, detail=f"{missing.target} is missing")
    except (HarnessError, InputError) as error:
        return KillOutcome(fault=fault.name, status=KillStatus.MISFIRE, detail=str(error))


def _judge_group(
    experiment: str,
    fault: Fault,
    claims: Sequence[Claim],
    profile: str,
    kills: Kills,
    runner: ExperimentRunner,
    runs: _Runs,
) -> list[Cell]:
    """Judge the sabotaged runs for every claim that asks for them, and record what was seen."""
    if isinstance(runs, KillOutcome):
        return [_cell(claim, experiment, runs) for claim in claims]
    watched = {run: WatchedRun(base) for run, base in runs.items()}
    outcomes = [_judge_or_misfire(claim, fault, profile, watched) for claim in claims]
    needed = {f"runs/{run}/{file}" for run, base in watched.items() for file in base.files}
    name = archive_name(fault.name, experiment)
    for store in {id(store): store for store in map(kills.of, claims)}.values():
        needed |= store.arrays_of_others(name, {claim.key for claim in claims})
    raw = _archive(runner.faulted_root(experiment, fault.name), needed)
    cells = []
    for claim, (outcome, judged) in zip(claims, outcomes, strict=True):
        if judged and outcome.status is not KillStatus.VOID:
            store = kills.of(claim)
            parts = record_parts(claim, fault, experiment, profile, store.place)
            try:
                store.add(parts_digest(parts), _record(claim, fault, experiment, profile, parts, outcome, runs), raw)
            except InputError as error:
                outcome = replace(outcome, status=KillStatus.MISFIRE, detail=str(error))
        cells.append(_cell(claim, experiment, outcome))
    return cells


def _judge_or_misfire(claim: Claim, fault: Fault, profile: str, runs: Mapping[str, RawRun]) -> tuple[KillOutcome, bool]:
    """Return the outcome and whether it can be recorded: runs that cannot be read are a misfire and no evidence."""
    try:
        return judge_faulted(claim, fault, profile, runs), True
    except InputError as error:
        return KillOutcome.of(fault.name, KillStatus.MISFIRE, str(error)), False


def _cell(claim: Claim, experiment: str, outcome: KillOutcome, *, fresh: bool = True) -> Cell:
    return Cell(claim.key, experiment, outcome.fault, outcome.status, outcome.detail or "", fresh)


def _archive(root: Path, needed: Set[str]) -> bytes:
    """Pack the raw runs, without the arrays that no verdict under this fault rests on: most of their bytes."""
    for folder in (root / "runs").iterdir():
        prune(folder)
        for path in (folder / "arrays").glob("*.npz"):
            if path.relative_to(root).as_posix() not in needed:
                path.unlink()
    return xz_bytes(tar_bytes(DirectoryStore(root)))


def _record(
    claim: Claim,
    fault: Fault,
    experiment: str,
    profile: str,
    parts: Mapping[str, str],
    outcome: KillOutcome,
    runs: Mapping[str, RawRun],
) -> KillRecord:
    return KillRecord(
        contract=claim.contract,
        id=claim.id,
        fault=fault.name,
        experiment=experiment,
        profile=profile,
        parts=parts,
        verdict=outcome.verdict,
        caught=outcome.caught,
        detail=outcome.detail,
        runs=sorted(runs),
        raw=archive_name(fault.name, experiment),
        judge_version=JUDGE_VERSION,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=package_versions(),
    )


def show(cells: Sequence[Cell], profile: str) -> None:
    """Print the matrix: falsifiers down, their faults beside them, and the detail of whatever was not caught."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"kill matrix, profile {profile}", title_justify="left")
    for column in ("falsifier", "fault", "experiment", "", "seen"):
        table.add_column(column, overflow="fold")
    for cell in sorted(cells, key=lambda cell: (cell.claim, cell.fault)):
        mark = Text(cell.mark if cell.fresh else f"{cell.mark} (record)", style=_COLOURS[cell.mark])
        detail = printable(cell.detail.removeprefix(f"{cell.mark}: "), 200)
        table.add_row(Text(cell.claim), Text(cell.fault), Text(cell.experiment), mark, Text(detail))
    # Into a file or a pipe, 80 columns would break every name.
    console = Console(width=None if sys.stdout.isatty() else 160)
    if cells:
        console.print(table)
    counts = {mark: sum(cell.mark == mark for cell in cells) for mark in _COLOURS}
    console.print(Text(", ".join(f"{count} {mark}" for mark, count in counts.items())))
