"""The value of one setting: of its field's type, within its field's bounds, or refused."""

import types
import typing
from dataclasses import Field
from pathlib import Path
from typing import Any, Literal

from q4kd.trainer.errors import InputError


def kind_of(annotation: Any) -> tuple[type, bool]:
    """Return the plain type of a field's annotation (str for literals), and whether None is accepted."""
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    target = next(option for option in options if option is not type(None))
    return (str if typing.get_origin(target) is Literal else target), type(None) in options


def convert(setting: Field[Any], value: object, annotation: Any) -> Any:
    """Return ``value`` as the annotated type.

    Args:
        setting: whose metadata holds the bounds ``low`` and ``high`` and the ``choices``.
        value: of RUN.yaml or of the command line.
        annotation: of the field.

    Raises:
        InputError: for a value of another type, or out of bounds.
    """
    target, is_optional = kind_of(annotation)
    if value is None and is_optional:
        return None
    low, high, choices = (setting.metadata[name] for name in ("low", "high", "choices"))
    if target is Path:
        accepted, value = isinstance(value, str | Path), Path(str(value))
    elif target is float:
        # YAML 1.1 reads "1e-3" as text, and people write it.
        value = read_number(value)
        accepted = isinstance(value, int | float) and not isinstance(value, bool)
    else:
        accepted = isinstance(value, target) and (target is bool or not isinstance(value, bool))
    if accepted and choices:
        accepted = value in choices
    if accepted and low is not None:
        accepted = low <= typing.cast(float, value) <= high
    if not accepted:
        limits = f" from {low:g} to {high:g}" if low is not None else ""
        raise InputError(
            f"setting {setting.name}",
            expected=" or ".join(choices) if choices else f"{target.__name__}{limits}",
            got=repr(value)[:80],
            remedy="correct it; see q4kd distill --help",
        )
    return float(typing.cast(float, value)) if target is float else value


def read_number(value: object) -> object:
    """Return the number that a text is, or whatever else was given."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
