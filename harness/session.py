"""One falsification session: contracts, plan, runner and bundle, shared by pytest's controller and its workers."""

import contextlib
import functools
import hashlib
import shutil
import tempfile
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path

from q4kd.harness.bundle import writer as bundles
from q4kd.harness.bundle.exporters import write_interchange
from q4kd.harness.bundle.findings import PROSE, assemble, headline, sabotage_lines
from q4kd.harness.changed.carry import Taken, experiments_of, record_dependencies, take
from q4kd.harness.claims.contract import load_contracts
from q4kd.harness.claims.folder import find_contracts
from q4kd.harness.claims.model import Claim, Contract
from q4kd.harness.claims.plan import Plan, make_plan
from q4kd.harness.claims.profile import detect_profile, find_extras, load_profile
from q4kd.harness.claims.waivers import applying, expired_lines, load_waivers, today
from q4kd.harness.falsify import new_bundle_path, refuse_used
from q4kd.harness.judging.judge import JUDGE_VERSION, judge_claim
from q4kd.harness.judging.kills import Kills, apply_kill_rule, recorded_seconds, rejudge
from q4kd.harness.judging.mutations import apply_mutation_rule
from q4kd.harness.judging.results import ClaimResult, Findings
from q4kd.harness.progress import Progress
from q4kd.harness.records.store import DirectoryStore
from q4kd.harness.runs.ahead import Ahead
from q4kd.harness.runs.cores import Closed
from q4kd.harness.runs.experiment import Inputs
from q4kd.harness.runs.runner import ExperimentRunner, HarnessError, Isolation
from q4kd.harness.runs.user_inputs import GivenFiles
from q4kd.trainer.errors import InputError
from q4kd.trainer.files import read_json, write_atomic, write_json
from q4kd.trainer.yaml_lines import printable

HARNESS_ERROR = "harness error"
_COLOURS = {"corroborated": "green", "falsified": "red", "inconclusive": "yellow"}


@dataclass(frozen=True)
class Outcome:
    """A verdict as pytest shows it: ``line`` in one line, ``text`` in full."""

    verdict: str
    gating: bool
    line: str
    text: str
    waived: bool = False


@dataclass
class Session:
    """What the items of one pytest process share. Only the controller (``assembles``) writes the findings."""

    folder: Path
    profile: str
    contracts: Sequence[Contract]
    plan: Plan
    bundle: Path
    kills: Kills
    runner: ExperimentRunner | None
    assembles: bool
    owns_inputs: bool
    by_path: Mapping[Path, Contract] = field(init=False)
    folders: Set[Path] = field(init=False)  # that of the contracts, and those in it that hold some
    claims: Mapping[str, Claim] = field(init=False)
    taken: Taken = field(default_factory=Taken)
    findings: Findings | None = None
    trouble: str | None = None
    progress: Progress | None = None
    _ahead: Ahead | None = None
    _outcomes: dict[str, Outcome] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = {contract.name: contract for contract in self.contracts}
        found = find_contracts(self.folder)
        self.by_path = {path: names[path.stem] for path in found.files}
        self.folders = {parent for path in found.files for parent in path.parents if parent.is_relative_to(self.folder)}
        self.claims = {claim.key: claim for contract in self.contracts for claim in contract.claims}

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        profile: str | None,
        keyword: str,
        bundle: str | None,
        kills: str | None,
        waivers: str | None = None,
        worker: Mapping[str, str] | None,
        dry: bool,
        given: GivenFiles | None = None,
        inputs: str | None = None,
        carried: str | None = None,
        workers: int | None = None,
        isolation: Isolation = "fork",
    ) -> "Session":
        """Start or, in a worker, join a session.

        Raises:
            InputError: for contracts, a profile, a selection, waivers or a bundle folder that cannot be used.
        """
        contracts = load_contracts(folder)
        if worker is not None:
            name, target, made = worker["q4kd_profile"], Path(worker["q4kd_bundle"]), Path(worker["q4kd_inputs"])
        else:
            name = profile or detect_profile()
            target = refuse_used(Path(bundle) if bundle else new_bundle_path(name)).resolve()
        given = given or GivenFiles()
        keys = {claim.key for contract in contracts for claim in contract.claims}
        waived = load_waivers(Path(waivers), keys) if waivers else ()
        target_profile = load_profile(name, folder)
        plan = make_plan(
            contracts,
            target_profile,
            keyword or None,
            given=given.names(),
            waivers=waived,
            extras=find_extras(given=given.names()),
        )
        store = Kills.for_profile(target_profile, Path(kills) if kills else None)
        taken = Taken()
        if dry:
            return cls(folder, name, contracts, plan, target, store, None, False, False)
        if worker is None:
            bundles.open_bundle(target, folder, name, plan, {})
            made = Path(inputs).resolve() if inputs else Path(tempfile.mkdtemp(prefix="q4kd-inputs-"))
            taken = take(Path(carried), target) if carried else Taken.nothing()
        runner = ExperimentRunner(target, Inputs(made, name, given), name, workers=workers, isolation=isolation)
        owns = worker is None and not inputs
        return cls(folder, name, contracts, plan, target, store, runner, worker is None, owns, taken)

    def for_worker(self) -> dict[str, str]:
        """Return what an xdist worker needs to join."""
        assert self.runner is not None
        return {
            "q4kd_profile": self.profile,
            "q4kd_bundle": str(self.bundle),
            "q4kd_inputs": str(self.runner.inputs.folder),
        }

    def out_of_scope(self, claim: Claim) -> str | None:
        """Return why the claim does not apply on this profile, or None when it does."""
        entry = self.plan.entry(claim.key)
        return entry.reason or "" if entry is not None and entry.scope == "out_of_scope" else None

    def run_ahead(self, keys: Iterable[str]) -> None:
        """Start the experiments of these claims side by side, and judge each claim as soon as its runs are there."""
        assert self.runner is not None
        asking: dict[str, list[Claim]] = {}
        for claim in (self.claims[key] for key in keys):
            if claim.falsifier is not None and self.out_of_scope(claim) is None:
                asking.setdefault(claim.falsifier.experiment, []).append(claim)
        self.runner.expected = recorded_seconds(self.kills, asking)
        self.progress = Progress(self.runner, asking)
        self.runner.prepare_forks(asking)
        jobs = {name: functools.partial(self._run_and_judge, name, claims) for name, claims in asking.items()}
        self._ahead = Ahead(self.runner.cores, jobs)

    def _run_and_judge(self, experiment: str, claims: Sequence[Claim]) -> None:
        assert self.runner is not None
        with contextlib.suppress(HarnessError, InputError):  # it is recorded, and each claim is told again
            self.runner.run(experiment, timeout_s=self._timeout(experiment))
        for claim in claims:
            with self.runner.cores.taken(0):
                self._outcomes[claim.key] = self._evaluate(claim)

    def evaluate(self, claim: Claim) -> Outcome:
        """Run the claim's experiment unless it was run, judge it, apply the kill rule, and record the result."""
        if self._ahead is not None and claim.falsifier is not None:
            self._ahead.wait(claim.falsifier.experiment)
        return self._outcomes.get(claim.key) or self._evaluate(claim)

    def _evaluate(self, claim: Claim) -> Outcome:
        started = time.monotonic()
        error = ""
        try:
            result = self._judge(claim)
        except Exception as problem:  # the harness failed, so nothing was learnt about the claim
            result = ClaimResult.inconclusive(HARNESS_ERROR)
            told = isinstance(problem, (HarnessError, InputError))
            error = str(problem) if told else "".join(traceback.format_exception(problem)[-8:])
        if self.runner is not None and self.runner.cores.closed:
            raise Closed  # the session was ended, and its runs with it: they show nothing of the claim
        result = replace(result, seconds=round(time.monotonic() - started, 3))
        partial = self.bundle / ".partial" / f"{hashlib.sha256(claim.key.encode()).hexdigest()}.json"
        partial.parent.mkdir(exist_ok=True)
        write_json(partial, {"key": claim.key, "result": result.to_json()})
        return self._outcome(claim, result, error)

    def _judge(self, claim: Claim) -> ClaimResult:
        if claim.falsifier is None:
            return ClaimResult.inconclusive(PROSE)
        assert self.runner is not None
        name = claim.falsifier.experiment
        runs = self.runner.run(name, timeout_s=self._timeout(name))
        judged = apply_mutation_rule(claim, runs, self.profile, judge_claim(claim, runs, self.profile))
        return apply_kill_rule(judged, rejudge(claim, self.profile, self.kills))

    def _timeout(self, experiment: str) -> float | None:
        """An experiment shared by several claims gets the longest time that any of them allows."""
        falsifiers = [claim.falsifier.for_profile(self.profile) for claim in self.claims.values() if claim.falsifier]
        times = [f.timeout_s for f in falsifiers if f.experiment == experiment and f.timeout_s is not None]
        return max(times, default=None)

    def _outcome(self, claim: Claim, result: ClaimResult, error: str) -> Outcome:
        entry = self.plan.entry(claim.key)
        verdict = result.verdict
        what = verdict if result.reason is None else f"{verdict} ({result.reason})"
        lines = [f"{claim.key}: {what}", f"  claim     {claim.rule}", f"  predicts  {claim.prediction}"]
        for check in result.checks:
            lines.append(f"  {check.check}: {check.verdict}: measured {check.measured}, bound {check.bound}")
            lines += [f"    counterexample: {check.counterexample}"] if check.counterexample else []
            lines += [f"    reason: {check.reason}"] if check.reason else []
        lines += [f"  mutation not noticed: {name}" for name in (result.mutations.missed if result.mutations else ())]
        lines += [f"  fault {kill.fault}: {kill.detail}" for kill in result.sabotage if not kill.caught]
        lines += [f"  {line}" for line in error.splitlines()]
        if verdict == "falsified" and claim.if_fails:
            lines.append(f"  if this fails: {claim.if_fails}")
        lines += [f"  evidence  {self.bundle / 'runs' / run}" for run in result.runs]
        gating = entry is None or entry.scope == "required"
        scope = "required" if gating else "not_gating"
        if (waiver := applying(self.plan.waivers, claim.key, verdict, scope, today())) is not None:
            lines[0] += f"; {waiver}"
        clean = [printable(line) for line in lines]
        return Outcome(verdict, gating, clean[0], "\n".join(clean), waived=waiver is not None)

    def finish(self) -> int:
        """Assemble the bundle from what the items recorded and seal it; return the findings' exit code."""
        if self._ahead is not None:
            self._ahead.stop()  # whoever stops early wants no more of it
        results = {}
        for path in sorted((self.bundle / ".partial").glob("*.json")):
            record = read_json(path)
            results[record["key"]] = ClaimResult.from_json(record["result"])
        carried = self.taken.carried
        self.findings = assemble(self.plan, self.contracts, results, judge_version=JUDGE_VERSION, carried=carried)
        for scratch in (".partial", ".locks"):
            shutil.rmtree(self.bundle / scratch, ignore_errors=True)
        used = [kill.record for finding in self.findings.rows for kill in finding.sabotage if kill.record]
        self.kills.copy_to(self.bundle / "sabotage", used)
        if self.runner is not None:
            write_json(self.bundle / "inputs.json", {**self.taken.inputs, **self.runner.inputs.digests()})
        bundles.write_findings(self.bundle, self.findings)
        self.trouble = self._record_dependencies()
        try:
            close_bundle(self.bundle)
        except Exception as problem:  # without report or seal the findings stand, but the bundle cannot be handed on
            self.trouble = f"the bundle could not be finished: {type(problem).__name__}: {problem}"
            return self.findings.exit_code or 2
        return self.findings.exit_code if self.trouble is None else self.findings.exit_code or 2

    def _record_dependencies(self) -> str | None:
        given = self.runner.inputs.given if self.runner is not None else GivenFiles()
        return record_dependencies(self.bundle, experiments_of(self.plan, self.contracts), given, self.taken)

    def summary_lines(self) -> list[tuple[str, str | None]]:
        """Return the lines of the final table, each with its colour."""
        if self.findings is None:
            return [("no findings were written", "red")]
        lines: list[tuple[str, str | None]] = []
        for finding in self.findings.rows:
            at = None if finding.reason else finding.deciding
            why = finding.reason or (at and (at.counterexample or at.measured)) or ""
            if finding.mutations is not None and finding.mutations.missed:
                why = f"{why}: not noticed: {finding.mutations.missed[0]}"
            mark = "" if finding.required else " [not gating]"
            text = f"{finding.verdict:<13} {finding.key}{mark}  {why}"
            lines.append((printable(text), _COLOURS[finding.verdict]))
            if finding.waiver is not None:
                lines.append((printable(f"{'':<13} {finding.waiver}"), "yellow"))
        lines += [(printable(line), "red") for line in expired_lines(self.plan.waivers, self.findings.created)]
        for entry in self.plan.entries:
            if entry.scope == "out_of_scope":
                lines.append((printable(f"{'out of scope':<13} {entry.key}  {entry.reason}"), None))
        lines += [("", None), (headline(self.findings), None)]
        lines += [(line, None) for line in sabotage_lines(self.findings)]
        lines.append((f"bundle: {self.bundle}", None))
        if self.trouble:
            lines.append((printable(self.trouble), "red"))
        return lines

    def close(self) -> None:
        """End what still runs, and remove the inputs, which are large and which their digests describe."""
        if self._ahead is not None:
            self._ahead.stop()
        if self.runner is not None:
            self.runner.close()
        if self.owns_inputs and self.runner is not None:
            shutil.rmtree(self.runner.inputs.folder, ignore_errors=True)


def close_bundle(folder: Path) -> None:
    """Finish a bundle whose findings are written: interchange formats, the reports, then the seal over everything."""
    from q4kd.harness.report.html import render  # matplotlib and jinja2 are only needed here
    from q4kd.harness.report.markdown import FILE, render_markdown

    store = DirectoryStore(folder)
    write_interchange(folder, store)
    write_atomic(folder / "report.html", render(store).encode())
    write_atomic(folder / FILE, render_markdown(store).encode())
    bundles.seal(folder)
