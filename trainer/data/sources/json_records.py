"""Records in JSON files: a list of objects, one object, or objects one after another, on one line each or several."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PEEK_BYTES = 1 << 20
_SPACE = re.compile(r"[ \t\r\n]*")


def parse_records(text: str) -> list[object]:
    """Return the elements of a list, or the values that follow each other.

    Raises:
        ValueError: when it is not JSON.
        RecursionError: when it is nested too deeply.
    """
    decoder, values, at = json.JSONDecoder(), list[object](), _after_space(text, 0)
    while at < len(text):
        value, at = decoder.raw_decode(text, at)
        values.append(value)
        at = _after_space(text, at)
    return values[0] if len(values) == 1 and isinstance(values[0], list) else values


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return at if found is None else found.end()


def first_record(path: Path, max_bytes: int) -> Mapping[str, Any] | None:
    """Return the first object of a JSON file that holds records; None of other JSON.

    The file is read whole, up to ``max_bytes``, where the first object does not end within a MiB.
    """
    for size in (_PEEK_BYTES, max_bytes):
        with path.open("rb") as file:
            data = file.read(size + 1)
        text = data.decode("utf-8-sig", errors="replace").lstrip()
        try:
            first, _ = json.JSONDecoder().raw_decode(text, _after_space(text, 1) if text.startswith("[") else 0)
        except (ValueError, RecursionError):
            if len(data) <= size:
                return None
            continue
        return first if isinstance(first, dict) else None
    return None


def has_record_a_line(path: Path, max_bytes: int) -> bool:
    """Return whether the first line that is not empty is an object."""
    with path.open("rb") as file:
        line = next((line for line in iter(lambda: file.readline(max_bytes), b"") if line.strip()), b"")
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
