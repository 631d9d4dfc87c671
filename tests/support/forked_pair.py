"""Runs of two processes over gloo, forked from one that has imported torch: its start is paid once for all of them.

What ``torch.distributed.run`` does for a pair, without its own start and theirs; a test of ``q4kd distill`` uses that.
"""

import importlib
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from q4kd.harness.runs.start.forked import ONE_THREADED

IMPORTS = ("torch", "torch.distributed.fsdp", "transformers.models.qwen2.modeling_qwen2", "accelerate", "peft")
RANKS = 2


class ForkedPair:
    """A process to fork pairs from; a context manager."""

    def __enter__(self) -> "ForkedPair":
        environment = {**os.environ, **ONE_THREADED, "OMP_NUM_THREADS": "1"}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._server = subprocess.Popen([sys.executable, __file__], env=environment, **pipes)
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._server.communicate(timeout=60)  # its standard input ends, and so does it

    def run(self, words: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        """Run ``q4kd WORDS`` in two processes with some more variables; both must end with 0."""
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps([list(words), dict(env or {})]) + "\n")
        self._server.stdin.flush()
        codes = self._server.stdout.readline()
        assert json.loads(codes or "null") == [0] * RANKS, codes


def free_port() -> int:
    """Return a port that nobody listens on, below those that Linux gives to outgoing connections."""
    while True:
        port = random.SystemRandom().randrange(20000, 32768)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def become(rank: int, port: int, words: list[str], env: dict[str, str]) -> None:
    """Run the command as a process of a pair; what it prints goes to stderr, for stdout carries the answers."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in numbers.items()}, MASTER_ADDR="127.0.0.1", **env)
    sys.argv[:] = ["q4kd", *words]
    runpy.run_module("q4kd.harness", run_name="__main__", alter_sys=True)


def main() -> None:
    """Fork a pair for each line of standard input, and answer with how both ended."""
    for name in IMPORTS:
        importlib.import_module(name)
    for line in sys.stdin:
        words, env = json.loads(line)
        port, pids = free_port(), []
        for rank in range(RANKS):
            pids.append(os.fork())
            if pids[-1] == 0:
                become(rank, port, words, env)
                return
        codes = {}
        while len(codes) < RANKS:
            pid, status = os.wait()
            codes[pid] = os.waitstatus_to_exitcode(status)
            if codes[pid]:  # the other one waits for it
                for other in set(pids) - codes.keys():
                    os.kill(other, signal.SIGKILL)
        print(json.dumps([codes[pid] for pid in pids]), flush=True)


if __name__ == "__main__":
    main()
