"""The rules a contract must obey: its JSON Schema, and what a schema cannot say. Each error quotes the line."""

import difflib
import importlib.resources
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import cast, get_args

from q4kd.harness import checks
from q4kd.harness.claims.entries import KEYS, Entry
from q4kd.harness.claims.model import CheckUse, Falsifier, Status
from q4kd.harness.claims.schema_match import Schema
from q4kd.harness.records.json_types import JsonObject
from q4kd.trainer.files import parse_json
from q4kd.trainer.yaml_lines import Document, ValuePath, printable

_LOG_CHECKS = frozenset({"log_absent", "log_present"})


@dataclass(frozen=True, kw_only=True)
class KnownNames:
    """The experiments and faults that contracts may name."""

    experiments: frozenset[str]
    faults: frozenset[str]


def registered_names() -> KnownNames:
    """Return the names in the registries of experiments and faults. Imports neither torch nor the program under test.

    A project that adds its own to the registries has them here as well.
    """
    from q4kd.harness.runs.experiment import EXPERIMENTS
    from q4kd.harness.runs.faults import all_faults

    return KnownNames(experiments=frozenset(EXPERIMENTS), faults=frozenset(all_faults()))


def read_schema(registered: JsonObject | bool) -> JsonObject:
    """Return ``contract.schema.json`` as installed, but with ``$defs.registered`` as given."""
    source = importlib.resources.files("q4kd.contracts") / "contract.schema.json"
    schema: JsonObject = parse_json(source.read_bytes(), "contract.schema.json")
    return {**schema, "$defs": {**cast("JsonObject", schema["$defs"]), "registered": registered}}


@lru_cache(maxsize=1)
def _structure() -> Schema:
    # Names and parameters are checked below against the registries themselves, which say what was meant instead.
    return Schema(read_schema(registered=True))


def validate(document: Document) -> JsonObject:
    """Return a document's mapping when it obeys ``contract.schema.json`` (InputError when it does not)."""
    if not isinstance(document.value, dict):
        got, remedy = type(document.value).__name__, "start with `metadata:` and `falsification_tests:`"
        raise document.error((), expected="a mapping at the top of a contract", got=got, remedy=remedy)
    _structure().require(document, (), document.value, "see contracts/contract.schema.json")
    return document.value


def read_status(document: Document, metadata: JsonObject, executable: bool, warnings: list[str]) -> Status:
    """Return the contract's status. An unknown one is an error, or a warning where every claim is prose anyway."""
    given = metadata.get("status", "active")
    if given in get_args(Status):
        return cast("Status", given)
    if executable:
        expected = "active, demoted or retired"
        raise document.error(("metadata", "status"), expected=expected, got=repr(given), remedy="use one of the three")
    warnings.append(f"status {printable(str(given))!r} is not active, demoted or retired; read as active")
    return "active"


def near_misses(document: Document, raw: JsonObject, entries: Sequence[Entry], warnings: list[str]) -> None:
    """A misspelt key would make claims vanish: refuse it in an entry, warn about it at the top level."""
    for key in raw:
        if key not in KEYS and _resembles(str(key), KEYS[0], 0.7):
            line = document.line((key,))
            warnings.append(f"line {line}: {printable(str(key))!r} is not read; did you mean {KEYS[0]!r}?")
    for entry in entries:
        for key in entry.value:
            if key != "falsifier" and _resembles(str(key), "falsifier", 0.8):
                remedy = "write 'falsifier'; as it stands the claim would be prose"
                raise document.error((*entry.path, key), expected="the key 'falsifier'", got=repr(key), remedy=remedy)


def _resembles(key: str, name: str, ratio: float) -> bool:
    """Return whether ``key`` may be a misspelt ``name``; lengths that exclude it cost nothing."""
    return 2 * min(len(key), len(name)) >= ratio * (len(key) + len(name)) and _ratio(key, name) >= ratio


@lru_cache(maxsize=4096)
def _ratio(key: str, name: str) -> float:
    return difflib.SequenceMatcher(None, key, name).ratio()


_PARAMS: dict[str, tuple[JsonObject, Schema]] = {}


def _params_schema(check: str, params: JsonObject) -> Schema:
    """Return the schema of a check's parameters, compiled once for each check."""
    if check not in _PARAMS or _PARAMS[check][0] is not params:
        _PARAMS[check] = params, Schema(params)
    return _PARAMS[check][1]


def _check_params(document: Document, path: ValuePath, falsifier: Falsifier) -> None:
    """Validate the parameters of every check, and of the primary one under every profile's overrides."""
    uses: list[tuple[ValuePath, ValuePath, CheckUse]] = [((*path, "check"), (*path, "params"), falsifier.checks[0])]
    for index, use in enumerate(falsifier.also):
        here: ValuePath = (*path, "also", index)
        uses.append(((*here, "check"), (*here, "params"), use))
    for profile in falsifier.profiles:
        here = (*path, "profiles", profile, "params")
        uses.append(((*path, "check"), here, falsifier.for_profile(profile).checks[0]))
    for check_path, params_path, use in uses:
        _require_name(document, check_path, "checks", use.check, checks.CHECKS)
        schema = _params_schema(use.check, checks.CHECKS[use.check].PARAMS)
        schema.require(document, params_path, use.params, f"see the parameters of the check {use.check}")


def require_finite(document: Document, path: ValuePath, value: object) -> None:
    """Refuse infinities and NaN anywhere in ``value``."""
    if isinstance(value, float) and not math.isfinite(value):
        raise document.error(path, expected="a finite number", got=str(value), remedy="a bound must be a real number")
    if isinstance(value, Mapping):
        for key, item in value.items():
            require_finite(document, (*path, key), item)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            require_finite(document, (*path, index), item)


def check_falsifier(
    document: Document,
    path: ValuePath,
    falsifier: Falsifier,
    status: Status,
    profiles: Sequence[str] | None,
    has_work: bool,
    names: KnownNames | None,
) -> None:
    """Refuse a falsifier that could pass on nothing, or that names what does not exist.

    ``has_work`` says whether the entry states its work, which claims about time must and others must not.
    """
    used = {use.check for use in falsifier.checks}
    if "log_absent" in used and used <= _LOG_CHECKS:
        expected = "log_absent beside a check that does not read the log"
        remedy = "add a measuring check under `also:`; a log line that was reworded is absent too"
        raise document.error((*path, "check"), expected=expected, got="log checks alone", remedy=remedy)
    if status == "active" and not falsifier.sabotage:
        expected = "at least one fault under `sabotage:` in an active contract"
        remedy = "name a fault that this falsifier must catch; a check never seen to fail proves nothing"
        raise document.error(path, expected=expected, got="none", remedy=remedy)
    for key, items in (("needs", falsifier.needs), ("sabotage", falsifier.sabotage)):
        if len(set(items)) < len(items):
            remedy = "keep one of the two"
            raise document.error((*path, key), expected="each name once", got=", ".join(items), remedy=remedy)
    for name in falsifier.profiles:
        if profiles is not None and name not in profiles:
            expected = f"a profile among {', '.join(sorted(set(profiles)))}"
            remedy = f"name one of them, or add profiles/{name}.yaml beside the contract"
            raise document.error((*path, "profiles", name), expected=expected, got=repr(name), remedy=remedy)
    _check_params(document, path, falsifier)
    _check_work(document, path, falsifier, has_work)
    if names is not None:
        _require_name(document, (*path, "experiment"), "experiments", falsifier.experiment, names.experiments)
        for index, fault in enumerate(falsifier.sabotage):
            _require_name(document, (*path, "sabotage", index), "faults", fault, names.faults)


def _check_work(document: Document, path: ValuePath, falsifier: Falsifier, has_work: bool) -> None:
    """Require work where a check bounds a time, and only there: without it no bound could be found infeasible."""
    timed = [use.check for use in falsifier.checks if checks.time_bounds(use.check)]
    if timed and not has_work:
        expected = f"`work:` beside a check that bounds a time, as {timed[0]} does"
        remedy = "state the least FLOP and bytes of what is timed; without them nobody can tell a bound from a wish"
        raise document.error((*path, "check"), expected=expected, got="none", remedy=remedy)
    if has_work and not timed:
        expected = "`work:` only beside a check that bounds a time"
        got = f"the checks {', '.join(use.check for use in falsifier.checks)}"
        raise document.error((*path, "work"), expected=expected, got=got, remedy="remove it")


def _require_name(document: Document, path: ValuePath, kind: str, name: str, known: Iterable[str]) -> None:
    """Refuse a name that is not in a registry, with the nearest one that is."""
    registered = sorted(known)
    if name not in registered:
        close = difflib.get_close_matches(name, registered, 1)
        shown = f" {', '.join(registered)}" if len(registered) <= 20 else ""
        expected = f"one of the {len(registered)} registered {kind}{shown}"
        remedy = f"did you mean {close[0]!r}?" if close else "use one of them; the registry is closed"
        raise document.error(path, expected=expected, got=repr(name), remedy=remedy)
