"""Chat templates as they are published, by model; ``templates/README.md`` says where each is from."""

from pathlib import Path

_FOLDER = Path(__file__).parent / "templates"


def published_template(name: str) -> str:
    """Return the text of a template, by the name of its file."""
    return (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
