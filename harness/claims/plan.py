"""The plan: which claims count on a profile, decided before anything runs and kept in ``plan.json``."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from q4kd.harness.claims.feasibility import assess
from q4kd.harness.claims.model import Claim, Contract
from q4kd.harness.claims.profile import EXTRAS, Profile
from q4kd.harness.claims.waivers import Waiver
from q4kd.harness.records.json_types import JsonRecord, JsonValue
from q4kd.harness.runs.user_inputs import ROLES
from q4kd.trainer.errors import InputError

Scope = Literal["required", "out_of_scope", "not_gating"]
Predicate: TypeAlias = Callable[[str], bool]
SCHEMA = "q4kd-plan/1"
_TOKEN = re.compile(r"\s*(\(|\)|[^\s()]+)")


@dataclass(frozen=True, kw_only=True)
class PlanEntry:
    """One claim of the plan.

    ``reason`` says why it is not required; ``experiment`` is None for a prose claim; ``infeasible`` is the arithmetic
    by which the profile's measured rooflines forbid the time that the claim promises, else None.
    """

    key: str
    contract: str
    id: str
    scope: Scope
    reason: str | None
    experiment: str | None
    infeasible: str | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The claims in order of contract and position. ``scope`` is partial when a selection left some out.

    ``given`` names, by role, the files that the run was given in the place of made ones (see ``runs/user_inputs.py``).
    ``extras`` are those of ``EXTRAS`` that the machine had.
    """

    profile: str
    scope: Literal["full", "partial"]
    select: str | None
    entries: tuple[PlanEntry, ...]
    given: Mapping[str, str] = field(default_factory=dict)
    waivers: tuple[Waiver, ...] = ()
    extras: tuple[str, ...] = ()

    def entry(self, key: str) -> PlanEntry | None:
        """Return the entry of a claim, or None when the plan leaves it out."""
        return next((entry for entry in self.entries if entry.key == key), None)

    def to_json(self) -> dict[str, JsonValue]:
        """Return what ``plan.json`` holds; ``given``, ``waivers`` and ``extras`` only where there are any."""
        return {
            "schema": SCHEMA,
            "profile": self.profile,
            "scope": self.scope,
            "select": self.select,
            "entries": [dict(vars(entry)) for entry in self.entries],
            **({"given": dict(self.given)} if self.given else {}),
            **({"waivers": [dict(vars(waiver)) for waiver in self.waivers]} if self.waivers else {}),
            **({"extras": list(self.extras)} if self.extras else {}),
        }

    @staticmethod
    def from_json(value: JsonRecord) -> "Plan":
        """Read what ``to_json`` wrote (InputError when it is something else)."""
        try:
            if value["schema"] != SCHEMA or value["scope"] not in ("full", "partial"):
                raise ValueError(f"schema {value['schema']!r}, scope {value['scope']!r}")
            given = {role: str(name) for role, name in value.get("given", {}).items()}
            if not given.keys() <= set(ROLES):
                raise ValueError(f"given roles {sorted(map(str, given))}")
            entries = tuple(PlanEntry(**entry) for entry in value["entries"])
            waivers = tuple(Waiver(**waiver) for waiver in value.get("waivers", ()))
            extras = tuple(str(name) for name in value.get("extras", ()))
            if list(extras) != sorted(set(extras) & set(EXTRAS)):
                raise ValueError(f"extras {list(extras)}")
            fields = {name: value[name] for name in ("profile", "scope", "select")}
            return Plan(**fields, entries=entries, given=given, waivers=waivers, extras=extras)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            expected, remedy = f"a {SCHEMA} document", "run falsify again"
            raise InputError("plan.json", expected=expected, got=str(error)[:200], remedy=remedy) from error


def make_plan(
    contracts: Sequence[Contract],
    profile: Profile,
    select: str | None = None,
    *,
    given: Mapping[str, str] | None = None,
    waivers: tuple[Waiver, ...] = (),
    extras: Iterable[str] = (),
) -> Plan:
    """Decide the scope of every claim.

    Args:
        contracts: the contracts as loaded.
        profile: the machine class to judge on.
        select: words joined by ``and``, ``or``, ``not`` and parentheses, each matched as a part of the claim's key in
            any case (``-k``). With a selection the plan is partial and cannot pass the gate (InputError if malformed).
        given: names of given files by role.
        waivers: of claims that may be inconclusive.
        extras: those of ``EXTRAS`` that the machine has.
    """
    chosen = parse_selection(select) if select else None
    found = tuple(sorted(extras))
    entries = tuple(
        _entry(contract, claim, profile, found)
        for contract in contracts
        for claim in contract.claims
        if chosen is None or chosen(claim.key)
    )
    return Plan(
        profile=profile.name,
        scope="full" if chosen is None else "partial",
        select=select or None,
        entries=entries,
        given=given or {},
        waivers=waivers,
        extras=found,
    )


def _entry(contract: Contract, claim: Claim, profile: Profile, extras: Collection[str]) -> PlanEntry:
    scope: Scope = "required"
    reason = None
    needs = set(claim.falsifier.needs) if claim.falsifier else set()
    missing = sorted(needs - profile.provides - EXTRAS.keys())
    lacking = sorted((needs & EXTRAS.keys()) - set(extras))
    if contract.status == "retired":
        scope, reason = "not_gating", "contract retired"
    elif missing:
        scope = "out_of_scope"
        reason = f"needs {', '.join(missing)}; profile {profile.name} provides {', '.join(sorted(profile.provides))}"
    elif lacking:
        scope = "out_of_scope"
        reason = "; ".join(f"needs {name}: {EXTRAS[name]}" for name in lacking)
    elif contract.status == "demoted":
        scope, reason = "not_gating", "contract demoted"
    forbidden = [found.arithmetic for found in assess(claim, profile) if found.outcome == "infeasible"]
    return PlanEntry(
        key=claim.key,
        contract=contract.name,
        id=claim.id,
        scope=scope,
        reason=reason,
        experiment=claim.falsifier.experiment if claim.falsifier else None,
        infeasible="; ".join(forbidden) or None,
    )


def parse_selection(text: str) -> Predicate:
    """Return the predicate over claim keys that a ``-k`` expression means (InputError when malformed).

    pytest's own compiler is not used: it is private, evaluates with ``eval`` what a hostile plan may say, and knows no
    ``#``, which a claim's id may hold.
    """
    parser = _Selection(_TOKEN.findall(text))
    try:
        if len(text) > 1000:
            raise ValueError("longer than 1000 characters")
        predicate = parser.either()
        if parser.tokens:
            raise ValueError(f"unexpected {parser.tokens[0]!r}")
    except (ValueError, RecursionError) as error:
        expected, remedy = "words joined by and, or, not, ( )", "for example -k 'memory and not (gpu or cuda)'"
        raise InputError("-k", expected=expected, got=f"{text[:80]!r}: {error}", remedy=remedy) from error
    return predicate


class _Selection:
    """A recursive-descent parser: ``not`` binds more tightly than ``and``, and that more tightly than ``or``."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens

    def next_is(self, word: str) -> bool:
        found = self.tokens[:1] == [word]
        del self.tokens[:found]
        return found

    def joined(self, word: str, operand: Callable[[], Predicate], holds: Callable[[Iterable[bool]], bool]) -> Predicate:
        parts = [operand()]
        while self.next_is(word):
            parts.append(operand())
        return parts[0] if len(parts) == 1 else lambda key: holds(part(key) for part in parts)

    def either(self) -> Predicate:
        return self.joined("or", lambda: self.joined("and", self.single, all), any)

    def single(self) -> Predicate:
        if self.next_is("not"):
            inner = self.single()
            return lambda key: not inner(key)
        if self.next_is("("):
            group = self.either()
            if not self.next_is(")"):
                raise ValueError("missing )")
            return group
        if not self.tokens or self.tokens[0] in ("and", "or", ")"):
            raise ValueError("a word is missing")
        word = self.tokens.pop(0).lower()
        return lambda key: word in key.lower()


def plan_differences(recorded: Plan, expected: Plan) -> list[str]:
    """Return, one line each, how a recorded plan departs from the one its contracts and profile give."""
    lines: list[str] = []
    if (recorded.profile, recorded.scope) != (expected.profile, expected.scope):
        lines.append(
            f"plan: recorded as {recorded.scope} on {recorded.profile}, expected {expected.scope} on {expected.profile}"
        )
    before, after = ({entry.key: entry for entry in plan.entries} for plan in (recorded, expected))
    if len(before) != len(recorded.entries):
        lines.append("plan: a claim is listed twice")
    lines += [f"plan: {key} is missing" for key in after if key not in before]
    lines += [f"plan: {key} is not in the contracts" for key in before if key not in after]
    for key, entry in after.items():
        if key in before and before[key] != entry:
            name = next(name for name in ("scope", *vars(entry)) if getattr(before[key], name) != getattr(entry, name))
            was, expected = getattr(before[key], name), getattr(entry, name)
            field = "is" if name == "scope" else f"has its {name}"
            lines.append(f"plan: {key} {field} recorded as {was}, expected {expected}")
    return lines
