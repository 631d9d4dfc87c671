"""Verification: from the raw files of a bundle, draw every verdict again and compare. No GPU, no torch, no network.

A bundle that was made up from scratch, raw files included, is out of its reach; ``VerifyResult.caveats`` says so.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from q4kd.harness.bundle import dsse, recheck
from q4kd.harness.bundle.carried import carried_problems
from q4kd.harness.bundle.exporters import signed_statement, statement_of
from q4kd.harness.bundle.findings import NOT_RUN, PROSE, exit_code, headline, read_findings, summary
from q4kd.harness.bundle.writer import MANIFEST, seal_problems
from q4kd.harness.claims.model import Claim, Contract
from q4kd.harness.claims.plan import Plan, make_plan, plan_differences
from q4kd.harness.claims.profile import read_profile
from q4kd.harness.claims.waivers import applying
from q4kd.harness.judging.results import ClaimResult, Finding, Findings
from q4kd.harness.records.raw_run import RawRun, read_runs, runs_of
from q4kd.harness.records.store import Store, open_store, read_object, snapshot
from q4kd.trainer.errors import InputError
from q4kd.trainer.yaml_lines import printable

Status = Literal["consistent", "mismatch", "unverifiable"]
_EXIT_CODES: Mapping[Status, int] = {"consistent": 0, "mismatch": 1, "unverifiable": 2}
_NOT_JUDGED = (NOT_RUN, "harness error")
_FABRICATED = (
    "raw files invented together with their verdicts, or taken out with the claim recorded as not run, are beyond what "
    "re-judging can detect"
)
_UNSIGNED = (
    "consistent; authenticity not established: without --contracts or a signature, a bundle that was edited and sealed "
    "again with looser bounds looks the same"
)
_REPORT = "report.html and findings.md are hashed but not recomputed; make your own with `q4kd evidence report`"


@dataclass(frozen=True, kw_only=True)
class VerifyResult:
    """What verification found.

    ``unverifiable`` means that this program cannot tell. ``problems`` say why the status is not consistent, ``caveats``
    what a consistent bundle still does not show. ``recomputed`` counts the verdicts drawn again from raw files. The
    ``headline`` is what the bundle says of its run: "consistent" is about the record, not about the claims.
    ``signed_by`` are fingerprints of the keys asked for whose signatures are valid.
    """

    status: Status
    problems: tuple[str, ...]
    caveats: tuple[str, ...]
    recomputed: int
    headline: str | None = None
    signed_by: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """0 consistent, 1 mismatch, 2 unverifiable."""
        return _EXIT_CODES[self.status]


@dataclass
class _Notes:
    mismatches: list[str] = field(default_factory=list)
    unknowns: list[str] = field(default_factory=list)
    caveats: list[str] = field(default_factory=list)
    recomputed: int = 0
    headline: str | None = None
    signed_by: tuple[str, ...] = ()

    def result(self) -> VerifyResult:
        status: Status = "mismatch" if self.mismatches else "unverifiable" if self.unknowns else "consistent"
        problems = [printable(line, 500) for line in (*self.mismatches, *self.unknowns)]
        return VerifyResult(
            status=status,
            problems=tuple(problems),
            caveats=tuple(self.caveats),
            recomputed=self.recomputed,
            headline=self.headline,
            signed_by=self.signed_by if status == "consistent" else (),
        )


def verify_bundle(path: Path, contracts: Path | None = None, public_keys: Sequence[Path] = ()) -> VerifyResult:
    """Verify a bundle folder, ``.tar.xz`` or ``.tar.gz``.

    Args:
        path: the bundle.
        contracts: folder of the contracts it should have been judged by; their digests are compared.
        public_keys: keys that must each have signed it.

    Raises:
        InputError: it is unreadable, unsafe, or without any of a bundle's files; or a key is not one.
    """
    return verify_store(snapshot(open_store(path), str(path)), contracts, public_keys)


def verify_store(store: Store, contracts: Path | None = None, public_keys: Sequence[Path] = ()) -> VerifyResult:
    """Verify the files of a bundle, which must not change meanwhile (see ``verify_bundle``)."""
    notes = _Notes()
    notes.mismatches += seal_problems(store)
    envelope = _check_signature(store, public_keys, notes)
    try:
        _check_contents(store, contracts, envelope, notes)
    except InputError as error:
        # A file that the manifest lists and that cannot be used was damaged; anything else is not ours to judge.
        (notes.mismatches if notes.mismatches else notes.unknowns).append(str(error))
    except Exception as error:  # a bundle is hostile input: whatever it breaks here is a result, not a crash
        notes.unknowns.append(f"cannot be judged: {type(error).__name__}: {error}")
    if contracts is None and not public_keys:
        notes.caveats.append(_UNSIGNED)
    if envelope is not None and not public_keys:
        names = ", ".join(envelope.signatures)
        notes.caveats.append(printable(f"signed by {names}; not checked, for want of --public-key", 300))
    notes.caveats += [_FABRICATED, _REPORT]
    return notes.result()


def _check_signature(store: Store, public_keys: Sequence[Path], notes: _Notes) -> dsse.Envelope | None:
    """Check the envelope's signatures, and that it is about this manifest; return it, None without one to read."""
    if dsse.ENVELOPE not in store.names():
        if public_keys:
            notes.mismatches.append(f"not signed: a public key was given and the bundle has no {dsse.ENVELOPE}")
        return None
    keys = [dsse.load_public_key(path) for path in public_keys]
    try:
        envelope = dsse.read_envelope(store.read(dsse.ENVELOPE))
    except InputError as error:
        notes.mismatches.append(str(error))
        return None
    bad = dsse.unsigned_by(envelope, keys)
    notes.mismatches += bad
    notes.signed_by = () if bad else tuple(dsse.fingerprint(key) for key in keys)
    # The whole statement is compared once the findings are read; this holds even for a judge that is unknown here.
    digest = hashlib.sha256(store.read(MANIFEST)).hexdigest() if MANIFEST in store.names() else "none"
    if f'"{digest}"'.encode() not in envelope.payload:
        notes.mismatches.append(f"{dsse.ENVELOPE}: signed for another bundle, or for this one before it was changed")
    return envelope


def _check_contents(store: Store, contracts_folder: Path | None, envelope: dsse.Envelope | None, notes: _Notes) -> None:
    from q4kd.harness.judging.judge import JUDGE_VERSION  # the judge and its checks are only needed from here on

    version = read_object(store, "findings.json").get("judge_version")
    if version != JUDGE_VERSION:
        notes.unknowns.append(f"judge version {version!r} is unknown here; this program judges by {JUDGE_VERSION}")
        return
    findings = read_findings(store)
    notes.headline = printable(headline(findings), 300)
    contracts = recheck.bundle_contracts(store)
    profile = read_profile(findings.profile, store)
    recorded, written = recheck.read_plan(store)
    plan = make_plan(
        contracts,
        profile,
        recorded.select,
        given=recorded.given,
        waivers=recorded.waivers,
        extras=recorded.extras,
    )
    notes.mismatches += plan_differences(recorded, plan)
    environment = read_object(store, "environment.json")
    for wrong, said in (
        recheck.waiver_lines(plan, contracts, findings.created),
        recheck.extras_lines(plan, environment),
    ):
        notes.mismatches += wrong
        notes.caveats += said
    notes.mismatches += [f"plan: unknown field {key}" for key in sorted(set(written) - set(plan.to_json()))]
    notes.mismatches += recheck.given_differences(recorded, read_object(store, "inputs.json"))
    if findings.scope != plan.scope:
        notes.mismatches.append(f"scope recorded as {findings.scope}, expected {plan.scope}")
    if environment.get("profile") != findings.profile:
        notes.mismatches.append("environment.json: made on another profile than the findings")
    _check_findings(store, findings, contracts, plan, notes)
    if contracts_folder is not None:
        notes.mismatches += recheck.contract_differences(store, contracts_folder, findings.profile)
    notes.mismatches += recheck.interchange_differences(store, findings)
    if envelope is not None:
        expected = signed_statement(statement_of(store, findings), store.read(MANIFEST))
        if envelope.payload != dsse.encode_payload(expected):
            notes.mismatches.append(f"{dsse.ENVELOPE}: the signed statement is not the one that the findings give")


def _check_findings(store: Store, findings: Findings, contracts: list[Contract], plan: Plan, notes: _Notes) -> None:
    claims = {claim.key: claim for contract in contracts for claim in contract.claims}
    wanted = {entry.key: entry for entry in plan.entries if entry.scope != "out_of_scope"}
    keys = [row.key for row in findings.rows]
    notes.mismatches += [f"{key}: required by the plan and without a finding" for key in wanted if key not in keys]
    notes.mismatches += [f"{key}: a finding that is not in the plan" for key in keys if key not in wanted]
    if len(keys) != len(set(keys)):
        notes.mismatches.append("findings: a claim is listed twice")
    runs = read_runs(store)
    _check_runs(runs, claims, notes)
    notes.mismatches += carried_problems(store, findings, runs)
    kills = recheck.KillReplay(store)
    for row in findings.rows:
        if row.key in wanted:
            if row.scope != wanted[row.key].scope:
                notes.mismatches.append(f"{row.key}: scope recorded as {row.scope}")
            _check_finding(row, claims[row.key], runs, findings.profile, kills, notes)
            if row.waiver != applying(plan.waivers, row.key, row.verdict, row.scope, findings.created):
                notes.mismatches.append(f"{row.key}: the waiver recorded is not what the plan gives")
    code = exit_code(findings.rows, findings.scope)
    if findings.exit_code != code:
        notes.mismatches.append(f"exit code recorded as {findings.exit_code}, recomputed {code}")
    counts = summary(plan, findings.rows)
    if findings.summary != counts:
        notes.mismatches.append(f"summary recorded as {findings.summary}, recomputed {counts}")


def _check_runs(runs: Mapping[str, RawRun], claims: Mapping[str, Claim], notes: _Notes) -> None:
    """Every run must be of an experiment that some claim names, and without a planted fault."""
    used = {claim.falsifier.experiment for claim in claims.values() if claim.falsifier}
    for name, run in runs.items():
        if name not in used and not any(name.startswith(f"{experiment}.") for experiment in used):
            notes.mismatches.append(f"runs/{name}: of no experiment that a claim names")
        try:
            if run.harness_error is None and run.fault is not None:
                notes.mismatches.append(f"runs/{name}: made with the fault {run.fault}, among clean runs")
        except InputError as error:
            notes.mismatches.append(f"runs/{name}: {error}")


def _check_finding(
    row: Finding, claim: Claim, runs: Mapping[str, RawRun], profile: str, kills: recheck.KillReplay, notes: _Notes
) -> None:
    for name in ("contract", "id", "rule", "prediction", "if_fails"):
        if getattr(row, name) != getattr(claim, name):
            notes.mismatches.append(f"{claim.key}: {name} differs from the contract")
    experiment = claim.falsifier.experiment if claim.falsifier else None
    if row.experiment != experiment:
        notes.mismatches.append(f"{claim.key}: experiment differs from the contract")
    mine = runs_of(experiment, runs) if experiment else {}
    not_judged = row.verdict == "inconclusive" and row.reason in _NOT_JUDGED and not row.runs
    if not not_judged:
        if sorted(row.runs) != sorted(mine):
            notes.mismatches.append(f"{claim.key}: judged on {list(row.runs)}, the bundle holds {sorted(mine)}")
        if absent := recheck.arms_of(experiment) - set(mine):
            notes.mismatches.append(f"{claim.key}: judged without the runs {sorted(absent)} of its experiment")
    elif row.checks or row.sabotage:
        notes.mismatches.append(f"{claim.key}: recorded as {row.reason}, with checks or faults all the same")
    try:
        result = _recompute(row, claim, mine, profile, kills)
        told = {} if result is None else result.to_json()
        recomputed = {name: recheck.as_json(value) for name, value in told.items()}
    except Exception as error:  # a check met raw files it was never meant to: that is a finding, not a crash
        notes.mismatches.append(f"{claim.key}: cannot be judged again: {type(error).__name__}: {error}")
        return
    if result is None:
        if not not_judged:
            notes.mismatches.append(f"{claim.key}: recorded as {row.verdict}, but it was never run to the end")
        return
    if not_judged and result.verdict != "falsified":
        return  # stopped before it was judged: less is claimed than the raw files show, and no refutation is hidden
    notes.recomputed += 1
    recorded = row.to_json()
    for name in ("verdict", "reason", "checks", "mutations", "sabotage"):
        where = recheck.difference(recorded[name], recomputed[name])
        if where is not None:
            notes.mismatches.append(f"{claim.key}: {name}{where}")


def _recompute(
    row: Finding, claim: Claim, runs: Mapping[str, RawRun], profile: str, kills: recheck.KillReplay
) -> ClaimResult | None:
    """Judge a claim again; None when its experiment was not run to the end and there is nothing to judge."""
    if claim.falsifier is None:
        return ClaimResult.inconclusive(PROSE)
    if not runs or any(run.harness_error is not None for run in runs.values()):
        return None
    from q4kd.harness.judging.judge import judge_claim
    from q4kd.harness.judging.kills import apply_kill_rule
    from q4kd.harness.judging.mutations import apply_mutation_rule

    result = judge_claim(claim, runs, profile)
    if not row.runs:
        return result
    result = apply_mutation_rule(claim, runs, profile, result)
    return apply_kill_rule(result, kills.judge_again(claim, profile, row.sabotage))
