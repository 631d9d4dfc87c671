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
from q4kd.harness.claims.place import PLACES, Place, accelerator, place_of
from q4kd.harness.claims.profile import Profile
from q4kd.harness.judging.digests import parts_digest, record_parts
from q4kd.harness.judging.judge import judge_claim
from q4kd.harness.judging.kill_records import KillRecord, kill_records, read_kill_records
from q4kd.harness.judging.mutations import NOT_SHOWN
from q4kd.harness.judging.results import ClaimResult, KillOutcome, KillStatus
from q4kd.harness.records.packing import tar_bytes
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


def default_kills() -> Path:
    """Return the folder of the kill records installed with the package; it has one folder for each place."""
    import q4kd.evidence

    return Path(next(iter(q4kd.evidence.__path__))) / "kills"


class KillStore:
    """Kill records of one place: ``records.json`` and one archive of raw runs per (fault, experiment)."""

    def __init__(self, folder: Path, place: Place = "cpu") -> None:
        self.folder, self.place = folder, place
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


class Kills:
    """The kill records that a profile's claims are filed under: ``folder/<place>``, by what each experiment runs on."""

    def __init__(self, folder: Path, accelerated: Place = "cpu") -> None:
        self.folder, self.accelerated = folder, accelerated
        self._stores: dict[Place, KillStore] = {}

    @classmethod
    def for_profile(cls, profile: Profile, folder: Path | None = None) -> "Kills":
        """Open the records that count on a profile.

        Args:
            profile: the machine class; it decides where CUDA experiments run.
            folder: the folder with one folder for each place; None means the installed one.

        Raises:
            InputError: for a folder that holds records itself, as folders of an earlier release do.
        """
        root = folder or default_kills()
        if (root / "records.json").exists():
            expected, got = (
                f"a folder with one folder for each place ({', '.join(PLACES)})",
                "records in the folder itself",
            )
            remedy = f"move what it holds into {root}/cpu, or into {root}/cuda if it was recorded on a GPU"
            raise InputError(str(root), expected=expected, got=got, remedy=remedy)
        return cls(root, accelerator(profile))

    def of(self, claim: Claim) -> KillStore:
        """Return the store that holds a claim's records. Raises InputError for an unknown experiment."""
        assert claim.falsifier is not None
        return self.at(place_of(claim, get_experiment(claim.falsifier.experiment).needs, self.accelerated))

    def at(self, place: Place) -> KillStore:
        """Return the store of a place, read at the first look."""
        if place not in self._stores:
            self._stores[place] = KillStore(self.folder / place, place)
        return self._stores[place]

    def copy_to(self, folder: Path, keys: Iterable[str]) -> None:
        """Write the named records as ``kills.json``, and their archives, into a bundle's ``sabotage`` folder.

        There the archives are plain tar files: what packs the bundle finds again what they share with the clean runs.
        """
        wanted = set(keys)
        copies: dict[str, KillRecord] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for store in map(self.at, PLACES):
            used = {key: record for key, record in store.records.items() if key in wanted}
            digests: dict[str, str] = {}
            for name in {record.raw for record in used.values()}:
                data = tar_bytes(store.archive(name)[0])
                write_atomic(folder / _unpacked(name), data)
                digests[name] = hashlib.sha256(data).hexdigest()
            copies |= {
                key: replace(record, raw=_unpacked(record.raw), raw_sha256=digests[record.raw])
                for key, record in used.items()
            }
        write_json(folder / "kills.json", kill_records(dict(sorted(copies.items()))))


def archive_name(fault: str, experiment: str) -> str:
    """Return the name of the archive of an experiment's raw runs under a fault."""
    return f"{fault}--{experiment}.tar.xz"


def _plain(name: str) -> str:
    if Path(name).name != name or name.startswith(".") or not name.endswith((".tar.xz", ".tar.gz")):
        remedy = "run `q4kd sabotage`"
        raise InputError(f"kill record archive {name!r}", expected="a plain *.tar.xz name", got="a path", remedy=remedy)
    return name


def _unpacked(name: str) -> str:
    return str(Path(_plain(name)).with_suffix(""))


def recorded_seconds(kills: Kills, experiments: Iterable[str]) -> dict[str, float]:
    """Return the seconds that runs of these experiments took when a fault was planted in them, by run name.

    The shortest of a few faults counts, since one may make a run wait. What cannot be read is left out: this is to
    estimate by, not to judge.
    """
    archives: dict[str, set[tuple[Place, str]]] = {}
    for place in PLACES:
        for record in kills.at(place).records.values():
            archives.setdefault(record.experiment, set()).add((place, record.raw))
    found: dict[str, float] = {}
    for place, raw in (kept for name in experiments for kept in sorted(archives.get(name, ()))[:_ESTIMATED_BY]):
        with contextlib.suppress(InputError, KeyError, TypeError, ValueError):
            store, _ = kills.at(place).archive(raw)
            for run in stored_runs(store):
                found[run] = min(float(RawRun(store, run).exit["wall_s"]), found.get(run, math.inf))
    return found


def rejudge(claim: Claim, profile: str, kills: Kills) -> list[KillOutcome]:
    """Judge the recorded sabotaged runs of a claim's faults again.

    Returns:
        One outcome for every fault the claim names; where there is no valid record, it is ``STALE``.
    """
    if claim.falsifier is None:
        return []
    store = kills.of(claim)
    return [_rejudge_one(claim, name, profile, store) for name in claim.falsifier.sabotage]


def _rejudge_one(claim: Claim, name: str, profile: str, kills: KillStore) -> KillOutcome:
    assert claim.falsifier is not None
    try:
        fault = get_fault(name)
        parts = record_parts(claim, fault, claim.falsifier.experiment, profile, kills.place)
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
