"""What changed between two sets of contracts, and which changes make a claim easier to survive.

Whatever cannot be shown to be as strict as before counts as loosened: a bound that moved the wrong way, but also
another metric, another experiment, or a bound stated where the check has a default that it does not declare.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from q4kd.harness.claims.feasibility import read_work
from q4kd.harness.claims.model import CheckUse, Claim, Contract, Falsifier
from q4kd.harness.claims.profile import Profile

Kind = Literal["loosened", "tightened", "changed", "added"]
_GATES = {"active": 2, "demoted": 1, "retired": 0}


class _Absent:
    """A parameter that is not stated."""

    def __repr__(self) -> str:
        return "absent"


_ABSENT = _Absent()


@dataclass(frozen=True, kw_only=True, order=True)
class Change:
    """One change of one claim. ``loosened`` means that something which was refuted may now survive."""

    key: str
    kind: Kind
    text: str


def contract_changes(old: Sequence[Contract], new: Sequence[Contract]) -> list[Change]:
    """Return the changes from ``old`` to ``new``, by claim. A removed claim counts as loosened."""
    before = {claim.key: (contract, claim) for contract in old for claim in contract.claims}
    after = {claim.key: (contract, claim) for contract in new for claim in contract.claims}
    changes = [Change(key=key, kind="loosened", text="claim removed") for key in before if key not in after]
    changes += [Change(key=key, kind="added", text="claim added") for key in after if key not in before]
    for key in before.keys() & after.keys():
        (was_in, was), (now_in, now) = before[key], after[key]
        if was_in.status != now_in.status:
            kind: Kind = "loosened" if _GATES[now_in.status] < _GATES[was_in.status] else "tightened"
            changes.append(Change(key=key, kind=kind, text=f"contract {was_in.status} → {now_in.status}"))
        changes += [Change(key=key, kind=kind, text=text) for kind, text in _claim_changes(was, now)]
    return sorted(changes)


def profile_changes(old: Sequence[Profile], new: Sequence[Profile]) -> list[Change]:
    """Return the changes of the machine classes: what a profile stops providing puts claims out of scope there.

    A roofline that was raised, or is no longer a measured one, lets the audit of time bounds pass what it refused.
    """
    before, after = ({profile.name: profile for profile in profiles} for profiles in (old, new))
    changes: list[Change] = []
    for name in sorted({*before, *after}):
        was, now = before.get(name), after.get(name)
        found: list[tuple[Kind, str]] = []
        if was is None or now is None:
            found.append(("loosened", "profile removed") if now is None else ("added", "profile added"))
        else:
            found += _set_changes("provides", sorted(was.provides), sorted(now.provides), more="tightened")
            for roof in sorted({*was.rooflines, *now.rooflines}):
                rates = [profile.rooflines.get(roof) for profile in (was, now)]
                a, b = (_ABSENT if rate is None or not rate.measured else rate.value for rate in rates)
                if a != b:
                    kind = "tightened" if a is _ABSENT else _kind("upper", a, b)
                    found.append((kind, f"measured roofline {roof}: {a} → {b}"))
        changes += [Change(key=f"profile {name}", kind=kind, text=text) for kind, text in found]
    return sorted(changes)


def _claim_changes(was: Claim, now: Claim) -> Iterator[tuple[Kind, str]]:
    for name in ("rule", "prediction", "if_fails"):
        if getattr(was, name) != getattr(now, name):
            yield "changed", f"{name}: {getattr(was, name)!r} → {getattr(now, name)!r}"
    if was.falsifier is None or now.falsifier is None:
        if was.falsifier is not None:
            yield "loosened", "falsifier removed: the claim is prose now"
        elif now.falsifier is not None:
            yield "tightened", "falsifier added"
        return
    base = list(_falsifier_changes(was.falsifier, now.falsifier))
    yield from base
    for profile in sorted({*was.falsifier.profiles, *now.falsifier.profiles}):
        pair = was.falsifier.for_profile(profile), now.falsifier.for_profile(profile)
        yield from (
            (kind, f"on {profile}: {text}") for kind, text in _falsifier_changes(*pair) if (kind, text) not in base
        )
    for name in ("flops", "bytes"):
        a, b = (_ABSENT if claim.work is None else getattr(read_work(claim.work), name) for claim in (was, now))
        if a != b:
            yield "tightened" if a is _ABSENT else _kind("lower", a, b), f"work: {name}: {a} → {b}"


def _falsifier_changes(was: Falsifier, now: Falsifier) -> Iterator[tuple[Kind, str]]:
    if was.experiment != now.experiment:
        yield "loosened", f"experiment: {was.experiment} → {now.experiment} (another run: cannot be compared)"
    yield from _set_changes("needs", was.needs, now.needs, more="loosened")
    yield from _set_changes("sabotage", was.sabotage, now.sabotage, more="tightened")
    if was.min_observations != now.min_observations:
        yield (
            _kind("lower", was.min_observations, now.min_observations),
            f"min_observations: {was.min_observations} → {now.min_observations}",
        )
    if was.timeout_s != now.timeout_s:
        # None stands for each arm's own limit, which the contract does not tell: that cannot be compared.
        kind = _kind("upper", was.timeout_s, now.timeout_s)
        yield kind, f"timeout_s: {was.timeout_s or 'default'} → {now.timeout_s or 'default'}"
    for label, old, new in _paired(was.checks, now.checks):
        if old is None or new is None:
            yield ("loosened", f"check removed: {label}") if new is None else ("tightened", f"check added: {label}")
        else:
            yield from _param_changes(old.check, label, old.params, new.params)


def _paired(was: Sequence[CheckUse], now: Sequence[CheckUse]) -> Iterator[tuple[str, CheckUse | None, CheckUse | None]]:
    """Pair the uses of each check: equal ones are left out, the others stand in their order."""
    for name in dict.fromkeys(use.check for use in (*was, *now)):
        old, new = [use for use in was if use.check == name], [use for use in now if use.check == name]
        for use in list(old):
            if use in new:
                old.remove(use)
                new.remove(use)
        for number, (a, b) in enumerate(itertools.zip_longest(old, new), 1):
            yield name if number == 1 else f"{name}#{number}", a, b


def _set_changes(name: str, was: Sequence[str], now: Sequence[str], *, more: Kind) -> Iterator[tuple[Kind, str]]:
    less: Kind = "tightened" if more == "loosened" else "loosened"
    for item in sorted(set(now) - set(was)):
        yield more, f"{name} gained {item}"
    for item in sorted(set(was) - set(now)):
        yield less, f"{name} lost {item}"


def _param_changes(
    check: str, label: str, was: Mapping[str, Any], now: Mapping[str, Any]
) -> Iterator[tuple[Kind, str]]:
    old, new = dict(leaves(was)), dict(leaves(now))
    for path in sorted({*old, *new}):
        default = _default(check, path)
        a, b = old.get(path, default), new.get(path, default)
        if a == b and isinstance(a, bool) == isinstance(b, bool):
            continue
        name = ".".join(path)
        bound = direction(check, name)
        note = "" if _comparable(bound, a, b) else " (cannot be compared)"
        yield _kind(bound, a, b), f"{label}: {name}: {a} → {b}{note}"


def _kind(bound: str | None, was: object, now: object) -> Kind:
    """Return what a step from ``was`` to ``now`` means: tightened only where that is certain.

    An ``upper`` bound is stricter when smaller, a ``lower`` one when greater. A ``lower`` list names things that must
    all hold, an ``upper`` one things that are let through.
    """
    grown: Kind = "loosened" if bound == "upper" else "tightened"
    shrunk: Kind = "tightened" if bound == "upper" else "loosened"
    if not _comparable(bound, was, now):
        return "loosened"
    if isinstance(was, (int, float)) and isinstance(now, (int, float)):
        return grown if now > was else shrunk
    assert isinstance(was, list) and isinstance(now, list)
    kept, held = all(item in now for item in was), all(item in was for item in now)
    return grown if kept and not held else shrunk if held and not kept else "loosened"


def _comparable(bound: str | None, was: object, now: object) -> bool:
    numbers = isinstance(was, (int, float)) and isinstance(now, (int, float))
    return bound is not None and (numbers or (isinstance(was, list) and isinstance(now, list)))


def direction(check: str, name: str) -> str | None:
    """Return whether a check declares a parameter, by its dotted path, an ``upper`` or a ``lower`` bound; else None."""
    from q4kd.harness.checks import CHECKS

    declared: Mapping[str, str] = getattr(CHECKS.get(check), "DIRECTIONS", {})
    return declared.get(name)


def _default(check: str, path: tuple[str, ...]) -> object:
    """Return the value that a check's schema declares for a parameter that is not stated."""
    from q4kd.harness.checks import CHECKS

    schema: Any = getattr(CHECKS.get(check), "PARAMS", {})
    for key in path:
        schema = schema.get("properties", {}).get(key, {}) if isinstance(schema, Mapping) else {}
    return schema.get("default", _ABSENT) if isinstance(schema, Mapping) else _ABSENT


def leaves(value: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield ``(path, value)`` of everything below a mapping that is not a mapping with something in it."""
    for key, item in value.items():
        path = (*prefix, str(key))
        if isinstance(item, Mapping) and item:
            yield from leaves(item, path)
        else:
            yield path, item
