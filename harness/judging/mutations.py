"""Sabotage level 1, on every run: spoil what was recorded, judge again, and see every corroborated claim turn.

Raw records are spoilt through views, so nothing is copied: an empty log, half the events or samples, arrays cut short,
no facts, another process, another boot, a planted fault, a killed run. Which of them apply to a claim is what its
checks were seen to read. Each check adds its own (``mutate``): just over each bound, constant, compared with itself.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from q4kd.harness.checks import CHECKS
from q4kd.harness.checks.judgement import READABLE
from q4kd.harness.claims.model import Claim, Falsifier
from q4kd.harness.judging.judge import judge_claim
from q4kd.harness.judging.results import ClaimResult, Mutations
from q4kd.harness.records.raw_run import Arrays, RawRun, array_file

NOT_SHOWN = "not shown to fail"
_MAX_MISSED = 20


class WatchedRun(RawRun):
    """A run that remembers, in ``seen``, what of it was looked at, and in ``files`` which files of arrays."""

    def __init__(self, base: RawRun) -> None:
        vars(self).update(vars(base))
        self.seen: set[str] = set()
        self.files: set[str] = set()

    def __getattribute__(self, name: str) -> object:
        if name in READABLE or name == "array":
            object.__getattribute__(self, "seen").add("arrays" if name == "array" else name)
        return object.__getattribute__(self, name)

    def array(self, name: str) -> Arrays:
        """Return the arrays of ``base``, and note their file."""
        self.files.add(array_file(name))
        return super().array(name)


class SpoiltRun(RawRun):
    """A run with some of its records replaced, and its arrays cut to ``rows``; everything else is that of ``base``."""

    def __init__(self, base: RawRun, records: Mapping[str, object], rows: int | None = None) -> None:
        vars(self).update(vars(base))
        vars(self).update(records)
        self._rows = rows

    def array(self, name: str) -> Arrays:
        """Return the arrays of ``base``, cut short where that is what is spoilt."""
        arrays = super().array(name)
        if self._rows is None:
            return arrays
        return {key: value[: self._rows] if value.ndim else value for key, value in arrays.items()}


def apply_mutation_rule(claim: Claim, runs: Mapping[str, RawRun], profile: str, result: ClaimResult) -> ClaimResult:
    """Return what ``judge_claim`` found for these runs with its ``mutations``, None for a claim not corroborated.

    With a mutation that still gives ``corroborated`` the result is ``inconclusive(not shown to fail)``.
    """
    if claim.falsifier is None or result.verdict != "corroborated":
        return result
    tried, missed = 0, []
    for name, verdict in (*_raw(claim, runs, profile), *_observed(claim.falsifier.for_profile(profile), result)):
        tried += 1
        if verdict == "corroborated":
            missed.append(name[:200])
    mutations = Mutations(tried=tried, caught=tried - len(missed), missed=tuple(missed[:_MAX_MISSED]))
    if missed or not tried:
        return replace(result, verdict="inconclusive", reason=NOT_SHOWN, mutations=mutations)
    return replace(result, mutations=mutations)


def reads(claim: Claim, runs: Mapping[str, RawRun], profile: str) -> dict[str, dict[str, set[str]]]:
    """Return what each check of a claim looks at: name of the check → name of the run → kinds."""
    assert claim.falsifier is not None
    falsifier = claim.falsifier.for_profile(profile)
    seen: dict[str, dict[str, set[str]]] = {}
    for use in falsifier.checks:
        watched = {name: WatchedRun(run) for name, run in runs.items()}
        CHECKS[use.check].extract(watched, use.params, falsifier.min_observations)
        for name, run in watched.items():
            seen.setdefault(use.check, {}).setdefault(name, set()).update(run.seen)
    return seen


def _raw(claim: Claim, runs: Mapping[str, RawRun], profile: str) -> Iterator[tuple[str, str]]:
    """Spoil each run in turn; yield the name of each mutation with the verdict it gave."""
    assert claim.falsifier is not None
    least = claim.falsifier.for_profile(profile).min_observations
    seen = reads(claim, runs, profile)
    for check, by_run in seen.items():
        if not any(by_run.values()):
            yield f"{check} reads no run", "corroborated"
        for kind in sorted(set().union(*by_run.values()) - set(CHECKS[check].READS)):
            yield f"{check} reads {kind}, which it does not declare", "corroborated"
    for name, run in runs.items():
        kinds = set().union(*(by_run[name] for by_run in seen.values()))
        for what, spoilt in spoil(run, kinds, least):
            yield f"{name}: {what}", judge_claim(claim, {**runs, name: spoilt}, profile).verdict


def spoil(run: RawRun, kinds: set[str], least: int) -> Iterator[tuple[str, RawRun]]:
    """Yield a run spoilt in every way that applies, with its name.

    ``kinds`` is what of it the checks look at; how it was made, and whose it is, is spoilt whatever they look at.
    Arrays are cut to one row fewer than the ``least`` observations that the claim asks for.
    """
    argv, ending = run.argv, run.exit
    yield "made with a planted fault", SpoiltRun(run, {"argv": {**argv, "fault": "planted"}})
    words = ["python", "-m", "q4kd.harness.child", "--fault", "planted", "--", "distill"]
    yield "a fault among its arguments", SpoiltRun(run, {"argv": {**argv, "argv": words}})
    yield "ended in another boot", SpoiltRun(run, {"exit": {**ending, "boot_id_end": "another"}})
    killed = {"returncode": None, "signal": 9, "cause": "killed_cause_unknown"}
    yield "killed", SpoiltRun(run, {"exit": {**ending, **killed}})
    yield "exit code 1", SpoiltRun(run, {"exit": {**ending, "returncode": 1}})
    if run.memory or run.event("process_start"):
        yield "the exit of another process", SpoiltRun(run, {"exit": {**ending, "pid": -1}})
    if run.memory:
        yield "samples of another process", SpoiltRun(run, {"memory": [{**line, "pid": -1} for line in run.memory]})
    if run.event("process_start"):
        events = [{**event, "pid": -1} if "pid" in event else event for event in run.events]
        yield "events of another process", SpoiltRun(run, {"events": events})
    if kinds & {"stdout", "stderr"} and (run.stdout or run.stderr):
        yield "an empty log", SpoiltRun(run, {"stdout": "", "stderr": ""})
    if "events" in kinds and run.events:
        yield "half the events", SpoiltRun(run, {"events": run.events[: len(run.events) // 2]})
    if "memory" in kinds and run.memory:
        yield "half the samples", SpoiltRun(run, {"memory": run.memory[: len(run.memory) // 2]})
    if "facts" in kinds and run.facts:
        yield "no facts", SpoiltRun(run, {"facts": {}})
    if "arrays" in kinds:
        yield "arrays cut short", SpoiltRun(run, {}, rows=max(least - 1, 0))


def _observed(falsifier: Falsifier, result: ClaimResult) -> Iterator[tuple[str, str]]:
    """Spoil each check's observation; yield the name of each mutation with the verdict it gave."""
    for use, found in zip(falsifier.checks, result.checks, strict=True):
        check, params = CHECKS[use.check], found.params
        mutations = check.mutate(found.observation or {}, params, falsifier.min_observations)
        if not mutations:
            yield f"{use.check} has no mutations of its own", "corroborated"
        for name, observation in mutations:
            try:
                verdict: str = check.judge(observation, params, falsifier.min_observations).verdict
            except Exception as error:  # a mutation that only breaks the judge shows nothing
                name, verdict = f"{name}: {type(error).__name__}", "corroborated"
            yield f"{use.check}: {name}", verdict
