"""Options of the tests.

The table of ``nox -s parity``: rows recorded by tests, shown at the end, saved where ``--parity-out`` says;
``--parity-file`` adds files of yours to it. And ``--as-if FLAG``: the automatic dtype chooses as on a processor with
that flag.
"""

import functools
import json
import os
import platform
import signal
import tempfile
import threading
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import as_if
import pytest

_ROWS = pytest.StashKey[list[dict[str, Any]]]()
_COLUMNS = ("file", "types", "cosine", "error", "their_error", "top1", "kl")
_LEGEND = """cosine: worst position, ours and llama.cpp's logits
error, their_error: worst relative Frobenius error of a position against float64 of the same file, ours and llama.cpp's
top1: positions of equal arg max; kl: mean KL(llama.cpp || ours), nats
particulars: what the family and its file have of their own"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--parity-out", type=Path, metavar="FILE.json", help="save the table of the parity tests")
    also = "a GGUF of yours for the parity tests, which also decode it to F32; may be given several times"
    parser.addoption("--parity-file", type=Path, action="append", default=[], metavar="FILE.gguf", help=also)
    choose = "choose the automatic dtype as on a processor with this flag, bfloat16 at every size"
    parser.addoption("--as-if", choices=("amx_bf16", "avx512_bf16"), help=choose)


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # as the command line does: tests call what is below it
    config.stash[_ROWS] = []
    # nohup, and a shell without job control in the background, start programs deaf to signals, and that is inherited.
    if threading.current_thread() is threading.main_thread():
        for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
            if signal.getsignal(number) is signal.SIG_IGN:
                signal.signal(number, handler)
                config.add_cleanup(functools.partial(signal.signal, number, signal.SIG_IGN))
    if flag := config.getoption("--as-if"):
        folder = tempfile.TemporaryDirectory(prefix="q4kd-as-if-")
        config.add_cleanup(folder.cleanup)
        as_if.pretend(flag)
        os.environ |= as_if.children_environment(flag, Path(folder.name))


@pytest.fixture
def record_parity(request: pytest.FixtureRequest) -> Callable[[dict[str, Any]], None]:
    """Add a row to the table."""
    return request.config.stash[_ROWS].append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[_ROWS]
    if not rows:
        return
    terminalreporter.section("parity with llama.cpp")
    terminalreporter.write_line(_LEGEND + "\n")
    terminalreporter.write_line("{:<34} {:<24} {:>9} {:>9} {:>11} {:>6} {:>9}".format(*_COLUMNS))
    for row in rows:
        terminalreporter.write_line(
            "{file:<34} {types:<24} {cosine:>9.6f} {error:>9.1e} {their_error:>11.1e} {top1:>6.3f} {kl:>9.1e}"
            "  {particulars}".format(**{"particulars": ""} | row)
        )


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    rows, out = session.config.stash[_ROWS], session.config.getoption("--parity-out")
    if rows and out:
        record = {
            "schema": "q4kd-parity/1",
            "legend": _LEGEND.splitlines(),
            "exit_status": int(exitstatus),
            "machine": platform.machine(),
            "versions": {name: version(name) for name in ("llama-cpp-python", "torch", "numpy", "gguf")},
            "rows": rows,
        }
        out.write_text(json.dumps(record, indent=1) + "\n")
