"""Runs experiments with the sources that lie first on PYTHONPATH and judges their claims, as ``q4kd falsify`` does.

``judge REQUEST OUT`` reads ``{"profile", "work", "experiments": [{"name", "limit_s", "claims"}], "stop", "server"}``
and appends one JSON line a claim to OUT. Runs are forked from the process that listens on the socket ``server``. The
rule of kill records is left out: a changed function makes its records stale, which is no sight of the change. With
``stop`` it ends at the first experiment that turns a claim. A request ``{"plan": PROFILE}`` asks instead for the claims
of that profile by experiment, and for the modules that planted faults name.
"""

import json
import signal
import time
import traceback
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn


class _TooLong(BaseException):
    """Raised in the harness's own process when an experiment, its measuring included, does not end."""


def _too_long(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise _TooLong


def main(words: list[str]) -> int:
    """Judge what a request names. Returns 0; what was seen stands in the file."""
    request, out = json.loads(Path(words[0]).read_text(encoding="utf-8")), Path(words[1])
    if "plan" in request:
        out.write_text(json.dumps(_plan(request["plan"])), encoding="utf-8")
        return 0
    signal.signal(signal.SIGALRM, _too_long)
    for experiment in request["experiments"]:
        signal.alarm(int(experiment["alarm_s"]))
        started = time.monotonic()
        try:
            verdicts = _judge(request, experiment)
        except _TooLong:
            verdicts = [(key, "inconclusive", "endless", "") for key in experiment["claims"]]
        except Exception as error:  # the harness failed on the changed sources: nothing was corroborated
            told = f"{type(error).__name__}: {error}"[:300]
            told = told if request["stop"] else traceback.format_exc()
            verdicts = [(key, "inconclusive", "harness error", told) for key in experiment["claims"]]
        finally:
            signal.alarm(0)
        seconds = round(time.monotonic() - started, 2)
        with out.open("a", encoding="utf-8") as file:
            for key, verdict, reason, detail in verdicts:
                row = {"experiment": experiment["name"], "claim": key, "verdict": verdict, "reason": reason}
                file.write(json.dumps({**row, "detail": detail, "seconds": seconds}) + "\n")
        if request["stop"] and any(verdict != "corroborated" for _, verdict, _, _ in verdicts):
            break
    return 0


def _plan(profile: str) -> dict[str, Any]:
    """Return ``{"experiments": {name: [claim, …]}, "named": [module, …], "origin": where q4kd was found}``."""
    import q4kd.trainer
    from q4kd.harness.claims.contract import load_contracts
    from q4kd.harness.claims.plan import make_plan
    from q4kd.harness.claims.profile import load_profile
    from q4kd.harness.runs.faults import all_faults

    folder = Path("contracts").resolve()
    contracts = load_contracts(folder)
    scopes = {entry.key: entry.scope for entry in make_plan(contracts, load_profile(profile, folder)).entries}
    experiments: dict[str, list[str]] = {}
    for claim in (claim for contract in contracts for claim in contract.claims):
        if claim.falsifier is not None and scopes.get(claim.key, "out_of_scope") != "out_of_scope":
            experiments.setdefault(claim.falsifier.experiment, []).append(claim.key)
    modules = {target.partition(":")[0] for fault in all_faults().values() for target in fault.targets}
    ours = sorted(f"{name.removeprefix('q4kd.').replace('.', '/')}.py" for name in modules if ".trainer." in name)
    return {"experiments": experiments, "named": ours, "origin": str(q4kd.trainer.__file__)}


@cache
def _claims() -> dict[str, Any]:
    from q4kd.harness.claims.contract import load_contracts

    return {claim.key: claim for contract in load_contracts(Path("contracts").resolve()) for claim in contract.claims}


def _judge(request: dict[str, Any], experiment: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Run one experiment; return claim, verdict, reason and what was measured, a row for each of its claims."""
    from mutants.preloaded import Borrowed
    from q4kd.harness.judging.judge import judge_claim
    from q4kd.harness.judging.mutations import apply_mutation_rule
    from q4kd.harness.runs.experiment import Inputs
    from q4kd.harness.runs.runner import ExperimentRunner

    work, profile = Path(request["work"]), request["profile"]
    claims = _claims()
    runner = ExperimentRunner(work, Inputs(work / "inputs", profile), profile, workers=1, isolation="fork")
    runner._server = Borrowed(Path(request["server"]))
    runs = runner.run(experiment["name"], timeout_s=experiment["limit_s"])
    rows = []
    for key in experiment["claims"]:
        claim = claims[key]
        result = apply_mutation_rule(claim, runs, profile, judge_claim(claim, runs, profile))
        worst = next((check for check in result.checks if check.verdict == result.verdict), None)
        seen = (worst.counterexample or worst.measured) if worst is not None else ""
        rows.append((key, str(result.verdict), str(result.reason or ""), str(seen)[:300]))
    return rows
