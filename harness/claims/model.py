"""What a contract says once it is read: claims, their falsifiers, and the status that decides whether they count."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypedDict

from q4kd.harness.records.json_types import JsonObject

Status = Literal["active", "demoted", "retired"]


@dataclass(frozen=True, kw_only=True)
class CheckUse:
    """One check with the parameters it is used with."""

    check: str
    params: JsonObject


class Override(TypedDict, total=False):
    """What a profile changes in a falsifier: parameters to merge, and the two limits."""

    params: JsonObject
    timeout_s: float | None
    min_observations: int


@dataclass(frozen=True, kw_only=True)
class Falsifier:
    """The executable form of a claim. All of ``checks`` must survive; ``sabotage`` must be caught."""

    check: str
    experiment: str
    params: JsonObject
    also: tuple[CheckUse, ...] = ()
    profiles: Mapping[str, Override]
    needs: tuple[str, ...] = ()
    min_observations: int = 1
    timeout_s: float | None = None
    sabotage: tuple[str, ...] = ()

    @property
    def checks(self) -> tuple[CheckUse, ...]:
        """Return every check, the primary one first."""
        return (CheckUse(check=self.check, params=self.params), *self.also)

    def for_profile(self, name: str) -> "Falsifier":
        """Return the falsifier as it applies on profile ``name``: its overrides merged in, and none left to apply."""
        override = self.profiles.get(name, {})
        return replace(
            self,
            params=merge(self.params, override.get("params", {})),
            timeout_s=override.get("timeout_s", self.timeout_s),
            min_observations=override.get("min_observations", self.min_observations),
            profiles={},
        )


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One entry of ``falsification_tests``.

    ``falsifier`` is None for a prose claim; ``prose`` is the entry as read, a bare string under ``rule``. ``work`` is
    what ``falsifier.work`` says: it stands apart because it bounds what may be claimed, not what a run shows.
    """

    contract: str
    id: str
    rule: str
    prediction: str
    if_fails: str
    line: int
    falsifier: Falsifier | None
    prose: JsonObject
    work: Mapping[str, str | float] | None = None

    @property
    def key(self) -> str:
        """Return the claim's identity, ``contract::id``."""
        return f"{self.contract}::{self.id}"


@dataclass(frozen=True, kw_only=True)
class Contract:
    """One contract file. ``raw`` is the whole document; ``warnings`` are things that load but are probably mistakes."""

    name: str
    path: str
    status: Status
    superseded_by: str | None
    description: str
    claims: tuple[Claim, ...]
    raw: JsonObject
    sha256: str
    warnings: tuple[str, ...] = ()


def merge(base: JsonObject, override: JsonObject) -> JsonObject:
    """Merge mappings key by key (RFC 7386): mappings merge, null removes the key, anything else replaces it."""
    result = dict(base)
    for key, value in override.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict):
            below = result.get(key)
            result[key] = merge(below if isinstance(below, dict) else {}, value)
        else:
            result[key] = value
    return result
