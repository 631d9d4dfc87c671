"""Kill records as they are filed: their fields, and the one place that reads and the one that writes them."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from q4kd.harness.checks.judgement import Verdict
from q4kd.harness.records.json_types import JsonObject, plain
from q4kd.trainer.errors import InputError

RECORDS_FORMAT = "q4kd-kills/1"


@dataclass(frozen=True, kw_only=True)
class KillRecord:
    """What is filed of one fault and one claim's falsifier. It is never believed: its raw runs are judged again.

    ``raw`` names the archive of the raw runs; its SHA-256 is None until it is filed. ``parts`` are the digests of what
    makes the record valid, by name. The verdict and the package versions are those of the time, ``created`` (ISO 8601).
    """

    contract: str
    id: str
    fault: str
    experiment: str
    raw: str
    raw_sha256: str | None = None
    profile: str | None = None
    parts: Mapping[str, str] = field(default_factory=dict)
    verdict: Verdict | None = None
    caught: bool | None = None
    detail: str | None = None
    runs: Sequence[str] = ()
    judge_version: int | None = None
    created: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def claim(self) -> str:
        """Return the key of the claim, ``contract::id``."""
        return f"{self.contract}::{self.id}"

    @property
    def subject(self) -> tuple[str, str, str]:
        """Return what only one record may be about: contract, claim and fault."""
        return self.contract, self.id, self.fault

    def __post_init__(self) -> None:
        if not all(isinstance(part, str) for part in (*self.subject, self.experiment, self.raw)):
            raise TypeError("a record whose subject, experiment or archive is not text")
        if not isinstance(self.parts, Mapping):
            raise TypeError("a record whose parts are not an object")


def kill_records(records: Mapping[str, KillRecord]) -> JsonObject:
    """Return what ``records.json``, or ``kills.json`` of a bundle, holds."""
    return {"format": RECORDS_FORMAT, "records": {key: plain(vars(record)) for key, record in records.items()}}


def read_kill_records(document: object, origin: str) -> dict[str, KillRecord]:
    """Read what ``kill_records`` gave, leaving out fields that are not known here.

    Raises:
        InputError: another format, or a record that lacks its subject or its archive.
    """
    if not isinstance(document, Mapping) or document.get("format") != RECORDS_FORMAT:
        remedy = "run `q4kd sabotage` to make them anew"
        raise InputError(origin, expected=RECORDS_FORMAT, got="another format", remedy=remedy)
    known = {item.name for item in dataclasses.fields(KillRecord)}
    try:
        return {
            str(key): KillRecord(**{name: value for name, value in record.items() if name in known})
            for key, record in document["records"].items()
        }
    except (AttributeError, KeyError, TypeError) as error:
        remedy = "run `q4kd sabotage` to make them anew"
        raise InputError(origin, expected="kill records by key", got=str(error)[:200], remedy=remedy) from error
