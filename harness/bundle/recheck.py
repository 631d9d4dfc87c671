"""Parts of verification: judging a bundle's sabotaged runs again, and saying where two records differ."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from q4kd.harness.bundle.exporters import ctrf, digest_of, junit, statement_of
from q4kd.harness.claims.contract import parse_contract
from q4kd.harness.claims.folder import contract_files
from q4kd.harness.claims.model import Claim, Contract
from q4kd.harness.claims.plan import Plan
from q4kd.harness.claims.profile import ASKED_FOR, EXTRA_PACKAGES, EXTRAS, profile_bytes
from q4kd.harness.claims.waivers import expired_lines
from q4kd.harness.judging.kill_records import KillRecord, read_kill_records
from q4kd.harness.judging.results import Findings, KillOutcome, KillStatus
from q4kd.harness.records.json_types import JsonRecord, JsonValue
from q4kd.harness.records.raw_run import RawRun, read_runs
from q4kd.harness.records.store import Store, TarStore, read_object
from q4kd.harness.records.tar_archive import REMEDY
from q4kd.harness.runs.user_inputs import ROLES
from q4kd.trainer.errors import InputError
from q4kd.trainer.files import read_bounded
from q4kd.trainer.yaml_lines import MAX_BYTES, printable

KILLS = "sabotage/kills.json"
# For all archives of a bundle together: a few hundred small ones could otherwise unpack to more than any memory.
MAX_UNPACKED = 512 << 20


class KillReplay:
    """Judges the sabotaged runs kept in a bundle again, each archive unpacked once however many claims name it."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._runs: dict[str, Mapping[str, RawRun]] = {}
        self._left = MAX_UNPACKED

    @cached_property
    def _records(self) -> Mapping[str, KillRecord]:
        return read_kill_records(read_object(self.store, KILLS), KILLS)

    def judge_again(self, claim: Claim, profile: str, recorded: Sequence[KillOutcome]) -> list[KillOutcome]:
        """Return the outcomes that the bundle should hold for a claim with a falsifier, one for each fault it names.

        A record whose code has changed since is still judged: its raw runs are what was seen then. A fault recorded
        without a record stays as it was recorded, which cannot support a corroboration.

        Raises:
            InputError: a record is missing, or is for another claim, or its archive is not the one recorded.
        """
        from q4kd.harness.judging.kills import judge_faulted
        from q4kd.harness.runs.faults import get_fault

        assert claim.falsifier is not None
        by_fault = {outcome.fault: outcome for outcome in recorded}
        results: list[KillOutcome] = []
        for name in claim.falsifier.sabotage:
            outcome = by_fault.get(name)
            if outcome is None:
                expected = f"a record for the fault {name}"
                raise InputError(claim.key, expected=expected, got="none", remedy="run falsify again")
            if outcome.record is None:
                status = KillStatus.MISSED if outcome.caught else outcome.status
                results.append(replace(outcome, status=status, verdict=None))
                continue
            record = self._records.get(outcome.record)
            identity = (claim.contract, claim.id, name, claim.falsifier.experiment)
            if record is None or (*record.subject, record.experiment) != identity:
                raise InputError(KILLS, expected=f"a record of {identity}", got="none", remedy="run falsify again")
            judged = judge_faulted(claim, get_fault(name), profile, self._archive(record))
            results.append(replace(judged, record=outcome.record))
        return results

    def _archive(self, record: KillRecord) -> Mapping[str, RawRun]:
        name = f"sabotage/{record.raw}"
        if name not in self._runs:
            data = self.store.read(name)
            if hashlib.sha256(data).hexdigest() != record.raw_sha256:
                raise InputError(name, expected="the archive recorded", got="another", remedy="run falsify again")
            archive = TarStore(data, name, self._left)
            self._left -= archive.unpacked
            self._runs[name] = read_runs(archive)
        elif digest_of(self.store, name) != record.raw_sha256:
            raise InputError(name, expected="the archive recorded", got="another", remedy="run falsify again")
        return self._runs[name]


def arms_of(experiment: str | None) -> set[str]:
    """Return the names of all runs of an experiment; none for one that is not known here."""
    from q4kd.harness.runs import experiment as experiments

    known = experiments.EXPERIMENTS.get(experiment) if experiment else None
    return {known.run_name(arm) for arm in known.arms} if known else set()


def bundle_contracts(store: Store) -> list[Contract]:
    """Load the contracts kept in a bundle, as run (InputError when one cannot be)."""
    names = [
        name
        for name in store.names()
        if name.startswith("contracts/") and name.count("/") == 1 and name.endswith((".yaml", ".yml"))
    ]
    return [parse_contract(name.split("/")[1].rsplit(".", 1)[0], store.read(name, MAX_BYTES), name) for name in names]


def read_plan(store: Store) -> tuple[Plan, JsonRecord]:
    """Return ``plan.json`` as a plan and as it is written (InputError when a field is not text)."""
    value = read_object(store, "plan.json")
    plan = Plan.from_json(value)
    fields = [plan.profile, plan.select, *(field for entry in plan.entries for field in vars(entry).values())]
    if not all(field is None or isinstance(field, str) for field in fields):
        raise InputError("plan.json", expected="text in every field", got="something else", remedy=REMEDY)
    return plan, value


def given_differences(plan: Plan, inputs: JsonRecord) -> list[str]:
    """Return, one line each, where the files given by name in the plan are not those digested in ``inputs.json``."""
    named = {f"given/{role}/{name}" for role, name in plan.given.items()}
    digested = {"/".join(name.split("/")[:3]) for name in inputs if name.startswith("given/")}
    lines = [f"inputs.json: no digest of {printable(name)}" for name in sorted(named - digested)]
    return lines + [f"plan: {printable(name)} is not named as given" for name in sorted(digested - named)]


def waiver_lines(plan: Plan, contracts: Sequence[Contract], created: str) -> tuple[list[str], list[str]]:
    """Return what is wrong with a plan's waivers, and what a reader must know of them: nothing here can judge them."""
    keys = {claim.key for contract in contracts for claim in contract.claims}
    names = [waiver.claim for waiver in plan.waivers]
    wrong = [f"plan: a waiver of {name}, which is no claim" for name in names if name not in keys]
    if len(names) != len(set(names)):
        wrong.append("plan: a claim is waived twice")
    holding = [waiver for waiver in plan.waivers if waiver.holds_on(created)]
    said = [f"{waiver.claim} may be inconclusive: {waiver}" for waiver in holding]
    return wrong, [printable(line, 300) for line in (*said, *expired_lines(plan.waivers, created))]


def extras_lines(plan: Plan, environment: JsonRecord) -> tuple[list[str], list[str]]:
    """Return what the plan counts on beside its profile and the environment lacks, and what it leaves uncounted.

    The latter puts claims out of scope; a GPU that CUDA was not to use is an honest reason for it.
    """
    gpu, packages = environment.get("gpu"), environment.get("packages")
    names = gpu.get("names", []) if isinstance(gpu, dict) else []
    has = {
        "two_gpus": isinstance(names, list) and len(names) >= 2,
        **{extra: isinstance(packages, dict) and name in packages for extra, name in EXTRA_PACKAGES.items()},
        "no_gpu": not names,
        "real_files": set(plan.given) == set(ROLES),
        # Whether a person asked for more is nothing that a machine shows.
        **{extra: extra in plan.extras for extra in ASKED_FOR},
    }
    wrong = [f"plan: counts on {name}, which environment.json does not show" for name in plan.extras if not has[name]]
    # That there is no GPU takes nothing out of scope that its absence did not.
    left = [name for name in EXTRAS if has[name] and name not in (*plan.extras, "no_gpu")]
    return wrong, [f"environment.json shows {name}; the plan leaves claims that need it out of scope" for name in left]


def contract_differences(store: Store, folder: Path, profile: str) -> list[str]:
    """Return, one line each, how the contracts and the profile as run differ from those of ``folder``."""
    given = {f"contracts/{path.name}": read_bounded(path, MAX_BYTES) for path in contract_files(folder)}
    given[f"contracts/profiles/{profile}.yaml"] = profile_bytes(profile, folder)
    expected = {name: hashlib.sha256(data).hexdigest() for name, data in given.items()}
    held = {name: digest_of(store, name) for name in store.names() if name.startswith("contracts/")}
    lines = [f"{name}: not in the bundle" for name in expected if name not in held]
    lines += [f"{name}: not among the contracts given" for name in held if name not in expected]
    lines += [f"{name}: differs from the one given" for name in held if expected.get(name, held[name]) != held[name]]
    return lines


def interchange_differences(store: Store, findings: Findings) -> list[str]:
    """Derive the other formats again, which are what other tools believe; return how those kept differ."""
    try:
        statement = statement_of(store, findings)
        report = ctrf(findings, read_object(store, "environment.json"))
    except (AttributeError, TypeError) as error:
        return [f"environment.json or inputs.json: not what a bundle holds: {error}"]
    expected = {"ctrf.json": report, "statement.intoto.json": statement}
    names = store.names()
    lines = [f"{name}: missing" for name in ("junit.xml", *expected) if name not in names]
    if "junit.xml" in names and store.read("junit.xml") != junit(findings):
        lines.append("junit.xml: differs from the findings")
    lines += [
        f"{name}: differs from the findings"
        for name, value in expected.items()
        if name in names and difference(read_object(store, name), as_json(value)) is not None
    ]
    return lines


def as_json(value: object) -> JsonValue:
    """Return ``value`` as it reads after being written to JSON."""
    parsed: JsonValue = json.loads(json.dumps(value, allow_nan=False))
    return parsed


def difference(recorded: JsonValue, recomputed: JsonValue, path: str = "") -> str | None:
    """Return where two JSON values differ, or None. Numbers may differ by rounding across machines (1e-9 relative)."""
    if isinstance(recorded, dict) and isinstance(recomputed, dict):
        for key in sorted({*recorded, *recomputed}):
            if key not in recorded or key not in recomputed:
                return f"{path}.{key}: only in the {'record' if key in recorded else 'recomputation'}"
            found = difference(recorded[key], recomputed[key], f"{path}.{key}")
            if found is not None:
                return found
        return None
    if isinstance(recorded, list) and isinstance(recomputed, list):
        if len(recorded) != len(recomputed):
            return f"{path}: {len(recorded)} recorded, {len(recomputed)} recomputed"
        pairs = enumerate(zip(recorded, recomputed, strict=True))
        return next((d for i, (a, b) in pairs if (d := difference(a, b, f"{path}[{i}]")) is not None), None)
    same = recorded == recomputed and isinstance(recorded, bool) == isinstance(recomputed, bool)
    booleans = isinstance(recorded, bool) or isinstance(recomputed, bool)
    if not booleans and isinstance(recorded, int | float) and isinstance(recomputed, int | float):
        same = math.isclose(recorded, recomputed, rel_tol=1e-9, abs_tol=1e-15)
    return None if same else f"{path}: recorded {_shown(recorded)}, recomputed {_shown(recomputed)}"


def _shown(value: object) -> str:
    return printable(json.dumps(value, ensure_ascii=False), 120)
