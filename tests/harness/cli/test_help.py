"""The first screen: every command on one line, grouped, within 80 x 24; completion answers what the shell asks."""

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest

from q4kd.harness.__main__ import build_parser, main
from q4kd.harness.cli.help import GROUPS, format_commands

COMMANDS = tuple(command for commands in GROUPS.values() for command in commands)


@pytest.mark.parametrize("width", [60, 80, 140])
def test_the_screen_fits_even_with_every_command_there_will_be(width: int) -> None:
    text = format_commands("d" * 120, dict.fromkeys((*COMMANDS, "another"), "word " * 30), width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert width < 80 or len(lines) <= 24
    for command in (*COMMANDS, "another"):
        assert sum(f" {command} " in f" {line} " for line in lines) == 1
    assert "more" in text


def test_the_real_screen_names_every_command_with_its_whole_summary(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= 23  # the prompt takes the last of 24
    assert "…" not in text
    assert "more" not in text.split()
    (action,) = build_parser()._subparsers._group_actions
    for choice in action._choices_actions:
        assert choice.dest in text and choice.help in text


def test_the_options_of_a_command_are_those_that_its_parser_holds() -> None:
    parser = build_parser()
    for command, known in parser.commands.parsers.items():
        expected = {word for action in known._actions for word in action.option_strings}
        assert set(parser.commands.options_of(command)) == expected
    assert parser.commands.options_of("nothing") == parser.commands.options_of(None) == []


def test_other_helps_are_argparses_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evidence", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: q4kd evidence")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_are_accepted_by_their_shell(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "q4kd" in script and "_ARGCOMPLETE" in script
    found = shutil.which(shell)
    if found is None:
        return  # the text was checked; this machine has no such shell
    done = subprocess.run([found, "-n"], input=script, text=True, capture_output=True, timeout=30)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("line", "among"),
    [("q4kd fal", {"falsify"}), ("q4kd evidence ver", {"verify"}), ("q4kd falsify --pro", {"--profile"})],
)
def test_a_shell_is_answered(line: str, among: set[str]) -> None:
    # The protocol of argcomplete: the answer on descriptor 8, which here is a pipe.
    read, write = os.pipe()
    code = f"import os, sys; os.dup2({write}, 8); from q4kd.harness.__main__ import main; main([])"
    env = {
        **os.environ,
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_COMP_WORDBREAKS": " ",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }
    process = subprocess.Popen([sys.executable, "-c", code], env=env, pass_fds=(write,), stdout=subprocess.DEVNULL)
    os.close(write)
    with os.fdopen(read) as pipe:
        answer = {word.strip() for word in pipe.read().split("\n") if word.strip()}
    assert process.wait(60) == 0
    assert among <= answer
    assert "torch" not in answer


@pytest.mark.parametrize("variable", ["NO_COLOR", "CI"])
def test_no_colour_codes_reach_a_file_or_a_log(variable: str) -> None:
    env = {**os.environ, variable: "1"}
    for arguments in (["--help"], ["doctor"], ["contracts", "show", "kd-signal-v1"]):
        command = [sys.executable, "-m", "q4kd.harness", *arguments]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
        assert done.stdout and "\x1b" not in done.stdout + done.stderr


def _options(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from _options(child)
        else:
            yield action


def test_a_default_that_a_help_text_names_is_the_options_default() -> None:
    named = 0
    for action in _options(build_parser()):
        found = re.search(r"default:? (-?[\d_]+(?:\.\d+)?)(?=[\s,;)])", action.help or "")
        if found is not None and action.default is not argparse.SUPPRESS and action.default is not None:
            named += 1
            assert float(found[1].replace("_", "")) == float(action.default), (action.option_strings, action.help)
    assert named >= 3
