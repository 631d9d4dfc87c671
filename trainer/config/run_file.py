"""RUN.yaml and ``--set``: where settings come from, how they are printed, and the schema that editors complete from."""

import itertools
import json
from pathlib import Path
from typing import Any

import yaml

from q4kd.trainer.config.settings import DistillConfig, settings
from q4kd.trainer.config.value import Setting
from q4kd.trainer.errors import InputError
from q4kd.trainer.files import read_bounded
from q4kd.trainer.yaml_lines import parse_yaml, scalar_of_yaml_1_1

MAX_CONFIG_BYTES = 1 << 20


def read_run_file(path: Path) -> dict[str, object]:
    """Read RUN.yaml: a flat mapping of settings.

    Raises:
        InputError: when it is not such a mapping.
    """
    content = parse_yaml(read_bounded(path, MAX_CONFIG_BYTES), str(path), scalar_of_yaml_1_1).value
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        got, remedy = type(content).__name__, "write one setting a line, such as lr: 1e-4; see q4kd distill --help"
        raise InputError(str(path), expected="a mapping of settings", got=got, remedy=remedy)
    return dict(content)


def parse_assignment(text: str) -> tuple[str, object]:
    """Parse ``key=value`` of ``--set``; the value is YAML, or plain text where it is not (``**/*.py``, ``2001-99-99``).

    Raises:
        InputError: when there is no ``=``.
    """
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise InputError(f"--set {text}", expected="key=value", got=text, remedy="for example --set lr=1e-4")
    if not value.strip():
        return key.strip(), None
    try:
        data = value.encode("utf-8", "surrogateescape")
        return key.strip(), parse_yaml(data, "--set", scalar_of_yaml_1_1).value
    except InputError:
        return key.strip(), value


def format_config(config: DistillConfig) -> str:
    """Return RUN.yaml of the effective settings, by heading; a value that is not the default names the default."""
    values, sections = config.to_json(), []
    for heading, group in itertools.groupby(settings().items(), lambda item: item[1].group):
        section = f"# {heading}\n"
        for name, setting in group:
            differs = not setting.is_required and values[name] != setting.default
            note = f"  # default: {_scalar(setting.default)}" if differs else ""
            section += f"{name}: {_scalar(values[name])}{note}\n"
        sections.append(section)
    return "\n".join(sections)


def _scalar(value: object) -> str:
    """Return a value as YAML on one line."""
    return yaml.safe_dump(value, width=1 << 20, allow_unicode=True).removesuffix("...\n").strip()


def run_schema() -> str:
    """Return the JSON Schema (2020-12) of RUN.yaml, as shipped in ``run.schema.json``."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "RUN.yaml of q4kd distill",
        "type": "object",
        "properties": {name: _property(setting) for name, setting in settings().items()},
        "additionalProperties": False,
    }
    return json.dumps(schema, indent=1) + "\n"


_JSON_TYPES: dict[type, str] = {bool: "boolean", int: "integer", float: "number", str: "string", Path: "string"}


def _property(setting: Setting) -> dict[str, Any]:
    entry: dict[str, Any] = {"description": setting.help + (f" ({setting.unit})" if setting.unit else "")}
    if setting.choices:
        unquoted = [word == "true" for word in setting.choices if word in ("true", "false")]
        entry["enum"] = [*setting.choices, *unquoted, *([None] if setting.is_optional else [])]
    else:
        name = _JSON_TYPES[setting.kind]
        entry["type"] = [name, "null"] if setting.is_optional else name
    if setting.low is not None:
        entry |= {"minimum": setting.low, "maximum": setting.high}
    if not setting.is_required:
        entry["default"] = setting.default
    return entry
