"""What a check returns, the reasons it may give, and the choice of the run that it looks at."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, nextafter
from typing import Literal, TypeAlias

from q4kd.harness.records.json_types import JsonRecord
from q4kd.harness.records.raw_run import RawRun
from q4kd.trainer.errors import InputError

Verdict = Literal["corroborated", "falsified", "inconclusive"]
# What was changed, and the changed observation, whose judgement must not be "corroborated".
Mutation: TypeAlias = tuple[str, JsonRecord]

# What a check may declare in READS: properties of RawRun, and its arrays.
READABLE = ("argv", "stdout", "stderr", "events", "memory", "exit", "facts", "arrays")

# The closed list of reasons for `inconclusive`.
REASONS = {
    "prose": "the claim has no executable falsifier",
    "not run": "no run of its experiment is in the evidence",
    "harness error": "the harness failed around the run, or a check failed on its records",
    "evidence unreadable": "a raw file is missing or malformed",
    "run incomplete": "the program did not reach its end, so there is nothing to compare",
    "too few observations": "fewer observations than the claim asks for",
    "no completion marker": "the log has no line that a complete run prints",
    "no known positive": "the log lacks the line that shows the right program wrote it",
    "phase not covered": "the samples do not span the phase",
    "constant": "the reference does not vary, so agreement means nothing",
    "self comparison": "subject and reference come from the same source",
    "reference not finite": "the reference itself holds NaN or infinity",
    "accounting incomplete": "the teacher accounts for fewer bytes than the file holds",
    "unequal budget": "the arms differ in more than the treatment",
    "arms not interleaved": "the pairs were not measured in turn, so drift of the machine may be the difference",
    "utilisation not reported": "NVML names no process, so a busy device proves nothing about this program",
    "twin refused": "the valid twin was refused as well",
    "machine restarted": "the machine restarted during the run",
    "machine too busy": "the program waited for cores that others had, so that its time says nothing of it",
    "another process": "the samples or events are of another process than the run",
    "faulted run": "a planted fault can never support a clean verdict",
    "kill record stale": "the record of a caught fault does not belong to this code",
    "not shown to fail": "a planted fault, or a change to what was recorded, went unnoticed by this falsifier",
}


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """The outcome of one check.

    Attributes:
        verdict: corroborated, falsified or inconclusive.
        reason: a key of ``REASONS`` when inconclusive, else None.
        measured: what was found, for a person.
        bound: what was allowed, for a person.
        counterexample: the observation that refutes the claim, when falsified.
        margin: measured / bound where both are positive numbers and smaller is better, else None.
    """

    verdict: Verdict
    measured: str
    bound: str
    reason: str | None = None
    counterexample: str | None = None
    margin: float | None = None

    def __post_init__(self) -> None:
        """Refuse an unknown without a reason of the closed list, and a refutation without its evidence."""
        if (self.verdict == "inconclusive") != (self.reason is not None) or (
            self.reason and self.reason not in REASONS
        ):
            raise ValueError(f"verdict {self.verdict} with reason {self.reason!r}")
        if (self.verdict == "falsified") != (self.counterexample is not None):
            raise ValueError(f"verdict {self.verdict} with counterexample {self.counterexample!r}")

    @staticmethod
    def corroborated(measured: str, bound: str, margin: float | None = None) -> "Judgement":
        """Return the judgement of a prediction that held."""
        return Judgement(verdict="corroborated", measured=measured, bound=bound, margin=margin)

    @staticmethod
    def falsified(measured: str, bound: str, counterexample: str, margin: float | None = None) -> "Judgement":
        """Return the judgement of a prediction that the counterexample refutes."""
        seen = {"measured": measured, "bound": bound, "counterexample": counterexample}
        return Judgement(verdict="falsified", margin=margin, **seen)


def inconclusive(reason: str, measured: str, bound: str) -> Judgement:
    """Return an inconclusive judgement."""
    return Judgement(verdict="inconclusive", reason=reason, measured=measured, bound=bound)


def pick_run(runs: Mapping[str, RawRun], arm: str | None) -> RawRun:
    """Return the run of an arm, or the only run.

    Raises:
        InputError: when the arm is not there, or none is named and there are several.
    """
    if arm is None and len(runs) == 1:
        return next(iter(runs.values()))
    for name, run in runs.items():
        if arm is not None and name.partition(".")[2] == arm:
            return run
    expected, got = f"a run of arm {arm!r}" if arm else "one run, or params.arm", ", ".join(sorted(runs)) or "none"
    raise InputError("evidence", expected=expected, got=got, remedy="check params.arm against the experiment's arms")


def just_over(limit: float) -> float:
    """Return the next number above ``limit``."""
    return nextafter(limit, inf)


def just_under(limit: float) -> float:
    """Return the next number below ``limit``."""
    return nextafter(limit, -inf)
