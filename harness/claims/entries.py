"""The entries of a contract as people write them: mappings or bare sentences, with or without an id, in older words."""

import hashlib
import re
from collections import Counter
from dataclasses import dataclass
from typing import cast

from q4kd.harness.records.json_types import JsonObject
from q4kd.trainer.yaml_lines import Document, ValuePath, printable

KEYS = ("falsification_tests", "falsification_test")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:/#+-]{0,119}")
_RULE = ("rule", "description", "name")
_PREDICTION = ("prediction", "expected", "assertion")
_IF_FAILS = ("if_fails", "fails_if", "if_test_fails")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One entry of ``falsification_tests``: where it stands, what it says, and the mapping as read.

    A bare sentence is read as a mapping with that ``rule``.
    """

    path: ValuePath
    id: str
    rule: str
    prediction: str
    if_fails: str
    value: JsonObject


def read_entries(document: Document, warnings: list[str]) -> list[Entry]:
    """Return the entries of a document that obeys the schema, in order.

    An entry without a usable id, which the schema allows in prose only, is named after what it says: moving it does not
    rename it.

    Raises:
        InputError: the entries stand under both of their names, or an id is given twice.
    """
    raw = cast("dict[str, list[JsonObject | str | None] | None]", document.value)
    present = [key for key in KEYS if raw.get(key) is not None]
    if len(present) == 2:
        got, remedy = f"entries under {KEYS[1]} as well", "put all of them under falsification_tests"
        raise document.error((KEYS[1],), expected=f"the entries under {KEYS[0]}", got=got, remedy=remedy)
    lines: dict[str, int] = {}
    repeats: Counter[str] = Counter()
    entries: list[Entry] = []
    for key in present:
        for index, item in enumerate(raw[key] or ()):
            path: ValuePath = (key, index)
            if item is None:
                warnings.append(f"line {document.line(path)}: an empty entry claims nothing")
                continue
            entry = _entry(document, path, {"rule": item} if isinstance(item, str) else item, repeats, warnings)
            if entry.id in lines:
                got, remedy = f"{entry.id} again (first on line {lines[entry.id]})", "give each claim its own id"
                raise document.error((*path, "id"), expected="each claim id once in a contract", got=got, remedy=remedy)
            lines[entry.id] = document.line(path)
            entries.append(entry)
    return entries


def _entry(document: Document, path: ValuePath, value: JsonObject, repeats: Counter[str], warnings: list[str]) -> Entry:
    rule, prediction, if_fails = (_first(value, names) for names in (_RULE, _PREDICTION, _IF_FAILS))
    given = value.get("id")
    usable = isinstance(given, (str, int)) and not isinstance(given, bool) and _ID.fullmatch(str(given)) is not None
    if not usable and given is not None:
        warnings.append(f"line {document.line((*path, 'id'))}: the id {printable(str(given), 80)!r} cannot be used")
    name = str(given)
    if not usable:
        said = f"{rule}\n{prediction}" if rule or prediction else repr(value)
        name = f"prose-{hashlib.sha256(said.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}"
        repeats[name] += 1
        name += f"-{repeats[name]}" if repeats[name] > 1 else ""
    return Entry(path=path, id=name, rule=rule, prediction=prediction, if_fails=if_fails, value=value)


def _first(value: JsonObject, names: tuple[str, ...]) -> str:
    return next((text(value[name]) for name in names if value.get(name) is not None), "")


def text(value: object) -> str:
    """Return what a free-form field says: a list's items joined, nothing for null."""
    if isinstance(value, list):
        return "; ".join(text(item) for item in value)
    return "" if value is None else str(value).strip()
