"""Experiments that a bundle took over from another: their origin, and what verification asks of them."""

import hashlib
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime

from q4kd.harness.bundle.recheck import arms_of
from q4kd.harness.bundle.writer import manifest_text
from q4kd.harness.judging.results import Carried, Findings
from q4kd.harness.records.raw_run import RawRun, runs_of
from q4kd.harness.records.store import PrefixStore, Store, read_object
from q4kd.trainer.errors import InputError

DEPENDENCIES = "dependencies.json"


def run_digest(store: Store, run: str) -> str:
    """Return the SHA-256 over the names and contents of all files of a run, as a manifest lists them."""
    files = PrefixStore(store, f"runs/{run}")
    digests = {name: hashlib.sha256(files.read(name)).hexdigest() for name in files.names()}
    return hashlib.sha256(manifest_text(digests)).hexdigest()


def carried_problems(store: Store, findings: Findings, runs: Mapping[str, RawRun]) -> list[str]:
    """Return, one line each, what is wrong with the runs that a bundle says it took over, and with those it made.

    A run that was taken over must be whole and the one that was judged, and its experiment with all arms. Any other run
    must be of the boot that the bundle was made in: runs of two boots must not mix without a word.
    """
    names = [entry.experiment for entry in findings.carried]
    lines = [f"carried: {name} is listed twice" for name in sorted({name for name in names if names.count(name) > 1})]
    for entry in findings.carried:
        lines += [f"carried: {entry.experiment}: {problem}" for problem in _problems(store, entry, findings, runs)]
    boot = read_object(store, "environment.json").get("boot_id")
    taken = {run for entry in findings.carried for run in entry.runs}
    for name, run in runs.items():
        if name in taken or boot is None:
            continue
        try:
            made = run.exit.get("boot_id") if run.harness_error is None else boot
        except InputError:
            continue  # the claim that is judged on it says so
        if made != boot:
            lines.append(f"runs/{name}: of another boot than the bundle, and not said to be carried")
    if findings.carried and DEPENDENCIES not in store.names():
        lines.append(f"carried: no {DEPENDENCIES}, which says why that was allowed")
    return lines


def _problems(store: Store, entry: Carried, findings: Findings, runs: Mapping[str, RawRun]) -> Iterator[str]:
    if not any(row.experiment == entry.experiment for row in findings.rows):
        yield "no claim is judged on it"
    held = set(runs_of(entry.experiment, runs))
    if set(entry.runs) != held or arms_of(entry.experiment) - held:
        yield f"runs {sorted(entry.runs)} recorded, the bundle holds {sorted(held)}"
        return
    for run, digest in entry.runs.items():
        if run_digest(store, run) != digest:
            yield f"run {run} is not the one that was taken over"
    try:
        later = _moment(entry.created) > _moment(findings.created)
    except ValueError:
        yield f"made at {entry.created!r}, which is no time"
        return
    if later:
        yield f"made at {entry.created}, after the bundle itself"


def _moment(text: str) -> datetime:
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
