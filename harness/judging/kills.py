"""Kill records: the evidence that a falsifier can fail, kept with the raw observations of the sabotaged runs.

A record is found by a digest of everything that makes it valid (``digests``): the falsifier, its checks, the judge, the
fault, the experiment and the patched functions. When the meaning of any of them changes, the record is stale. A record
is never believed: its raw runs are judged again each time.
"""

import contextlib
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path

from q4kd.harness.claims.model import Claim
from q4kd.harness.judging.digests import parts_digest, record_parts
from q4kd.harness.judging.judge import judge_claim
from q4kd.harness.judging.kill_records import KillRecord, kill_records, read_kill_records
from q4kd.harness.judging.mutations import NOT_SHOWN
from q4kd.harness.judging.results import ClaimResult, KillOutcome, KillStatus
from q4kd.harness.records.raw_run import RawRun
from q4kd.harness.records.raw_run import run_names as stored_runs
from q4kd.harness.records.store import TarStore
from q4kd.harness.runs.experiment import get_experiment
from q4kd.harness.runs.faults import VOID_EXIT, Fault, MissingTarget, get_fault
from q4kd.trainer.errors import InputError
from q4kd.trainer.files import parse_json, read_bounded, write_atomic, write_json

MAX_RAW = 2 << 20
_MAX_RECORDS = 8 << 20
_ESTIMATED_BY = 3


def default_kills(profile: str) -> Path:
    """Return the folder of the kill records installed with the package for one profile."""
    import q4kd.evidence

    return Path(next(iter(q4kd.evidence.__path__))) / "kills" / profile


class KillStore:
    """Kill records of one profile: ``records.json`` and one archive of raw runs per (fault, experiment)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records: dict[str, KillRecord] = {}
        self._archives: dict[str, tuple[TarStore, str]] = {}
        path = folder / "records.json"
        if path.is_file():
            self.records = read_kill_records(parse_json(read_bounded(path, _MAX_RECORDS), str(path)), str(path))

    def archive(self, name: str) -> tuple[TarStore, str]:
        """Return an archive of raw runs and its SHA-256. Raises InputError when missing, larger than 2 MB or unsafe."""
        if name not in self._archives:
            data = read_bounded(self.folder / _plain(name), MAX_RAW)
            self._archives[name] = TarStore(data), hashlib.sha256(data).hexdigest()
        return self._archives[name]

    def add(self, key: str, record: KillRecord, raw: bytes) -> None:
        """File a record and its archive. Older records of the same claim and fault give way to it.

        Raises:
            InputError: when the archive is larger than 2 MB.
        """
        name = _plain(record.raw)
        if len(raw) > MAX_RAW:
            remedy = "collect less in this experiment"
            raise InputError(name, expected=f"at most {MAX_RAW} bytes", got=str(len(raw)), remedy=remedy)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.folder / name, raw)
        self._archives.pop(name, None)
        kept = {known: other for known, other in self.records.items() if other.subject != record.subject}
        digest = hashlib.sha256(raw).hexdigest()
        self.records = {
            known: replace(other, raw_sha256=digest) if other.raw == name else other
            for known, other in {**kept, key: record}.items()
        }
        write_json(self.folder / "records.json", kill_records(self.records))

    def arrays_of_others(self, name: str, claims: Set[str]) -> set[str]:
        """Return the arrays in an archive that records of claims other than these (``contract::id``) may rest on."""
        if all(record.raw != name or record.claim in claims for record in self.records.values()):
            return set()
        try:
            names = self.archive(name)[0].names()
        except InputError:
            return set()
        return {file for file in names if "/arrays/" in file}

    def copy_to(self, folder: Path, keys: Iterable[str]) -> None:
        """Write the named records as ``kills.json``, and their archives, into a bundle's ``sabotage`` folder."""
        used = {key: self.records[key] for key in sorted(set(keys)) if key in self.records}
        folder.mkdir(parents=True, exist_ok=True)
        for name in {record.raw for record in used.values()}:
            write_atomic(folder / _plain(name), read_bounded(self.folder / _plain(name), MAX_RAW))
        write_json(folder / "kills.json", kill_records(used))


def _plain(name: str) -> str:
    if Path(name).name != name or name.startswith(".") or not name.endswith(".tar.gz"):
        remedy = "run `q4kd sabotage`"
        raise InputError(f"kill record archive {name!r}", expected="a plain *.tar.gz name", got="a path", remedy=remedy)
    return name


def recorded_seconds(kills: KillStore, experiments: Iterable[str]) -> dict[str, float]:
    """Return the seconds that runs of these experiments took when a fault was planted in them, by run name.

    The shortest of a few faults counts, since one may make a run wait. What cannot be read is left out: this is to
    estimate by, not to judge.
    """
    archives: dict[str, set[str]] = {}
    for record in kills.records.values():
        archives.setdefault(record.experiment, set()).add(record.raw)
    found: dict[str, float] = {}
    for raw in (raw for name in experiments for raw in sorted(archives.get(name, ()))[:_ESTIMATED_BY]):
        with contextlib.suppress(InputError, KeyError, TypeError, ValueError):
            store, _ = kills.archive(raw)
            for run in stored_runs(store):
                found[run] = min(float(RawRun(store, run).exit["wall_s"]), found.get(run, math.inf))
    return found


def rejudge(claim: Claim, profile: str, kills: KillStore) -> list[KillOutcome]:
    """Judge the recorded sabotaged runs of a claim's faults again.

    Returns:
        One outcome for every fault the claim names; where there is no valid record, it is ``STALE``.
    """
    if claim.falsifier is None:
        return []
    return [_rejudge_one(claim, name, profile, kills) for name in claim.falsifier.sabotage]


def _rejudge_one(claim: Claim, name: str, profile: str, kills: KillStore) -> KillOutcome:
    assert claim.falsifier is not None
    try:
        fault = get_fault(name)
        parts = record_parts(claim, fault, claim.falsifier.experiment, profile)
        key = parts_digest(parts)
        record = kills.records.get(key)
        if record is None:
            return KillOutcome.of(name, KillStatus.STALE, _what_changed(claim, name, parts, kills))
        store, digest = kills.archive(record.raw)
        if digest != record.raw_sha256:
            return KillOutcome.of(name, KillStatus.STALE, "its archive is not the one recorded")
        runs = {run: RawRun(store, run) for run in stored_runs(store)}
        return replace(judge_faulted(claim, fault, profile, runs), record=key)
    except MissingTarget as missing:
        return KillOutcome.of(name, KillStatus.STALE, f"VOID, {missing.target} is missing")
    except InputError as error:
        return KillOutcome.of(name, KillStatus.STALE, str(error))


def _what_changed(claim: Claim, fault: str, parts: Mapping[str, str], kills: KillStore) -> str:
    for record in kills.records.values():
        if record.subject == (claim.contract, claim.id, fault):
            changed = sorted(name for name in {*record.parts, *parts} if record.parts.get(name) != parts.get(name))
            return f"changed since: {', '.join(changed) or 'the record'}"
    return "this fault was never run"


def judge_faulted(claim: Claim, fault: Fault, profile: str, runs: Mapping[str, RawRun]) -> KillOutcome:
    """Judge sabotaged runs.

    Caught means falsified, by runs that name this fault and ended as a run normally does or as the fault declares. A
    run that ended otherwise is a misfire: something broke, but not necessarily what the falsifier watches.
    """
    assert claim.falsifier is not None
    experiment = get_experiment(claim.falsifier.experiment)
    arms = {experiment.run_name(arm): arm for arm in experiment.arms}
    if set(runs) != set(arms):
        return KillOutcome.of(fault.name, KillStatus.MISFIRE, "the recorded runs are not the experiment's")
    for name, arm in arms.items():
        affected = fault.arms is None or arm.name in fault.arms
        if runs[name].fault != (fault.name if affected else None):
            return KillOutcome.of(fault.name, KillStatus.MISFIRE, f"run {name} names another fault")
        cause, code = runs[name].exit.get("cause"), runs[name].exit.get("returncode")
        if code == VOID_EXIT and cause == "exited":
            return KillOutcome.of(fault.name, KillStatus.VOID, "the fault was not planted")
        normal = cause == "exited" and code in (0, *arm.exits)
        if not normal and not (affected and cause in fault.declared_exit):
            return KillOutcome.of(fault.name, KillStatus.MISFIRE, f"run {name} ended {cause}, code {code}")
    result = judge_claim(claim, runs, profile)
    status = KillStatus.CAUGHT if result.verdict == "falsified" else KillStatus.MISSED
    first = result.deciding or next(iter(result.checks), None)
    why = (first and (first.counterexample or first.measured)) or result.reason or ""
    return KillOutcome(fault=fault.name, status=status, detail=f"{status}: {why}"[:400], verdict=result.verdict)


def apply_kill_rule(result: ClaimResult, kills: Sequence[KillOutcome]) -> ClaimResult:
    """Return the result with its kill outcomes, and without a corroboration that nobody has shown could fail.

    A falsified or inconclusive claim keeps its verdict. A corroborated one needs every fault it names caught.
    """
    result = replace(result, sabotage=tuple(kills))
    if result.verdict != "corroborated" or (kills and all(kill.caught for kill in kills)):
        return result
    stale = any(kill.status is KillStatus.STALE for kill in kills)
    return replace(result, verdict="inconclusive", reason=KillStatus.STALE.value if stale else NOT_SHOWN)
