"""The first screen of ``q4kd --help``, and the arguments that several commands have."""

import argparse
import re
import shutil
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# What is not named here is listed last, so that no command is hidden.
GROUPS: Mapping[str, tuple[str, ...]] = {
    "student": ("distill", "plan", "cache", "export"),
    "teacher": ("inspect", "logits", "fidelity", "bench"),
    "claims": ("falsify", "sabotage", "contracts", "nightly"),
    "evidence": ("evidence",),
    "machine": ("doctor", "completion"),
}
_OTHER = "more"
_USAGE = "usage: q4kd [--help] [--version] [--debug] COMMAND ..."
_FOOT = "q4kd COMMAND --help: options. Exit: 0 yes, 1 no, 2 bad input or no verdict"
_LEAST_WIDTH = 40
_COLOUR = re.compile(r"\x1b\[[\d;]*m")
_OPTION = re.compile(r"(?<![\w-])--?[a-zA-Z][\w-]*")


class Commands:
    """The commands as they are added, by name: their parsers, and the summary that each gives of itself."""

    def __init__(self, subparsers: "argparse._SubParsersAction[Any]") -> None:
        self._subparsers = subparsers
        self.parsers: dict[str, argparse.ArgumentParser] = {}
        self.summaries: dict[str, str] = {}

    def add_parser(self, name: str, **options: Any) -> argparse.ArgumentParser:
        """Add a command and return its parser (see ``argparse``)."""
        self.summaries[name] = options.get("help", "")
        self.parsers[name] = self._subparsers.add_parser(name, **options)
        return self.parsers[name]

    def options_of(self, command: str | None) -> list[str]:
        """Return a command's options, which only its help lists: ``argparse`` has no other public list of them."""
        parser = self.parsers.get(command or "")
        lines = _COLOUR.sub("", parser.format_help()).splitlines() if parser else []
        given = (line.strip().partition("  ")[0] for line in lines if line.startswith("  -"))
        return [word for invocation in given for word in _OPTION.findall(invocation)]


def add_path(parser: argparse.ArgumentParser, name: str, metavar: str, text: str) -> None:
    """Add an argument or option that is a path, with ``text`` for its help."""
    parser.add_argument(name, type=Path, metavar=metavar, help=text)


def add_contracts(parser: argparse.ArgumentParser) -> None:
    """Add ``--contracts``."""
    add_path(parser, "--contracts", "DIR", "folder of contracts (default: the installed ones)")


def add_profile(parser: argparse.ArgumentParser) -> None:
    """Add ``--profile``."""
    parser.add_argument("--profile", metavar="P", help="machine profile (default: that of the GPU present, else cpu)")


def format_commands(description: str, summaries: Mapping[str, str], width: int | None = None) -> str:
    """Return the help text.

    Args:
        description: the sentence under the usage line.
        summaries: one line by command, as given to ``add_parser``.
        width: columns; None means those of the terminal, 80 where there is none.
    """
    columns = max(_LEAST_WIDTH, width or shutil.get_terminal_size().columns)
    named = {command for commands in GROUPS.values() for command in commands}
    groups = {**GROUPS, _OTHER: tuple(command for command in summaries if command not in named)}
    left = max(len(group) for group in groups) + 2
    middle = max((len(command) for command in summaries), default=0) + 2
    lines = [_USAGE, "", *textwrap.wrap(description, columns), ""]
    for group, commands in groups.items():
        present = [command for command in commands if command in summaries]
        for number, command in enumerate(present):
            start = f"{group if number == 0 else '':<{left}}{command:<{middle}}"
            lines.append(start + shorten(summaries[command], columns - len(start)))
    return "\n".join([*lines, "", *textwrap.wrap(_FOOT, columns)]) + "\n"


def shorten(text: str, width: int) -> str:
    """Return ``text`` cut at a word to at most ``width`` columns."""
    return textwrap.shorten(text, max(width, 8), placeholder=" …")
