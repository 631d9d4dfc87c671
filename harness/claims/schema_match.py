"""JSON Schemas: a quick yes for values that obey, and what is most wrong with those that do not.

``jsonschema-rs`` says yes; ``jsonschema`` remains the judge of what is refused and why. It takes milliseconds for a
claim, and a thousand files have many.
"""

import difflib
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

from q4kd.harness.records.json_types import JsonObject
from q4kd.trainer.yaml_lines import Document, ValuePath, printable

if TYPE_CHECKING:
    from jsonschema.exceptions import ValidationError


class Schema:
    """A JSON Schema of 2020-12."""

    def __init__(self, schema: JsonObject | bool) -> None:
        self.schema = schema if isinstance(schema, bool) else dict(schema)

    def error(self, value: object) -> "ValidationError | None":
        """Return what is most wrong with a value, or None when it obeys."""
        if self._is_valid(value):
            return None
        from jsonschema import Draft202012Validator
        from jsonschema.exceptions import best_match

        worst: ValidationError | None = best_match(Draft202012Validator(self.schema).iter_errors(value))
        return worst

    def require(self, document: Document, path: ValuePath, value: object, remedy: str) -> None:
        """Refuse a value at ``path`` of a document that does not obey, by the line of what is most wrong with it.

        Raises:
            InputError: the line is that of the value, or of the unknown key with the known one that it resembles.
        """
        error = self.error(value)
        if error is None:
            return
        path = (*path, *error.absolute_path)
        schema = error.schema if isinstance(error.schema, dict) else {}
        known, held = sorted(schema.get("properties", {})), error.instance if isinstance(error.instance, dict) else {}
        unknown = [key for key in held if key not in known]
        if error.validator == "additionalProperties" and unknown:
            close = difflib.get_close_matches(str(unknown[0]), known, 1)
            raise document.error(
                (*path, unknown[0]),
                expected=f"one of the keys {', '.join(known)}",
                got=f"the unknown key {unknown[0]!r}",
                remedy=f"did you mean {close[0]!r}?" if close else "remove it",
            )
        rule = f"{error.validator} {error.validator_value!r}" if error.validator != "if" else "the schema"
        described = f" ({schema['description']})" if schema.get("description") else ""
        raise document.error(path, expected=printable(rule) + described, got=error.message, remedy=remedy)

    @cached_property
    def _is_valid(self) -> Callable[[object], bool]:
        """The quick answer: no also where there is none, as for a value that JSON cannot hold."""
        from jsonschema_rs import Draft202012Validator

        try:
            obeys = Draft202012Validator(self.schema).is_valid
        except ValueError:
            return lambda value: False

        def is_valid(value: object) -> bool:
            try:
                return obeys(value)
            except ValueError:
                return False

        return is_valid
