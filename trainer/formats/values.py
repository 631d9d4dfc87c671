"""Numbers of a model file's metadata, read within bounds; a missing or foreign value is refused by its key."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from q4kd.trainer.errors import InputError

CONVERT = "convert the model again"


class Values:
    """Metadata under GGUF's own key names, without the architecture's prefix.

    Args:
        path: file, for error lines.
        architecture: name that the keys begin with in the file, for error lines.
        values: metadata such as ``{"embedding_length": 896}``; None stands for a missing key.
    """

    def __init__(self, path: Path, architecture: str, values: Mapping[str, Any]) -> None:
        self._path, self._architecture, self._values = path, architecture, values

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value as it is, whatever its type."""
        value = self._values.get(key)
        return default if value is None else value

    def refusal(self, key: str, expected: str, got: str, remedy: str = CONVERT) -> InputError:
        """Return an error about one key."""
        return InputError(f"{self._path}: {self._architecture}.{key}", expected=expected, got=got, remedy=remedy)

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """Return a number from ``low`` to ``high``; without a default the key is required.

        Raises:
            InputError: for a value that is missing, no number, or out of bounds.
        """
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            got = "nothing" if value is None else repr(value)[:80]
            raise self.refusal(key, f"a number from {low:g} to {high:g}", got)
        return value

    def integer(self, key: str, high: int, default: int | None = None, *, low: int = 1) -> int:
        """Return a whole number from ``low`` to ``high``; without a default the key is required.

        Raises:
            InputError: as ``number``, and for a fraction.
        """
        value = self.number(key, low, high, default)
        if value != int(value):
            raise self.refusal(key, "a whole number", str(value))
        return int(value)
