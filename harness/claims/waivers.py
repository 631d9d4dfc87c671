"""Waivers: claims that may be inconclusive for a while, by name, with an owner, a reason and a last day.

A waiver never applies to a falsified claim, and an expired one applies to nothing. Whether one applies is decided by
the day on which the findings were written, so that anyone can decide it again.
"""

import difflib
import importlib.resources
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, date, datetime
from functools import lru_cache
from pathlib import Path
from typing import cast

from q4kd.harness.claims.schema_match import Schema
from q4kd.harness.records.json_types import JsonRecord
from q4kd.trainer.files import parse_json, read_bounded
from q4kd.trainer.yaml_lines import parse_yaml

_MAX_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Waiver:
    """One waiver. ``claim`` is ``contract::id``; ``expires``, ISO 8601, is the last day (UTC) on which it holds."""

    claim: str
    owner: str
    reason: str
    expires: str

    def __post_init__(self) -> None:
        if not all(isinstance(value, str) and value for value in vars(self).values()):
            raise ValueError("a waiver needs a claim, an owner, a reason and a day")
        date.fromisoformat(self.expires)

    def holds_on(self, created: str) -> bool:
        """Return whether it has not expired at an ISO 8601 time, UTC unless that says otherwise."""
        moment = datetime.fromisoformat(created)
        day = moment if moment.tzinfo is None else moment.astimezone(UTC)
        return day.date() <= date.fromisoformat(self.expires)

    def __str__(self) -> str:
        return f"waived by {self.owner} until {self.expires}: {self.reason}"


def today() -> str:
    """Return this moment as ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@lru_cache(maxsize=1)
def _schema() -> Schema:
    source = importlib.resources.files("q4kd.harness.claims") / "waivers.schema.json"
    return Schema(parse_json(source.read_bytes(), "waivers.schema.json"))


def load_waivers(path: Path, claims: Collection[str]) -> tuple[Waiver, ...]:
    """Read a file of waivers of ``claims``, the keys there are: YAML as ``waivers.schema.json`` says.

    Raises:
        InputError: quoting file, line and text, for an unknown key, a missing one, a day that is none, a claim that
            does not exist or that is waived twice.
    """
    document = parse_yaml(read_bounded(path, _MAX_BYTES), path.name)
    problem = _schema().error(document.value)
    if problem is not None:
        expected = "waivers: a list of claim, owner, reason (10 characters or more) and expires (YYYY-MM-DD)"
        remedy = "say who answers for it, why, and until when"
        raise document.error(tuple(problem.absolute_path), expected=expected, got=problem.message[:200], remedy=remedy)
    waivers: list[Waiver] = []
    for index, entry in enumerate(cast("JsonRecord", document.value)["waivers"]):
        at = ("waivers", index)
        try:
            waiver = Waiver(**entry)
        except ValueError as error:
            expected, remedy = "a day of the calendar", "write it as YYYY-MM-DD"
            raise document.error((*at, "expires"), expected=expected, got=str(error), remedy=remedy) from error
        if waiver.claim not in claims:
            close = difflib.get_close_matches(waiver.claim, claims, 1)
            expected = "contract::id of a claim"
            remedy = f"did you mean {close[0]!r}?" if close else "`q4kd contracts show NAME` lists them"
            raise document.error((*at, "claim"), expected=expected, got=repr(waiver.claim), remedy=remedy)
        if any(known.claim == waiver.claim for known in waivers):
            expected = "one waiver for each claim"
            raise document.error((*at, "claim"), expected=expected, got="a second one", remedy="remove one")
        waivers.append(waiver)
    return tuple(waivers)


def applying(waivers: Collection[Waiver], claim: str, verdict: str, scope: str, created: str) -> Waiver | None:
    """Return the waiver of a claim, or None: it is for required claims that are inconclusive, until its last day."""
    if verdict != "inconclusive" or scope != "required":
        return None
    return next((waiver for waiver in waivers if waiver.claim == claim and waiver.holds_on(created)), None)


def expired_lines(waivers: Collection[Waiver], created: str) -> list[str]:
    """Return, one line each, the waivers that no longer hold."""
    return [
        f"error: the waiver of {waiver.claim} by {waiver.owner} expired on {waiver.expires} and does not apply"
        for waiver in waivers
        if not waiver.holds_on(created)
    ]
