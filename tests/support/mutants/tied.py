"""Runs ``judge …`` or ``pytest …`` in a process whose life is tied to its parent's: no child outlives a killed session.

``adopt_orphans`` is the parent's half: processes that lose their parent become its children, where it finds them.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def adopt_orphans() -> None:
    """Make this process the parent of every descendant that loses its own (Linux only)."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def main(words: list[str]) -> int:
    """Do what the first word says with the words after it and return the exit code."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return 1
    if words[0] == "pytest":
        import pytest

        return int(pytest.main(words[1:]))
    from mutants.judge import main as judge

    return judge(words[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
