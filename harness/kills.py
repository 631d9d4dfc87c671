"""Kill records: the evidence that a falsifier can fail, kept with the raw observations of the sabotaged runs.

A record is found by a digest of everything that makes it valid (``digests``): the falsifier, its checks, the judge, the
fault, the experiment and the patched functions. When the meaning of any of them changes, the record is stale. A record
is never believed: its raw runs are judged again each time.
"""

import hashlib
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

from q4kd.harness.child import VOID_EXIT
from q4kd.harness.contract import Claim
from q4kd.harness.digests import parts_digest, record_parts
from q4kd.harness.experiment import get_experiment
from q4kd.harness.judge import judge_claim
from q4kd.harness.mutations import NOT_SHOWN
from q4kd.harness.raw import RawRun, TarStore
from q4kd.harness.raw import run_names as stored_runs
from q4kd.harness.sabotage.registry import Fault, MissingTarget, get_fault
from q4kd.trainer.errors import InputError
from q4kd.trainer.files import parse_json, read_bounded, write_atomic, write_json

RECORDS_FORMAT = "q4kd-kills/1"
STALE = "kill record stale"
MAX_RAW = 2 << 20
_MAX_RECORDS = 8 << 20


def default_kills(profile: str) -> Path:
    """Return the folder of the kill records installed with the package for one profile."""
    import q4kd.evidence

    return Path(next(iter(q4kd.evidence.__path__))) / "kills" / profile


class KillStore:
    """Kill records of one profile: ``records.json`` and one archive of raw runs per (fault, experiment)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records: dict[str, dict[str, Any]] = {}
        self._archives: dict[str, tuple[TarStore, str]] = {}
        path = folder / "records.json"
        if path.is_file():
            value = parse_json(read_bounded(path, _MAX_RECORDS), str(path))
            if not isinstance(value, dict) or value.get("format") != RECORDS_FORMAT:
                raise InputError(
                    str(path),
                    expected=RECORDS_FORMAT,
                    got="another format",
                    remedy="run `q4kd sabotage` to make them anew",
                )
            self.records = value["records"]

    def archive(self, name: str) -> tuple[TarStore, str]:
        """Return an archive of raw runs and its SHA-256. Raises InputError when missing, larger than 2 MB or unsafe."""
        if name not in self._archives:
            data = read_bounded(self.folder / _plain(name), MAX_RAW)
            self._archives[name] = TarStore(data), hashlib.sha256(data).hexdigest()
        return self._archives[name]

    def add(self, key: str, record: dict[str, Any], raw: bytes) -> None:
        """File a record and its archive. Older records of the same claim and fault give way to it.

        Raises:
            InputError: when the archive is larger than 2 MB.
        """
        name = _plain(record["raw"])
        if len(raw) > MAX_RAW:
            raise InputError(
                name, expected=f"at most {MAX_RAW} bytes", got=str(len(raw)), remedy="collect less in this experiment"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.folder / name, raw)
        self._archives.pop(name, None)
        who = _identity(record)
        for old in [known for known, other in self.records.items() if _identity(other) == who]:
            del self.records[old]
        self.records[key] = record
        digest = hashlib.sha256(raw).hexdigest()
        for other in self.records.values():
            if other["raw"] == name:
                other["raw_sha256"] = digest
        write_json(self.folder / "records.json", {"format": RECORDS_FORMAT, "records": self.records})

    def arrays_of_others(self, name: str, claims: Set[str]) -> set[str]:
        """Return the arrays in an archive that records of claims other than these (``contract::id``) may rest on."""
        others = [r for r in self.records.values() if r["raw"] == name and f"{r['contract']}::{r['id']}" not in claims]
        if not others:
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
        for name in {record["raw"] for record in used.values()}:
            write_atomic(folder / _plain(name), read_bounded(self.folder / _plain(name), MAX_RAW))
        write_json(folder / "kills.json", {"format": RECORDS_FORMAT, "records": used})


def _identity(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(record[name] for name in ("contract", "id", "fault"))


def _plain(name: str) -> str:
    if Path(name).name != name or name.startswith(".") or not name.endswith(".tar.gz"):
        raise InputError(
            f"kill record archive {name!r}",
            expected="a plain *.tar.gz name",
            got="a path",
            remedy="run `q4kd sabotage`",
        )
    return name


def rejudge(claim: Claim, profile: str, kills: KillStore) -> list[dict[str, Any]]:
    """Judge the recorded sabotaged runs of a claim's faults again.

    Returns:
        For every fault the claim names: ``{"fault", "caught", "verdict", "record", "detail"}``; ``verdict`` and
        ``record`` are None when there is no valid record, and ``detail`` then begins with ``kill record stale``.
    """
    if claim.falsifier is None:
        return []
    return [_rejudge_one(claim, name, profile, kills) for name in claim.falsifier.sabotage]


def _rejudge_one(claim: Claim, name: str, profile: str, kills: KillStore) -> dict[str, Any]:
    assert claim.falsifier is not None
    experiment = claim.falsifier.experiment

    def without(why: str) -> dict[str, Any]:
        return {"fault": name, "caught": False, "verdict": None, "record": None, "detail": f"{STALE}: {why}"}

    try:
        fault = get_fault(name)
        parts = record_parts(claim, fault, experiment, profile)
    except MissingTarget as missing:
        return without(f"VOID, {missing.target} is missing")
    except InputError as error:
        return without(str(error))
    key = parts_digest(parts)
    record = kills.records.get(key)
    if record is None:
        return without(_what_changed(claim, name, parts, kills))
    try:
        store, digest = kills.archive(record["raw"])
        if digest != record.get("raw_sha256"):
            return without("its archive is not the one recorded")
        runs = {run: RawRun(store, run) for run in stored_runs(store)}
        outcome = judge_faulted(claim, fault, profile, runs)
    except InputError as error:
        return without(str(error))
    return {"fault": name, "record": key, **outcome}


def _what_changed(claim: Claim, fault: str, parts: Mapping[str, str], kills: KillStore) -> str:
    for record in kills.records.values():
        if (record["contract"], record["id"], record["fault"]) == (claim.contract, claim.id, fault):
            old = record.get("parts", {})
            changed = sorted(name for name in {*old, *parts} if old.get(name) != parts.get(name))
            return f"changed since: {', '.join(changed) or 'the record'}"
    return "this fault was never run"


def judge_faulted(claim: Claim, fault: Fault, profile: str, runs: Mapping[str, RawRun]) -> dict[str, Any]:
    """Judge sabotaged runs: ``{"caught", "verdict", "detail"}``.

    Caught means falsified, by runs that name this fault and ended as a run normally does or as the fault declares. A
    run that ended otherwise is a misfire: something broke, but not necessarily what the falsifier watches.
    """
    assert claim.falsifier is not None
    experiment = get_experiment(claim.falsifier.experiment)
    arms = {experiment.run_name(arm): arm for arm in experiment.arms}
    if set(runs) != set(arms):
        return {"caught": False, "verdict": None, "detail": "misfire: the recorded runs are not the experiment's"}
    for name, arm in arms.items():
        affected = fault.arms is None or arm.name in fault.arms
        if runs[name].fault != (fault.name if affected else None):
            return {"caught": False, "verdict": None, "detail": f"misfire: run {name} names another fault"}
        cause, code = runs[name].exit.get("cause"), runs[name].exit.get("returncode")
        if code == VOID_EXIT and cause == "exited":
            return {"caught": False, "verdict": None, "detail": "VOID: the fault was not planted"}
        normal = cause == "exited" and code in (0, *arm.exits)
        if not normal and not (affected and cause in fault.declared_exit):
            return {"caught": False, "verdict": None, "detail": f"misfire: run {name} ended {cause}, code {code}"}
    finding = judge_claim(claim, runs, profile)
    caught = (verdict := finding["verdict"]) == "falsified"
    checks = finding.get("checks") or [{}]
    first = next((check for check in checks if check.get("verdict") == verdict), checks[0])
    why = first.get("counterexample") or first.get("measured") or finding.get("reason") or ""
    return {"caught": caught, "verdict": verdict, "detail": f"{'caught' if caught else 'missed'}: {why}"[:400]}


def apply_kill_rule(finding: dict[str, Any], kills: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the finding with its kill records, and without a corroboration that nobody has shown could fail.

    A falsified or inconclusive finding keeps its verdict. A corroborated one needs every fault it names caught.
    """
    finding = {**finding, "sabotage": kills}
    if finding["verdict"] != "corroborated":
        return finding
    if any(kill["detail"].startswith(STALE) for kill in kills):
        return {**finding, "verdict": "inconclusive", "reason": STALE}
    if not kills or not all(kill["caught"] for kill in kills):
        return {**finding, "verdict": "inconclusive", "reason": NOT_SHOWN}
    return finding
