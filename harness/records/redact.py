"""What a bundle may say about the machine it came from: paths, names and tokens are taken out of free text."""

import getpass
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

# A terminal obeys control sequences wherever they are printed, and bidirectional overrides reorder what is read.
_ESCAPE = re.compile(r"\x1b(?:\[[0-?]{0,64}[ -/]{0,16}[@-~]|\][^\x07\x1b]{0,512}(?:\x07|\x1b\\)|[@-Z\\-_])")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_HOME = re.compile(r"/(home|Users)/[^/\s:\"'<>|,;)\]}]{1,64}")
_TOKEN = re.compile(r"\b(?:hf_|gh[pousr]_|github_pat_|glpat-|sk-|nvapi-|AKIA)[A-Za-z0-9_-]{16,200}")
_CREDENTIALS = re.compile(r"(?<=://)[^/\s:@]{1,64}:[^/\s@]{1,200}@")


def places() -> dict[str, str]:
    """Return the path prefixes of this process that say who runs it, with what to write in their place."""
    found = {str(Path.home()): "{home}", str(Path.cwd()): "{cwd}", tempfile.gettempdir(): "{tmp}"}
    for path, shown in list(found.items()):
        found.setdefault(str(Path(path).resolve()), shown)
    return {path: shown for path, shown in found.items() if len(path) > 1}


def redact(text: str, extra: Mapping[str, str] | None = None) -> str:
    """Return ``text`` without home, working and temporary folders, user names in paths, tokens and control characters.

    ``extra`` has further path prefixes and what to write for each, such as ``{"/data/models": "{inputs}"}``.
    """
    text = _ESCAPE.sub("", text.replace("\r\n", "\n"))
    text = _CONTROL.sub("", text)
    prefixes = {**places(), **(extra or {})}
    for prefix in sorted(prefixes, key=len, reverse=True):
        text = re.sub(re.escape(prefix) + r"(?![\w.-])", lambda _, shown=prefixes[prefix]: shown, text)  # type: ignore[misc]
    text = _HOME.sub(r"/\1/{user}", text)
    user = _user()
    if user is not None:
        text = re.sub(rf"(?<=/){re.escape(user)}(?=/|$)", "{user}", text)
    return _CREDENTIALS.sub("{token}@", _TOKEN.sub("{token}", text))


def _user() -> str | None:
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a container may run under an id without a name
        return None
    return name if len(name) > 2 and name not in ("root", "usr", "home", "tmp", "bin", "lib") else None
