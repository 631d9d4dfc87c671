"""What judging gives, from one check to the findings of a whole run, and the form of it in ``findings.json``.

Everything here is frozen. ``to_json`` gives what is written; ``from_json`` reads what ``findings.schema.json`` has
accepted, and gives back in ``to_json`` exactly what it was given.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from q4kd.harness.checks.judgement import Verdict
from q4kd.harness.claims.waivers import Waiver
from q4kd.harness.records.json_types import JsonObject, JsonRecord, plain


class KillStatus(StrEnum):
    """What the sabotaged runs of one fault showed. The value is the word that the detail of an outcome begins with."""

    CAUGHT = "caught"
    MISSED = "missed"
    MISFIRE = "misfire"
    VOID = "VOID"
    STALE = "kill record stale"  # no record of it belongs to this code


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """One check with what it observed and decided. ``observation`` is None, or empty, when nothing could be extracted.

    The fields from ``verdict`` on are those of ``Judgement``.
    """

    check: str
    params: JsonRecord
    observation: JsonRecord | None
    verdict: Verdict
    reason: str | None
    measured: str | None
    bound: str | None
    counterexample: str | None
    margin: float | None


@dataclass(frozen=True, kw_only=True)
class Mutations:
    """How many spoilt records were judged again, how many turned the verdict, and the names of some that did not."""

    tried: int
    caught: int
    missed: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class KillOutcome:
    """One planted fault as a claim's falsifier saw it.

    ``detail`` says the status and what was seen, for a person. ``verdict`` is None when the sabotaged runs were not
    judged, ``record`` (the key of the kill record) when there is none.
    """

    fault: str
    status: KillStatus
    detail: str | None
    verdict: Verdict | None = None
    record: str | None = None

    @staticmethod
    def of(fault: str, status: KillStatus, seen: str) -> "KillOutcome":
        """Return an outcome without a verdict or a record, whose detail is its status and what was seen."""
        return KillOutcome(fault=fault, status=status, detail=f"{status}: {seen}")

    @property
    def caught(self) -> bool:
        """Return whether the sabotaged runs were judged falsified, as they had to be."""
        return self.status is KillStatus.CAUGHT

    def to_json(self) -> JsonObject:
        """Return the entry of ``sabotage`` in a finding."""
        return {name: value for name, value in vars(self).items() if name != "status"} | {"caught": self.caught}

    @staticmethod
    def from_json(entry: JsonRecord) -> "KillOutcome":
        """Read what ``to_json`` wrote. The status follows from ``caught``, then from the first word of ``detail``."""
        fields = {name: value for name, value in entry.items() if name != "caught"}
        told = next((status for status in KillStatus if (entry["detail"] or "").startswith(status)), KillStatus.MISSED)
        status = KillStatus.CAUGHT if entry["caught"] else KillStatus.MISSED if told is KillStatus.CAUGHT else told
        return KillOutcome(**fields, status=status)


@dataclass(frozen=True, kw_only=True)
class ClaimResult:
    """What became of one claim.

    ``reason`` is a key of ``REASONS`` when it is inconclusive, else None. ``checks`` are in the order of the contract,
    ``runs`` names what was judged below ``runs/``, and ``sabotage`` has one outcome for each fault of the claim.
    ``mutations`` is None when the checks themselves did not corroborate. ``seconds`` is wall time.
    """

    verdict: Verdict
    reason: str | None = None
    checks: tuple[CheckResult, ...] = ()
    runs: tuple[str, ...] = ()
    mutations: Mutations | None = None
    sabotage: tuple[KillOutcome, ...] = ()
    seconds: float | None = None

    @staticmethod
    def inconclusive(reason: str, runs: Iterable[str] = ()) -> "ClaimResult":
        """Return the result of a claim that could not be judged."""
        return ClaimResult(verdict="inconclusive", reason=reason, runs=tuple(sorted(runs)))

    @property
    def deciding(self) -> CheckResult | None:
        """Return the first check whose verdict is the claim's, or None."""
        return next((check for check in self.checks if check.verdict == self.verdict), None)

    def to_json(self) -> JsonObject:
        """Return every field as JSON."""
        fields = dataclasses.asdict(self) | {"sabotage": [kill.to_json() for kill in self.sabotage]}
        return {name: plain(value) for name, value in fields.items()}

    @staticmethod
    def from_json(row: JsonRecord) -> "ClaimResult":
        """Read what ``to_json`` wrote (KeyError or TypeError for anything else)."""
        return ClaimResult(**_parts(row))


@dataclass(frozen=True, kw_only=True)
class Finding(ClaimResult):
    """The result of a claim with the claim that it is about, as ``Claim`` has it.

    ``scope`` says whether the verdict counts for the exit code; ``experiment`` is None for a prose claim; ``waiver`` is
    the one that applies, or None.
    """

    contract: str
    id: str
    key: str
    rule: str
    prediction: str
    scope: Literal["required", "not_gating"]
    experiment: str | None
    if_fails: str
    waiver: Waiver | None = None

    @property
    def required(self) -> bool:
        """Return whether the verdict counts for the exit code."""
        return self.scope == "required"

    @property
    def waived(self) -> bool:
        """Return whether it is inconclusive and a waiver excuses that."""
        return self.verdict == "inconclusive" and self.waiver is not None

    @property
    def stated(self) -> str:
        """Return the verdict with its reason in parentheses, where it has one."""
        return f"{self.verdict}({self.reason})" if self.reason else self.verdict

    @property
    def message(self) -> str:
        """Return one line: why it is not corroborated, or what was measured when it is; and who waived it."""
        return self._why if self.waiver is None else f"{self._why}; {self.waiver}"

    @property
    def _why(self) -> str:
        if (check := self.deciding) is not None:
            said = check.counterexample or f"measured {check.measured}, bound {check.bound}"
            return f"{self.reason}: {said}" if self.reason else said
        if self.mutations is not None and self.mutations.missed:
            return f"{self.reason}: not noticed: {self.mutations.missed[0]}"
        return self.reason or self.verdict

    def to_json(self) -> JsonObject:
        """Return the finding as it stands in ``findings.json``; ``waiver`` only where there is one."""
        return {name: value for name, value in super().to_json().items() if name != "waiver" or value is not None}

    @staticmethod
    def from_json(row: JsonRecord) -> "Finding":
        """Read a row that fits the schema (ValueError for a waiver whose day is none)."""
        return Finding(**_parts(row), waiver=Waiver(**row["waiver"]) if "waiver" in row else None)


def _parts(row: JsonRecord) -> dict[str, Any]:
    """Return the fields of a row, without its waiver, as those of a result or a finding."""
    fields = {name: value for name, value in row.items() if name != "waiver"}
    fields["checks"] = tuple(CheckResult(**check) for check in row["checks"])
    fields["runs"] = tuple(row["runs"])
    if (found := row["mutations"]) is not None:
        fields["mutations"] = Mutations(**{**found, "missed": tuple(found["missed"])})
    fields["sabotage"] = tuple(KillOutcome.from_json(entry) for entry in row["sabotage"])
    return fields


@dataclass(frozen=True, kw_only=True)
class Carried:
    """An experiment whose runs were taken over from another bundle, because nothing they depend on had changed.

    ``bundle`` is the SHA-256 of that bundle's manifest, ``name`` what it was called, and ``created`` when its findings
    were written (ISO 8601); it is the bundle that the runs were made for, over however many others they came. ``runs``
    has a digest of the files of each run, by its name.
    """

    experiment: str
    bundle: str
    name: str
    created: str
    runs: Mapping[str, str]

    def to_json(self) -> JsonObject:
        """Return the entry of ``carried`` in the findings."""
        return {name: plain(value) for name, value in vars(self).items()}

    @staticmethod
    def from_json(entry: JsonRecord) -> "Carried":
        """Read what ``to_json`` wrote."""
        return Carried(**entry)


@dataclass(frozen=True, kw_only=True)
class Findings:
    """One verdict for each claim in scope, the counts, and the exit code that follows from them.

    ``rows`` are the findings in the order of the plan; ``created`` is ISO 8601, UTC; ``scope`` is ``partial`` when a
    selection left claims out; ``carried`` are experiments taken over from another bundle. The schema describes every
    field.
    """

    schema: str
    judge_version: int
    profile: str
    created: str
    scope: Literal["full", "partial"]
    summary: Mapping[str, int]
    exit_code: int
    rows: tuple[Finding, ...]
    carried: tuple[Carried, ...] = ()

    def to_json(self) -> JsonObject:
        """Return what ``findings.json`` holds; ``carried`` only where something was."""
        fields = {name: plain(value) for name, value in vars(self).items() if name not in ("rows", "carried")}
        carried = {"carried": [entry.to_json() for entry in self.carried]} if self.carried else {}
        return {**fields, **carried, "findings": [row.to_json() for row in self.rows]}

    @staticmethod
    def from_json(document: JsonRecord) -> "Findings":
        """Read a document that fits the schema (ValueError for a waiver whose day is none)."""
        fields = {name: value for name, value in document.items() if name not in ("findings", "carried")}
        carried = tuple(Carried.from_json(entry) for entry in document.get("carried", ()))
        return Findings(**fields, carried=carried, rows=tuple(Finding.from_json(row) for row in document["findings"]))
