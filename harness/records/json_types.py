"""The static types of JSON: what is written or handed on, and what is read by key."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, cast

JsonValue: TypeAlias = "bool | int | float | str | Sequence[JsonValue] | Mapping[str, JsonValue] | None"
JsonObject: TypeAlias = Mapping[str, JsonValue]
# An object whose fields are taken by key: a JSON Schema, or the code that takes a field, checks its type at run time.
JsonRecord: TypeAlias = Mapping[str, Any]


def plain(value: object) -> JsonValue:
    """Return mappings and sequences, at every depth, as the dictionaries and lists that JSON knows."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return cast("JsonValue", value)
