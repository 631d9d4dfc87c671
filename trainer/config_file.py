"""RUN.yaml and ``--set``: where settings come from, how they are printed, and the schema that editors complete from."""

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

import yaml

from q4kd.trainer.config import DistillConfig
from q4kd.trainer.errors import InputError
from q4kd.trainer.files import read_bounded
from q4kd.trainer.setting_value import kind_of
from q4kd.trainer.yaml_lines import parse_yaml, scalar_of_yaml_1_1

MAX_CONFIG_BYTES = 1 << 20


def read_run_file(path: Path) -> dict[str, object]:
    """Read RUN.yaml: a flat mapping of settings.

    Raises:
        InputError: when it is not such a mapping.
    """
    content = parse_yaml(read_bounded(path, MAX_CONFIG_BYTES), str(path), scalar_of_yaml_1_1).value
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InputError(str(path), expected="a mapping of settings", got=type(content).__name__, remedy="see the docs")
    return dict(content)


def parse_assignment(text: str) -> tuple[str, object]:
    """Parse ``key=value`` of ``--set``; the value is YAML, or plain text where it is not YAML (``**/*.py``).

    Raises:
        InputError: when there is no ``=``.
    """
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise InputError(f"--set {text}", expected="key=value", got=text, remedy="for example --set lr=1e-4")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        return key.strip(), value


def format_config(config: DistillConfig) -> str:
    """Return RUN.yaml of the effective settings, by heading; what is not the default says what the default is."""
    lines: list[str] = []
    heading = ""
    values = config.to_json()
    for setting in dataclasses.fields(config):
        if setting.metadata["group"] != heading:
            heading = setting.metadata["group"]
            lines += ["", f"# {heading}"] if lines else [f"# {heading}"]
        line = f"{setting.name}: {_scalar(values[setting.name])}"
        if setting.default is not dataclasses.MISSING and values[setting.name] != setting.default:
            line += f"  # default: {_scalar(setting.default)}"
        lines.append(line)
    return "\n".join(lines) + "\n"


def _scalar(value: object) -> str:
    """Return a value as YAML on one line."""
    return yaml.safe_dump(value, width=1 << 20, allow_unicode=True).removesuffix("...\n").strip()


def run_schema() -> str:
    """Return the JSON Schema (2020-12) of RUN.yaml, as shipped in ``run.schema.json``."""
    kinds = typing.get_type_hints(DistillConfig)
    settings = dataclasses.fields(DistillConfig)
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "RUN.yaml of q4kd distill",
        "type": "object",
        "properties": {setting.name: _property(setting, kinds[setting.name]) for setting in settings},
        "additionalProperties": False,
    }
    return json.dumps(schema, indent=1) + "\n"


_JSON_TYPES: dict[type, str] = {bool: "boolean", int: "integer", float: "number", str: "string", Path: "string"}


def _property(setting: "dataclasses.Field[Any]", annotation: Any) -> dict[str, Any]:
    kind, is_optional = kind_of(annotation)
    name = _JSON_TYPES[kind]
    unit, low, high = (setting.metadata[key] for key in ("unit", "low", "high"))
    entry: dict[str, Any] = {"description": setting.metadata["help"] + (f" ({unit})" if unit else "")}
    if setting.metadata["choices"]:
        entry["enum"] = [*setting.metadata["choices"], *([None] if is_optional else [])]
    else:
        entry["type"] = [name, "null"] if is_optional else name
    if low is not None:
        entry |= {"minimum": low, "maximum": high}
    if setting.default is not dataclasses.MISSING:
        entry["default"] = setting.default
    return entry
