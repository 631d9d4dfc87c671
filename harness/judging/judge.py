"""From a claim and its raw runs to a verdict. Pure: the same evidence gives the same verdict, here or years later."""

from collections.abc import Mapping

from q4kd.harness.checks import CHECKS
from q4kd.harness.checks.judgement import inconclusive
from q4kd.harness.claims.model import CheckUse, Claim
from q4kd.harness.judging.results import CheckResult, ClaimResult
from q4kd.harness.records.json_types import JsonRecord, plain
from q4kd.harness.records.raw_run import RawRun
from q4kd.trainer.errors import InputError

JUDGE_VERSION = 2
# A claim is worth its worst check: one refutation refutes it, one unknown leaves it unknown.
_ORDER = ("falsified", "inconclusive", "corroborated")
# Checks of time, and the share of a run's work that may have waited for a core before they refute nothing.
_TIMED = ("gpu_utilization", "latency", "ratio")
_BUSY_SHARE = 0.1


def judge_claim(claim: Claim, runs: Mapping[str, RawRun], profile: str) -> ClaimResult:
    """Judge one claim.

    Args:
        claim: the claim.
        runs: the raw runs of its experiment, by run name.
        profile: name of the machine profile whose bounds apply.

    Returns:
        Its verdict and reason, and those of each check. Whatever the checks say, evidence of another process or of two
        boots supports no verdict, and neither a planted fault nor a run that was killed or failed supports
        ``corroborated``. What a busy machine may have caused does not refute.
    """
    if claim.falsifier is None:
        return ClaimResult.inconclusive("prose", runs)
    falsifier = claim.falsifier.for_profile(profile)
    if not runs:
        return ClaimResult.inconclusive("not run")
    if any(run.harness_error is not None for run in runs.values()):
        return ClaimResult.inconclusive("harness error", runs)
    checks = tuple(judge_check(use, runs, falsifier.min_observations) for use in falsifier.checks)
    worst = min(checks, key=lambda check: _ORDER.index(check.verdict))
    verdict, reason = worst.verdict, worst.reason
    if verdict != "inconclusive":
        found = next((why for run in runs.values() if (why := foreign(run)) is not None), None)
        if found is None and verdict == "falsified":
            timed = worst.check in _TIMED
            found = next((why for run in runs.values() if (why := delayed(run, timed)) is not None), None)
        if found is None and verdict == "corroborated":
            found = next((why for run in runs.values() if (why := unsupporting(run)) is not None), None)
        if found is not None:
            verdict, reason = "inconclusive", found
    return ClaimResult(verdict=verdict, reason=reason, checks=checks, runs=tuple(sorted(runs)))


def foreign(run: RawRun) -> str | None:
    """Return why a run's records are not of one process within one boot, or None when they are."""
    try:
        ending = run.exit
        pid, boot = ending.get("pid"), ending.get("boot_id")
        if pid is None or boot is None:
            return "evidence unreadable"
        if ending.get("boot_id_end") != boot:
            return "machine restarted"
        if run.pids() - {pid}:
            return "another process"
    except Exception:  # malformed evidence: unknown whose it is
        return "evidence unreadable"
    return None


def delayed(run: RawRun, timed: bool) -> str | None:
    """Return why a run's time refutes nothing, or None when it may.

    A limit is one of the program's own time: where the wall time alone has passed it, the program waited for cores. A
    check of time (``timed``) says nothing where more than a tenth of the work waited.
    """
    try:
        ending = run.exit
        waited, worked = float(ending.get("waited_s", 0)), float(ending.get("cpu_s", 0))
        own, limit = float(ending.get("wall_s", 0)) - waited, float(ending.get("timeout_s", 0))
    except Exception:  # malformed evidence: unknown what it waited for
        return "evidence unreadable"
    ended_waiting = ending.get("cause") == "timeout" and waited > 0 and own < limit
    return "machine too busy" if ended_waiting or (timed and waited > _BUSY_SHARE * (worked + waited)) else None


def unsupporting(run: RawRun) -> str | None:
    """Return why a run can refute a claim but never support it, or None when it can do both."""
    try:
        before_program, _, _ = " ".join(map(str, run.argv["argv"])).partition(" -- ")
        if run.fault is not None or "--fault" in before_program.split():
            return "faulted run"
        if run.exit.get("cause") != "exited" or run.exit.get("returncode") not in (0, *run.argv.get("exits", ())):
            return "run incomplete"
    except Exception:  # malformed evidence: unknown how it was made
        return "evidence unreadable"
    return None


def judge_check(use: CheckUse, runs: Mapping[str, RawRun], min_observations: int) -> CheckResult:
    """Extract one check's observation and judge it."""
    check = CHECKS[use.check]
    observation: JsonRecord = {}
    try:
        observation = check.extract(runs, use.params, min_observations)
        judgement = check.judge(observation, use.params, min_observations)
    except InputError as error:  # a record is missing or malformed
        judgement = inconclusive("evidence unreadable", str(error)[:300], "evidence that can be read")
    except Exception as error:  # the check itself failed: nothing was learnt about the claim
        message = f"{type(error).__name__}: {error}"[:300]
        judgement = inconclusive("harness error", message, "a check that can judge this record")
    params = {name: plain(value) for name, value in use.params.items()}
    return CheckResult(check=use.check, params=params, observation=observation, **vars(judgement))
