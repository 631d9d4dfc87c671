"""JSON Schemas: a quick yes for values that obey, and what is most wrong with those that do not.

``jsonschema-rs`` says yes; ``jsonschema`` remains the judge of what is refused and why. It takes milliseconds for a
claim, and a thousand files have many.
"""

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

from q4kd.harness.json_types import JsonObject

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
