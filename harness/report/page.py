"""Pages: every value is made visible and escaped, and a policy allows the one style sheet and nothing else.

Text of a bundle is someone else's. Jinja2 escapes it; ``shown`` first spells out what a browser would hide or obey:
control characters, and the marks that turn the direction of a line.
"""

import base64
import hashlib
import importlib.resources
import re
from functools import lru_cache

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

# C0 and C1 but tab and line feed; soft hyphen; invisible and directional marks; line separators; surrogates; tags.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u0600-\u0605\u061c\u06dd\u070f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
    "\u2028-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\ud800-\udfff\U000e0000-\U000e0fff]"
)


def shown(text: str) -> str:
    r"""Return ``text`` with every hidden or directional character spelt out, such as ``\u202e``."""
    return _HIDDEN.sub(_spelt, text)


def _spelt(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\U{code:08x}" if code > 0xFFFF else f"\\u{code:04x}" if code > 0xFF else f"\\x{code:02x}"


def cut(text: object, limit: int) -> str:
    """Return ``text`` as ``shown``, ending in an ellipsis when it is longer than ``limit`` characters."""
    clean = shown(str(text)[: limit + 1])
    return clean if len(clean) <= limit else f"{clean[: max(0, limit - 1)]}…"


def render_page(name: str, **values: object) -> str:
    """Render a template as a whole page under its policy.

    Args:
        name: file of ``harness/report/templates``.
        values: what it shows; a ``str`` is escaped, ``Markup`` must have been made by this program.
    """
    return _environment().get_template(name).render(style=Markup(style()), policy=policy(), **values)  # noqa: S704 - our own file


@lru_cache(maxsize=1)
def style() -> str:
    """Return the style sheet of every page, one line for each of its lines that says something."""
    text = re.sub(r"/\*.*?\*/", "", _source("style.css"), flags=re.DOTALL)
    return "\n".join(line.strip() for line in text.splitlines() if line.strip())


@lru_cache(maxsize=1)
def policy() -> str:
    """Return the Content-Security-Policy: the style sheet by its digest; no script, image, font, frame or request."""
    digest = base64.b64encode(hashlib.sha256(style().encode()).digest()).decode()
    return f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def _source(name: str) -> str:
    return (importlib.resources.files("q4kd.harness.report") / "templates" / name).read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def _environment() -> Environment:
    def visible(value: object) -> object:
        return shown(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = Environment(
        autoescape=True,
        finalize=visible,
        loader=FunctionLoader(_source),
        lstrip_blocks=True,
        trim_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["cut"] = cut
    return environment
