"""The one launcher of every recorded run: ``python -P -m q4kd.harness.child [--fault NAME] -- ARGUMENTS…``.

Clean and sabotaged runs differ by this option alone. ARGUMENTS are those of ``q4kd``, or ``probe NAME …`` for a
measurement that is not a user command, or ``module NAME …`` to run another project's program as ``python -m NAME …``
does. No environment variable and no file can plant a fault.
"""

import ctypes
import gc
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import NoReturn

from q4kd.trainer.errors import InputError

USAGE_EXIT = 2
_PR_SET_PDEATHSIG = 1


def main(argv: list[str] | None = None) -> int:
    """Plant the named fault, if any, then run the command. Returns its exit code, or ``registry.VOID_EXIT``."""
    hear_signals()
    words = sys.argv[1:] if argv is None else argv
    cut = words.index("--") if "--" in words else len(words)
    options, command = words[:cut], words[cut + 1 :]
    if not command or (options and (len(options) != 2 or options[0] != "--fault")):
        print("q4kd.harness.child: expected [--fault NAME] -- ARGUMENTS", file=sys.stderr)
        return USAGE_EXIT
    if options:
        code = _plant(options[1])
        if code != 0:
            return code
    if command[0] == "probe":
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported, which reads it once
        return _probe(command[1:])
    if command[0] == "module":
        return _module(command[1:])
    from q4kd.harness.__main__ import main as q4kd

    return q4kd(command)


def hear_signals() -> None:
    """Let a run hear the signals that whoever started the harness ignores, as ``nohup`` and a shell's ``&`` make it.

    Claims are about what these signals do.
    """
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


def _plant(name: str) -> int:
    from q4kd.harness.runs.faults import VOID_EXIT, MissingTarget, get_fault, plant

    try:
        fault = get_fault(name)
    except InputError as error:
        print(f"q4kd: {error}", file=sys.stderr)
        return USAGE_EXIT
    try:
        plant(fault)
    except MissingTarget as error:
        print(f"VOID: {error.target} missing", file=sys.stderr)
        return VOID_EXIT
    except Exception as error:  # a fault that cannot be planted tests nothing, for whatever reason
        print(f"VOID: {name} could not be planted: {type(error).__name__}: {error}", file=sys.stderr)
        return VOID_EXIT
    return 0


def _probe(command: list[str]) -> int:
    from q4kd.harness.runs.probes import PROBES

    if not command or command[0] not in PROBES:
        known = ", ".join(sorted(PROBES)) or "none are registered"
        print(f"q4kd: probe: expected one of: {known}", file=sys.stderr)
        return USAGE_EXIT
    return PROBES[command[0]](command[1:])


def _module(command: list[str]) -> int:
    if not command:
        print("q4kd: module: expected the name of a module", file=sys.stderr)
        return USAGE_EXIT
    sys.argv = command
    sys.path.insert(0, str(Path.cwd()))  # as -m does; it is the run's own folder, in which nobody else has put a file
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)
    return 0


def _die_with_parent() -> None:
    """Ask the kernel to kill this process when its supervisor dies, so that no orphan keeps a GPU busy."""
    parent = os.getppid()
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    except (OSError, AttributeError):
        return  # not Linux
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def launch() -> NoReturn:
    """Run as a child process: tie this process's life to its supervisor's, then do what the command line says."""
    _die_with_parent()
    code = main()
    # The last collection would walk every object of torch and transformers for a second, to free what the kernel frees.
    gc.freeze()
    sys.exit(code)


if __name__ == "__main__":
    launch()
