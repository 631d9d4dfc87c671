"""RUN.yaml and ``--set``: where settings come from."""

from pathlib import Path

import yaml

from q4kd.trainer.errors import InputError
from q4kd.trainer.files import read_bounded

MAX_CONFIG_BYTES = 1 << 20


def read_run_file(path: Path) -> dict[str, object]:
    """Read RUN.yaml: a flat mapping of settings.

    Raises:
        InputError: when it is not such a mapping.
    """
    try:
        content = yaml.safe_load(read_bounded(path, MAX_CONFIG_BYTES))
    except (yaml.YAMLError, RecursionError, UnicodeDecodeError) as error:
        raise InputError(
            str(path), expected="YAML", got=str(error).replace("\n", " ")[:160], remedy="correct the file"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InputError(str(path), expected="a mapping of settings", got=type(content).__name__, remedy="see the docs")
    return content


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
