"""One setting: what its field's annotation and metadata say of it, and the check of a value against them."""

import dataclasses
import datetime
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from q4kd.trainer.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A field of ``DistillConfig``.

    Attributes:
        name: key of RUN.yaml.
        kind: type of its values: bool, int, float, str or Path.
        is_optional: whether None is accepted.
        choices: the texts that are accepted; empty when every value of the type is.
        default: its value when none is given; ``dataclasses.MISSING`` when one must be given.
        group: heading that it is listed under.
        help: what it means.
        low, high: least and greatest accepted number; None without bounds.
        unit: unit of its number; may be empty.
    """

    name: str
    kind: type
    is_optional: bool
    choices: tuple[str, ...]
    default: Any
    group: str
    help: str
    low: float | None
    high: float | None
    unit: str

    @classmethod
    def of(cls, field: "dataclasses.Field[Any]", annotation: Any) -> "Setting":
        """Return the setting that a dataclass field with this annotation declares."""
        options = typing.get_args(annotation)
        if types.NoneType not in options:
            options = (annotation,)
        kind = next(option for option in options if option is not types.NoneType)
        choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
        return cls(
            name=field.name,
            kind=str if choices else kind,
            is_optional=types.NoneType in options,
            choices=choices,
            default=field.default,
            **field.metadata,
        )

    @property
    def is_required(self) -> bool:
        """Return whether there is no default."""
        return self.default is dataclasses.MISSING

    @property
    def default_text(self) -> str:
        """The default as ``--help`` and the documentation show it."""
        if self.default is None:
            return "none"
        if self.kind is bool:
            return "yes" if self.default else "no"
        return {float: "{:g}", int: "{:,}"}.get(self.kind, "{}").format(self.default)

    def convert(self, value: object) -> Any:
        """Return a value of RUN.yaml or of the command line as the setting's type.

        Raises:
            InputError: for a value of another type, or out of bounds.
        """
        if value is None and self.is_optional:
            return None
        if isinstance(value, bool) and str(value).lower() in self.choices:
            value = str(value).lower()  # YAML reads true and false as truth values
        if self.kind is str and type(value) is datetime.date:
            value = value.isoformat()  # YAML reads 2026-11-30 as a day
        if self.kind is Path:
            accepted, value = isinstance(value, str | Path), Path(str(value))
        elif self.kind is float:
            # YAML 1.1 reads "1e-3" as text, and people write it.
            value = read_number(value)
            accepted = isinstance(value, int | float) and not isinstance(value, bool)
        else:
            accepted = isinstance(value, self.kind) and (self.kind is bool or not isinstance(value, bool))
        if accepted and self.choices:
            accepted = value in self.choices
        if accepted and self.low is not None and self.high is not None:
            accepted = self.low <= typing.cast(float, value) <= self.high
        if not accepted:
            limits = f" from {self.low:g} to {self.high:g}" if self.low is not None else ""
            raise InputError(
                f"setting {self.name}",
                expected=" or ".join(self.choices) or f"{self.kind.__name__}{limits}",
                got=repr(value)[:80],
                remedy="give it such a value; q4kd distill --help says what it means",
            )
        return float(typing.cast(float, value)) if self.kind is float else value


def read_number(value: object) -> object:
    """Return the number that a text is, or whatever else was given."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
