"""What changed between two bundles: verdicts, measurements, bounds, claims, and the machine."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from q4kd.harness.bundle.findings import headline, read_findings
from q4kd.harness.bundle.recheck import bundle_contracts, read_plan
from q4kd.harness.claims.changes import Change, contract_changes
from q4kd.harness.claims.plan import PlanEntry
from q4kd.harness.judging.results import Finding
from q4kd.harness.records.json_types import JsonRecord
from q4kd.harness.records.store import Store, read_object

# From the best to the worst: a claim that nobody can judge any more is worse off than one that survives.
_ORDER = ("corroborated", "inconclusive", "falsified")
OUT_OF_SCOPE = "out of scope"
# These differ between any two runs and say nothing about either.
_VOLATILE = ("boot_id", "schema")
_NUMBER = re.compile(r"(?<![\w.])-?\d{1,20}(?:\.\d{1,20})?(?:e[+-]?\d{1,3})?", re.ASCII)
_MAX_NUMBERS = 64


@dataclass(frozen=True, kw_only=True)
class ClaimChange:
    """A claim that differs. ``old`` and ``new`` are verdicts with their reason, ``out of scope`` or ``absent``."""

    key: str
    old: str
    new: str
    worse: bool


@dataclass(frozen=True, kw_only=True)
class Moved:
    """A measurement that differs, and the relative changes of the numbers in it where they can be paired."""

    key: str
    check: str
    old: str
    new: str
    relative: str


@dataclass(frozen=True, kw_only=True)
class BundleDiff:
    """The differences from bundle A to bundle B.

    ``headlines`` are what each says of its run; ``flips`` are claims whose verdict, scope or presence differs;
    ``bounds`` are changes of the contracts and of the parameters judged by. ``environment`` has lines ``name: A → B``
    of the machine and the packages.
    """

    headlines: tuple[str, str]
    flips: tuple[ClaimChange, ...]
    moved: tuple[Moved, ...]
    bounds: tuple[Change, ...]
    environment: tuple[str, ...]

    @property
    def worse(self) -> bool:
        """Return whether B is worse than A: a verdict or scope got worse, a claim was lost, or a bound loosened."""
        return any(flip.worse for flip in self.flips) or any(change.kind == "loosened" for change in self.bounds)


def compare_bundles(old: Store, new: Store) -> BundleDiff:
    """Compare two bundles by their findings, plans, contracts and environments. Nothing is judged again.

    Raises:
        InputError: when a file that is needed is missing or malformed.
    """
    documents = [read_findings(store) for store in (old, new)]
    before, after = ({row.key: row for row in document.rows} for document in documents)
    plans = [read_plan(store)[0] for store in (old, new)]
    flips: list[ClaimChange] = []
    moved: list[Moved] = []
    for key in dict.fromkeys([*before, *after]):
        said = _said(before.get(key), plans[0].entry(key)), _said(after.get(key), plans[1].entry(key))
        if said[0] != said[1]:
            elsewhere = said[1] == OUT_OF_SCOPE and plans[0].profile != plans[1].profile
            worse = not elsewhere and _is_worse(before.get(key), after.get(key))
            flips.append(ClaimChange(key=key, old=said[0], new=said[1], worse=worse))
        if key in before and key in after:
            moved += _moved(key, before[key], after[key])
    environments = [read_object(store, "environment.json") for store in (old, new)]
    return BundleDiff(
        headlines=(headline(documents[0]), headline(documents[1])),
        flips=tuple(flips),
        moved=tuple(moved),
        bounds=(*contract_changes(bundle_contracts(old), bundle_contracts(new)), *_profile_changes(old, new)),
        environment=tuple(_environment(*environments)),
    )


def _is_worse(old: Finding | None, new: Finding | None) -> bool:
    if old is None or new is None:
        # A claim that was not there before is no worse than it was; what it says is the gate's affair.
        return new is None
    lost_gate = old.required and not new.required
    lost_gate |= old.waiver is None and new.waiver is not None
    return lost_gate or _ORDER.index(new.verdict) > _ORDER.index(old.verdict)


def _said(row: Finding | None, entry: PlanEntry | None) -> str:
    if row is None:
        return OUT_OF_SCOPE if entry is not None and entry.scope == "out_of_scope" else "absent"
    verdict = row.stated
    if row.waiver is not None:
        verdict += f" [waived by {row.waiver.owner} until {row.waiver.expires}]"
    return verdict if row.required else f"{verdict} [not gating]"


def _moved(key: str, old: Finding, new: Finding) -> Iterator[Moved]:
    # Checks are paired by their order: it is the contract's, and a changed list of checks is shown as such.
    for was, now in zip(old.checks, new.checks, strict=False):
        if was.check != now.check:
            continue
        old_text, new_text = was.measured or "nothing", now.measured or "nothing"
        # The same text may stand for two values; the margin, measured over bound, is not rounded.
        a, b = was.margin, now.margin
        if old_text == new_text and (a is None or b is None or math.isclose(a, b, rel_tol=1e-9)):
            continue
        relative = _relative(old_text, new_text)
        if not relative and a is not None and b is not None:
            relative = f"{_change(a, b)} of the bound"
        yield Moved(key=key, check=was.check, old=old_text, new=new_text, relative=relative)


def _relative(old: str, new: str) -> str:
    """Return the relative change of every number that differs between two texts of otherwise the same words."""
    if _NUMBER.sub("#", old) != _NUMBER.sub("#", new):
        return ""
    numbers = ([float(text) for text in _NUMBER.findall(side)[:_MAX_NUMBERS]] for side in (old, new))
    return ", ".join(_change(a, b) for a, b in zip(*numbers, strict=True) if a != b)


def _change(old: float, new: float) -> str:
    if old == 0:
        return f"0 → {new:g}"
    return f"{(new - old) / abs(old):+.2%}"


def _profile_changes(old: Store, new: Store) -> Iterator[Change]:
    """Yield the profiles that both hold and that differ: what a machine provides decides which claims are required."""
    shared = set(old.names()) & set(new.names())
    for name in sorted(name for name in shared if name.startswith("contracts/profiles/")):
        if old.read(name) != new.read(name):
            yield Change(key=name.removeprefix("contracts/"), kind="changed", text="the profile's file differs")


def _environment(old: JsonRecord, new: JsonRecord) -> list[str]:
    before, after = dict(_values(old)), dict(_values(new))
    return [
        f"{name}: {before.get(name, 'absent')} → {after.get(name, 'absent')}"
        for name in sorted({*before, *after})
        if name not in _VOLATILE and before.get(name, "absent") != after.get(name, "absent")
    ]


def _values(value: JsonRecord, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield ``(dotted name, value)`` of everything below a JSON object that is not an object itself."""
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _values(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item
