"""The command line: ``q4kd COMMAND …``, also ``python -m q4kd.harness COMMAND …``.

Exit codes: 0 done · 1 a claim is falsified, or the command's own "no" · 2 bad input, or an inconclusive verdict ·
3 a defect of q4kd itself · 74 standard output could not be written · 75 out of memory · 130 interrupted. A run that
ends early: see ``TrainingAborted``, and 124 for a hang. Who reads along changes no code: with `| head` a command does
all its work.
"""

import argparse
import contextlib
import importlib
import importlib.metadata
import mmap
import os
import sys
import traceback
from typing import NoReturn

from q4kd.harness.cli.completion import complete
from q4kd.harness.cli.help import Commands, format_commands
from q4kd.harness.cli.output import Interrupt, guarded_streams
from q4kd.trainer.errors import (
    InputError,
    OutOfMemoryError,
    TrainingAborted,
    first_line,
    for_terminal,
    is_out_of_memory,
)

_DESCRIPTION = "Distil a student from a GGUF teacher that stays quantised; try to falsify every claim about it."
USAGE_EXIT = 2
DEFECT_EXIT = 3
OUTPUT_EXIT = 74
INTERRUPTED_EXIT = 130
_RESERVE = 32 << 20
_TRAINER = ("teacher", "distill", "cache", "bench", "fidelity")
_HARNESS = ("falsify", "nightly", "contracts", "evidence", "completion", "export")
COMMAND_MODULES = (
    *(f"q4kd.trainer.cli.{name}" for name in _TRAINER),
    *(f"q4kd.harness.cli.{name}" for name in _HARNESS),
)
# These may download what --teacher or --student names by its hub id; no other command asks the hub.
_MAY_DOWNLOAD = ("falsify", "sabotage", "nightly")


class _Parser(argparse.ArgumentParser):
    """Reports bad arguments as one line."""

    def error(self, message: str) -> NoReturn:
        print(f"q4kd: {message}; see `{self.prog} --help`", file=sys.stderr)
        raise SystemExit(USAGE_EXIT)


class _CommandLine(_Parser):
    """The parser of ``q4kd`` itself, which lists the commands on one screen."""

    def __init__(self) -> None:
        super().__init__(prog="q4kd", description=_DESCRIPTION)
        self.add_argument("--version", action="version", version=f"q4kd {_version()}")
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")
        self.commands = Commands(
            self.add_subparsers(title="commands", metavar="COMMAND", dest="command", parser_class=_Parser)
        )
        for module in COMMAND_MODULES:
            importlib.import_module(module).add_commands(self.commands)

    def format_help(self) -> str:
        return format_commands(self.description or "", self.commands.summaries)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with every command. Imports no torch."""
    return _CommandLine()


def _parse(parser: _CommandLine, arguments: list[str]) -> argparse.Namespace:
    """Parse everything, or say which option was unknown and which one it may mean."""
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:
        from q4kd.trainer.cli.arguments import suggest_option

        known = parser.commands.options_of(parsed.command)
        close = suggest_option(next((word for word in unknown if word.startswith("-")), ""), known)
        parser.error(f"unrecognized arguments: {' '.join(unknown)}" + (f"; did you mean {close}?" if close else ""))
    return parsed


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code. Never raises, except with ``--debug``, which lets tracebacks print."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    is_run = arguments[:1] in (["distill"], ["cache"])
    with guarded_streams("the run goes on" if is_run else "") as out, Interrupt() as interrupt:
        code = _run(arguments, interrupt)
        out.flush()
        # The files of a run are whole, whatever became of its lines; other commands have said nothing else.
        if code == 0 and out.lost is not None and not is_run:
            return _report(f"standard output cannot be written ({out.lost.strerror})", OUTPUT_EXIT, debug=False)
    return code


def _run(arguments: list[str], interrupt: Interrupt) -> int:
    # --debug may stand anywhere before a bare "--": people add it to the end of the line that failed.
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    debug = "--debug" in arguments[:cut]
    arguments = [word for word in arguments[:cut] if word != "--debug"] + arguments[cut:]
    reserve = _keep_back()
    try:
        parser = _CommandLine()
        complete(parser)
        args = _parse(parser, arguments)
        if not hasattr(args, "run"):
            parser.print_help()
            return 0 if args.command is None and not arguments else USAGE_EXIT
        args.debug = debug
        if args.command not in _MAY_DOWNLOAD:
            os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported, which reads it once
        return int(args.run(args))
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else USAGE_EXIT
    except KeyboardInterrupt:
        return _report("interrupted", INTERRUPTED_EXIT, debug=False)
    except (InputError, TrainingAborted) as error:
        return _report(str(error), USAGE_EXIT if isinstance(error, InputError) else error.exit_code, debug)
    except ModuleNotFoundError as error:
        if interrupt.came:
            return _report("interrupted", INTERRUPTED_EXIT, debug)
        from q4kd.harness.requirements import extra_of

        package = (error.name or "").partition(".")[0]
        extra = extra_of(package)
        if extra is None:
            return _report(f"internal error: {error}", DEFECT_EXIT, debug)
        return _report(f"{package} is not installed; pip install 'q4kd[{extra}]'", USAGE_EXIT, debug)
    except Exception as error:
        if interrupt.came:  # whatever the interruption did to the import or the call that it cut off
            return _report("interrupted", INTERRUPTED_EXIT, debug)
        if is_out_of_memory(error):
            if reserve is not None:
                reserve.close()
            said = f"out of memory: {first_line(error)}; free some, or raise this shell's limit (ulimit -v)"
            return _report(said, OutOfMemoryError.exit_code, debug)
        return _report(f"internal error: {type(error).__name__}: {error}", DEFECT_EXIT, debug)


def _keep_back() -> mmap.mmap | None:
    """Return address space, no page of which is touched, for the line that says that there is none left."""
    with contextlib.suppress(OSError):
        return mmap.mmap(-1, _RESERVE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ)
    return None


def _report(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    if not message:  # another process of the run says it
        return code
    line = for_terminal(" ".join(message.split()))  # A message may quote a hostile file.
    hint = "; run with --debug for the traceback" if code == DEFECT_EXIT and not debug else ""
    print(f"q4kd: {line}{hint}", file=sys.stderr)
    return code


def _version() -> str:
    try:
        return importlib.metadata.version("q4kd")
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown"
