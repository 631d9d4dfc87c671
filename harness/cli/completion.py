"""The command ``q4kd completion``: the line that teaches a shell to complete commands, options and paths."""

import argparse
import os

from q4kd.harness.cli.help import Commands
from q4kd.trainer.errors import InputError

SHELLS = ("bash", "zsh", "fish")
_HELP = """bash: q4kd completion bash > ~/.local/share/bash-completion/completions/q4kd
zsh:  q4kd completion zsh > "${fpath[1]}/_q4kd"
fish: q4kd completion fish > ~/.config/fish/completions/q4kd.fish
"""


def add_commands(subparsers: Commands) -> None:
    """Add ``completion`` to the command line."""
    completion = subparsers.add_parser(
        "completion",
        help="completion script for bash, zsh or fish",
        epilog=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    completion.add_argument("shell", choices=SHELLS)
    completion.set_defaults(run=_completion)


def _completion(args: argparse.Namespace) -> int:
    try:
        from argcomplete.shell_integration import shellcode
    except ImportError as error:
        raise InputError(
            "q4kd completion", expected="argcomplete", got="it is not installed", remedy="pip install argcomplete"
        ) from error
    print(shellcode(["q4kd"], shell=args.shell))
    return 0


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell and end the process, when it is a shell's completion that started it."""
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(parser)
