"""What changed between two sets of contracts, and which changes make a claim easier to survive."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from q4kd.harness.contract import CheckUse, Claim, Contract, Falsifier

Kind = Literal["loosened", "tightened", "changed", "added"]
_UPPER = re.compile(r"(^|_)(max|ceiling|times|bytes|at_most|tolerance|limit|rtol|atol|below)(_|$)")
_LOWER = re.compile(r"(^|_)(min|floor|at_least|above)(_|$)")
_GATES = {"active": 2, "demoted": 1, "retired": 0}
_ABSENT = object()


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


def _claim_changes(was: Claim, now: Claim) -> Iterator[tuple[Kind, str]]:
    for name in ("rule", "prediction"):
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


def _falsifier_changes(was: Falsifier, now: Falsifier) -> Iterator[tuple[Kind, str]]:
    if was.experiment != now.experiment:
        yield "changed", f"experiment: {was.experiment} → {now.experiment}"
    yield from _set_changes("needs", was.needs, now.needs, more="loosened", less="tightened")
    yield from _set_changes("sabotage", was.sabotage, now.sabotage, more="tightened", less="loosened")
    if was.min_observations != now.min_observations:
        kind: Kind = "loosened" if now.min_observations < was.min_observations else "tightened"
        yield kind, f"min_observations: {was.min_observations} → {now.min_observations}"
    if was.timeout_s != now.timeout_s:
        yield "changed", f"timeout_s: {was.timeout_s} → {now.timeout_s}"
    old, new = _numbered(was.checks), _numbered(now.checks)
    yield from (("loosened", f"check removed: {name}") for name in old if name not in new)
    yield from (("tightened", f"check added: {name}") for name in new if name not in old)
    for name, use in old.items():
        if name in new:
            yield from _param_changes(use.check, name, use.params, new[name].params)


def _numbered(uses: Sequence[CheckUse]) -> dict[str, CheckUse]:
    """Key the checks by name, counting repeats, so that two uses of one check are compared in order."""
    result: dict[str, CheckUse] = {}
    for use in uses:
        repeats = sum(other.check == use.check for other in result.values())
        result[use.check if repeats == 0 else f"{use.check}#{repeats + 1}"] = use
    return result


def _set_changes(
    name: str, was: Sequence[str], now: Sequence[str], *, more: Kind, less: Kind
) -> Iterator[tuple[Kind, str]]:
    for item in sorted(set(now) - set(was)):
        yield more, f"{name} gained {item}"
    for item in sorted(set(was) - set(now)):
        yield less, f"{name} lost {item}"


def _param_changes(
    check: str, label: str, was: Mapping[str, Any], now: Mapping[str, Any]
) -> Iterator[tuple[Kind, str]]:
    old, new = dict(leaves(was)), dict(leaves(now))
    for path in sorted({*old, *new}):
        a, b = old.get(path, _ABSENT), new.get(path, _ABSENT)
        if a == b and isinstance(a, bool) == isinstance(b, bool):
            continue
        shown = f"{label}: {path}: {'absent' if a is _ABSENT else a} → {'absent' if b is _ABSENT else b}"
        yield _kind(direction(check, path), a, b), shown


def _kind(bound: str | None, was: object, now: object) -> Kind:
    if bound is None:
        return "changed"
    if was is _ABSENT or now is _ABSENT:
        return "tightened" if was is _ABSENT else "loosened"
    if not (isinstance(was, (int, float)) and isinstance(now, (int, float))):
        return "changed"
    return "loosened" if (now > was) == (bound == "upper") else "tightened"


def direction(check: str, path: str) -> Literal["upper", "lower"] | None:
    """Return whether a parameter bounds from above or below: as the check declares it, else by its name, else None."""
    from q4kd.harness.checks import CHECKS

    declared = getattr(CHECKS.get(check), "DIRECTIONS", {}).get(path)
    if declared in ("upper", "lower"):
        return "upper" if declared == "upper" else "lower"
    leaf = path.rsplit(".", 1)[-1]
    if _LOWER.search(leaf):
        return "lower"
    return "upper" if _UPPER.search(leaf) else None


def leaves(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ``(dotted path, value)`` of everything below a mapping that is not a mapping itself."""
    for key, item in value.items():
        path = f"{prefix}{key}"
        if isinstance(item, Mapping):
            yield from leaves(item, f"{path}.")
        else:
            yield path, item
