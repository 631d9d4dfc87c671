"""Verification: from the raw files of a bundle, draw every verdict again and compare. No GPU, no torch, no network.

A bundle that was made up from scratch, raw files included, is out of its reach; ``VerifyResult.caveats`` says so.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from q4kd.harness.bundle import MANIFEST, manifest_of, parse_manifest
from q4kd.harness.contract import Claim, Contract, contract_files, parse_contract
from q4kd.harness.findings import PROSE, exit_code, headline, inconclusive, parse_findings, summary
from q4kd.harness.interchange import ctrf, digest_of, intoto_statement, junit
from q4kd.harness.plan import Plan, make_plan, plan_differences
from q4kd.harness.profile import profile_bytes, read_profile
from q4kd.harness.raw import RawRun, Store, open_store, read_runs, runs_of
from q4kd.harness.recheck import as_json, difference, recheck_sabotage
from q4kd.harness.store import read_object
from q4kd.harness.yaml_lines import MAX_BYTES, printable
from q4kd.trainer.errors import InputError
from q4kd.trainer.files import read_bounded

Status = Literal["consistent", "mismatch", "unverifiable"]
Rejudge = Callable[[Claim, str, Store, list[Mapping[str, Any]]], list[dict[str, Any]]]
_EXIT_CODES: Mapping[Status, int] = {"consistent": 0, "mismatch": 1, "unverifiable": 2}
_FABRICATED = "raw files invented together with their verdicts are beyond what re-judging can detect"
_UNSIGNED = (
    "consistent; authenticity not established: without --contracts or a signature, a bundle that was edited and sealed "
    "again with looser bounds looks the same"
)
_REPORT = "report.html is hashed but not recomputed; make your own with `q4kd evidence report`"


@dataclass(frozen=True, kw_only=True)
class VerifyResult:
    """What verification found.

    Attributes:
        status: consistent, mismatch, or unverifiable (this program cannot tell).
        problems: one line each, why the status is not consistent.
        caveats: what a consistent bundle still does not show.
        recomputed: how many verdicts were drawn again from raw files.
        headline: what the bundle says of its run; "consistent" is about the record, not about the claims.
        exit_code: 0 consistent, 1 mismatch, 2 unverifiable.
    """

    status: Status
    problems: tuple[str, ...]
    caveats: tuple[str, ...]
    recomputed: int
    headline: str | None = None

    @property
    def exit_code(self) -> int:
        """Return the command's exit code."""
        return _EXIT_CODES[self.status]


@dataclass
class _Notes:
    mismatches: list[str] = field(default_factory=list)
    unknowns: list[str] = field(default_factory=list)
    caveats: list[str] = field(default_factory=list)
    recomputed: int = 0
    headline: str | None = None

    def result(self) -> VerifyResult:
        status: Status = "mismatch" if self.mismatches else "unverifiable" if self.unknowns else "consistent"
        problems = [printable(line, 500) for line in (*self.mismatches, *self.unknowns)]
        return VerifyResult(
            status=status,
            problems=tuple(problems),
            caveats=tuple(self.caveats),
            recomputed=self.recomputed,
            headline=self.headline,
        )


def verify_bundle(
    path: Path, contracts: Path | None = None, public_key: Path | None = None, *, rejudge: Rejudge | None = None
) -> VerifyResult:
    """Verify a bundle folder or ``.tar.gz``.

    Args:
        path: the bundle.
        contracts: folder of the contracts it should have been judged by; their digests are compared.
        public_key: key its statement should be signed with. Bundles are not signed yet, so this fails.
        rejudge: replaces the re-judging of kill records (see ``recheck_sabotage``).

    Raises:
        InputError: when it is not a bundle at all: unreadable, unsafe, or without a manifest.
    """
    store = open_store(path)
    recorded = parse_manifest(store.read(MANIFEST, MAX_BYTES), MANIFEST)
    notes = _Notes()
    actual = manifest_of(store)
    notes.mismatches += [f"missing file: {name}" for name in recorded if name not in actual]
    notes.mismatches += [f"added file: {name}" for name in actual if name not in recorded]
    notes.mismatches += [
        f"changed file: {name}" for name in recorded if name in actual and actual[name] != recorded[name]
    ]
    _check_signature(store, public_key, notes)
    try:
        _check_contents(store, contracts, rejudge or recheck_sabotage, notes)
    except InputError as error:
        # A file that the manifest lists and that cannot be used was damaged; anything else is not ours to judge.
        (notes.mismatches if notes.mismatches else notes.unknowns).append(str(error))
    if contracts is None:
        notes.caveats.append(_UNSIGNED)
    notes.caveats += [_FABRICATED, _REPORT]
    return notes.result()


def _check_signature(store: Store, public_key: Path | None, notes: _Notes) -> None:
    if public_key is None:
        return
    if "statement.dsse.json" in store.names():
        notes.unknowns.append("statement.dsse.json: this version cannot check signatures")
    else:
        notes.mismatches.append("not signed: a public key was given and the bundle has no statement.dsse.json")


def _check_contents(store: Store, contracts_folder: Path | None, rejudge: Rejudge, notes: _Notes) -> None:
    from q4kd.harness.judge import JUDGE_VERSION  # the judge and its checks are only needed from here on

    version = read_object(store, "findings.json").get("judge_version")
    if version != JUDGE_VERSION:
        notes.unknowns.append(f"judge version {version!r} is unknown here; this program judges by {JUDGE_VERSION}")
        return
    findings = parse_findings(store.read("findings.json"), "findings.json")
    notes.headline = printable(headline(findings), 300)
    contracts = bundle_contracts(store)
    profile = read_profile(findings["profile"], store)
    recorded = Plan.from_json(read_object(store, "plan.json"))
    plan = make_plan(contracts, profile, recorded.select)
    notes.mismatches += plan_differences(recorded, plan)
    if findings["scope"] != plan.scope:
        notes.mismatches.append(f"scope recorded as {findings['scope']}, expected {plan.scope}")
    _check_findings(store, findings, contracts, plan, rejudge, notes)
    if contracts_folder is not None:
        notes.mismatches += _contract_differences(store, contracts_folder, findings["profile"])
    _check_interchange(store, findings, notes)


def bundle_contracts(store: Store) -> list[Contract]:
    """Load the contracts kept in a bundle, as run."""
    names = [
        name
        for name in store.names()
        if name.startswith("contracts/") and name.count("/") == 1 and name.endswith((".yaml", ".yml"))
    ]
    return [parse_contract(name.split("/")[1].rsplit(".", 1)[0], store.read(name, MAX_BYTES), name) for name in names]


def _check_findings(
    store: Store, findings: Mapping[str, Any], contracts: list[Contract], plan: Plan, rejudge: Rejudge, notes: _Notes
) -> None:
    claims = {claim.key: claim for contract in contracts for claim in contract.claims}
    wanted = {entry.key: entry for entry in plan.entries if entry.scope != "out_of_scope"}
    keys = [row["key"] for row in findings["findings"]]
    notes.mismatches += [f"{key}: required by the plan and without a finding" for key in wanted if key not in keys]
    notes.mismatches += [f"{key}: a finding that is not in the plan" for key in keys if key not in wanted]
    if len(keys) != len(set(keys)):
        notes.mismatches.append("findings: a claim is listed twice")
    runs = read_runs(store)
    for name, run in runs.items():
        try:
            if run.harness_error is None and run.fault is not None:
                notes.mismatches.append(f"runs/{name}: made with the fault {run.fault}, among clean runs")
        except InputError as error:
            notes.mismatches.append(f"runs/{name}: {error}")
    for row in findings["findings"]:
        if row["key"] in wanted:
            if row["scope"] != wanted[row["key"]].scope:
                notes.mismatches.append(f"{row['key']}: scope recorded as {row['scope']}")
            _check_finding(store, row, claims[row["key"]], runs, findings["profile"], rejudge, notes)
    code = exit_code(findings["findings"], findings["scope"])
    if findings["exit_code"] != code:
        notes.mismatches.append(f"exit code recorded as {findings['exit_code']}, recomputed {code}")
    counts = summary(plan, findings["findings"])
    if findings["summary"] != counts:
        notes.mismatches.append(f"summary recorded as {findings['summary']}, recomputed {counts}")


def _check_finding(
    store: Store,
    row: Mapping[str, Any],
    claim: Claim,
    runs: Mapping[str, RawRun],
    profile: str,
    rejudge: Rejudge,
    notes: _Notes,
) -> None:
    for name in ("contract", "id", "rule", "prediction", "if_fails"):
        if row[name] != getattr(claim, name):
            notes.mismatches.append(f"{claim.key}: {name} differs from the contract")
    mine = runs_of(claim.falsifier.experiment, runs) if claim.falsifier else {}
    if sorted(row["runs"]) != sorted(mine) and (row["runs"] or row["verdict"] != "inconclusive"):
        notes.mismatches.append(f"{claim.key}: judged on {row['runs']}, the bundle holds {sorted(mine)}")
    try:
        result = as_json(_recompute(store, row, claim, mine, profile, rejudge))
    except Exception as error:  # a check met raw files it was never meant to: that is a finding, not a crash
        notes.mismatches.append(f"{claim.key}: cannot be judged again: {type(error).__name__}: {error}")
        return
    if result is None:
        if row["verdict"] != "inconclusive":
            notes.mismatches.append(f"{claim.key}: recorded as {row['verdict']}, but it was never run to the end")
        return
    if not row["runs"] and mine and row["verdict"] == result["verdict"] == "inconclusive":
        return  # interrupted before it was judged; what was recorded of it supports no verdict either
    notes.recomputed += 1
    for name in ("verdict", "reason", "checks", "sabotage"):
        where = difference(row[name], result.get(name))
        if where is not None:
            notes.mismatches.append(f"{claim.key}: {name}{where}")


def _recompute(
    store: Store, row: Mapping[str, Any], claim: Claim, runs: Mapping[str, RawRun], profile: str, rejudge: Rejudge
) -> dict[str, Any] | None:
    """Judge a claim again; None when its experiment was not run to the end and there is nothing to judge."""
    if claim.falsifier is None:
        return {**inconclusive(PROSE), "sabotage": []}
    if not runs or any(run.harness_error is not None for run in runs.values()):
        return None
    from q4kd.harness.judge import judge_claim
    from q4kd.harness.kills import apply_kill_rule

    result = dict(judge_claim(claim, runs, profile))
    kills = rejudge(claim, profile, store, list(row["sabotage"]))
    return apply_kill_rule(result, kills)


def _contract_differences(store: Store, folder: Path, profile: str) -> list[str]:
    """Compare the digests of the contracts as run with those of ``folder``."""
    given = {f"contracts/{path.name}": read_bounded(path, MAX_BYTES) for path in contract_files(folder)}
    given[f"contracts/profiles/{profile}.yaml"] = profile_bytes(profile, folder)
    expected = {name: hashlib.sha256(data).hexdigest() for name, data in given.items()}
    held = {name: digest_of(store, name) for name in store.names() if name.startswith("contracts/")}
    lines = [f"{name}: not in the bundle" for name in expected if name not in held]
    lines += [f"{name}: not among the contracts given" for name in held if name not in expected]
    lines += [f"{name}: differs from the one given" for name in held if expected.get(name, held[name]) != held[name]]
    return lines


def _check_interchange(store: Store, findings: Mapping[str, Any], notes: _Notes) -> None:
    """Derive the other formats again: they are what other tools believe."""
    environment, inputs = read_object(store, "environment.json"), read_object(store, "inputs.json")
    names = store.names()
    if "junit.xml" in names and store.read("junit.xml") != junit(findings):
        notes.mismatches.append("junit.xml: differs from the findings")
    try:
        statement = intoto_statement(findings, environment, inputs, digest_of(store, "findings.json"))
        expected = {"ctrf.json": ctrf(findings, environment), "statement.intoto.json": statement}
    except (AttributeError, TypeError) as error:
        notes.mismatches.append(f"environment.json or inputs.json: not what a bundle holds: {error}")
        return
    for name, value in expected.items():
        if name in names and read_object(store, name) != value:
            notes.mismatches.append(f"{name}: differs from the findings")
