"""A quick yes for values that obey a JSON Schema, so that only those that do not pay for an explanation.

``jsonschema`` remains the judge of what is refused and why. It takes milliseconds for a claim; a thousand files have
many. A schema is compiled to nested functions here, for the keywords that contracts and checks use.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError, best_match

Match = Callable[[Any], bool]
_ANNOTATIONS = frozenset({"$schema", "$defs", "title", "description", "examples", "default"})
_CONDITIONAL = frozenset({"then", "else"})


class UnknownKeywordError(Exception):
    """The schema uses a keyword that is not compiled; its name is the message."""


class Schema:
    """A JSON Schema of 2020-12."""

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self._validator = Draft202012Validator(schema)
        try:
            self._match: Match = compile_schema(schema)
        except UnknownKeywordError:
            self._match = lambda value: False

    def error(self, value: object) -> ValidationError | None:
        """Return what is most wrong with a value, or None when it obeys."""
        return None if self._match(value) else best_match(self._validator.iter_errors(value))


def compile_schema(schema: Any, root: Mapping[str, Any] | None = None) -> Match:
    """Return the predicate that says whether a value obeys ``schema``.

    Args:
        schema: a JSON Schema of 2020-12, or a part of one.
        root: the whole schema, which ``$ref`` refers to; None when ``schema`` is it.

    Raises:
        UnknownKeywordError: the schema needs more than this.
    """
    return _Compiler(schema if root is None else root).compile(schema)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_TYPES: Mapping[str, Match] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "number": _is_number,
    "integer": lambda value: _is_number(value) and (isinstance(value, int) or value.is_integer()),
}
# Each applies to values of its kind only, and lets others pass: keyword → (kind, limit → test).
_LIMITS: Mapping[str, tuple[Match, Callable[[Any], Match]]] = {
    "minimum": (_is_number, lambda limit: lambda value: value >= limit),
    "maximum": (_is_number, lambda limit: lambda value: value <= limit),
    "exclusiveMinimum": (_is_number, lambda limit: lambda value: value > limit),
    "exclusiveMaximum": (_is_number, lambda limit: lambda value: value < limit),
    "minLength": (_TYPES["string"], lambda limit: lambda value: len(value) >= limit),
    "maxLength": (_TYPES["string"], lambda limit: lambda value: len(value) <= limit),
    "minItems": (_TYPES["array"], lambda limit: lambda value: len(value) >= limit),
    "maxItems": (_TYPES["array"], lambda limit: lambda value: len(value) <= limit),
    "minProperties": (_TYPES["object"], lambda limit: lambda value: len(value) >= limit),
    "maxProperties": (_TYPES["object"], lambda limit: lambda value: len(value) <= limit),
    "required": (_TYPES["object"], lambda names: lambda value: all(name in value for name in names)),
    "pattern": (_TYPES["string"], lambda text: lambda value: re.search(text, value) is not None),
}


class _Compiler:
    def __init__(self, root: Any) -> None:
        self.root = root
        self.references: dict[str, Match] = {}

    def compile(self, schema: Any) -> Match:
        if isinstance(schema, bool):
            return lambda value: schema
        tests = [
            test
            for keyword in schema
            if keyword not in _ANNOTATIONS and keyword not in _CONDITIONAL
            for test in [self.keyword(keyword, schema)]
        ]
        if len(tests) == 1:
            return tests[0]
        return lambda value: all(test(value) for test in tests)

    def keyword(self, keyword: str, schema: Mapping[str, Any]) -> Match:
        given = schema[keyword]
        if keyword in _LIMITS:
            applies, make = _LIMITS[keyword]
            within = make(given)
            return lambda value: not applies(value) or within(value)
        compiled = getattr(self, f"on_{keyword.lstrip('$')}", None)
        if compiled is None:
            raise UnknownKeywordError(keyword)
        match: Match = compiled(given, schema)
        return match

    def on_ref(self, given: str, _schema: Any) -> Match:
        if given not in self.references:
            node: Any = self.root
            for part in given.removeprefix("#/").split("/"):
                node = node[part]
            # Registered first, so that a schema which refers to itself ends.
            self.references[given] = lambda value: self.references[given](value)
            self.references[given] = self.compile(node)
        return lambda value: self.references[given](value)

    def on_type(self, given: str | list[str], _schema: Any) -> Match:
        tests = [_TYPES[name] for name in ([given] if isinstance(given, str) else given)]
        return tests[0] if len(tests) == 1 else lambda value: any(test(value) for test in tests)

    def on_enum(self, given: list[Any], _schema: Any) -> Match:
        if not all(isinstance(item, (str, type(None))) for item in given):
            raise UnknownKeywordError("enum of other values than words")
        return lambda value: isinstance(value, (str, type(None))) and value in given

    def on_const(self, given: Any, schema: Any) -> Match:
        return self.on_enum([given], schema)

    def on_properties(self, given: Mapping[str, Any], _schema: Any) -> Match:
        below = {name: self.compile(part) for name, part in given.items()}
        return lambda value: (
            not isinstance(value, dict) or all(key not in below or below[key](item) for key, item in value.items())
        )

    def on_additionalProperties(self, given: Any, schema: Mapping[str, Any]) -> Match:  # noqa: N802 - its JSON name
        if "patternProperties" in schema:
            raise UnknownKeywordError("patternProperties")
        known, other = schema.get("properties", {}), self.compile(given)
        return lambda value: (
            not isinstance(value, dict) or all(key in known or other(item) for key, item in value.items())
        )

    def on_propertyNames(self, given: Any, _schema: Any) -> Match:  # noqa: N802 - its JSON name
        name = self.compile(given)
        return lambda value: not isinstance(value, dict) or all(name(key) for key in value)

    def on_items(self, given: Any, schema: Mapping[str, Any]) -> Match:
        if "prefixItems" in schema:
            raise UnknownKeywordError("prefixItems")
        item = self.compile(given)
        return lambda value: not isinstance(value, list) or all(item(each) for each in value)

    def on_allOf(self, given: list[Any], _schema: Any) -> Match:  # noqa: N802 - its JSON name
        parts = [self.compile(part) for part in given]
        return lambda value: all(part(value) for part in parts)

    def on_anyOf(self, given: list[Any], _schema: Any) -> Match:  # noqa: N802 - its JSON name
        parts = [self.compile(part) for part in given]
        return lambda value: any(part(value) for part in parts)

    def on_oneOf(self, given: list[Any], _schema: Any) -> Match:  # noqa: N802 - its JSON name
        parts = [self.compile(part) for part in given]
        return lambda value: sum(part(value) for part in parts) == 1

    def on_not(self, given: Any, _schema: Any) -> Match:
        part = self.compile(given)
        return lambda value: not part(value)

    def on_if(self, given: Any, schema: Mapping[str, Any]) -> Match:
        when = self.compile(given)
        then, other = (self.compile(schema.get(name, True)) for name in ("then", "else"))
        return lambda value: then(value) if when(value) else other(value)
