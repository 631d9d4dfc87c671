"""An arm in a process of its own, driven over pipes: one JSON object a line, each way.

Two thread pools in one process fight for the cores, so every CPU engine gets its own process with a fixed number of
threads. Only one works at a time: the others sleep in a read, and a turn begins ``_SETTLE_S`` after the last one ended,
when the OpenMP threads of that one, which spin for milliseconds before they sleep, are asleep too.

    parent → {"ids": "ids.npy", "save": "logits.npy" or null}      worker → {"seconds": 1.25} or {"failed": "why"}
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from q4kd.trainer.bench.interleave import Arm, Ids

_SETTLE_S = 0.1
_STOP_S = 10


class ArmFailed(Exception):  # noqa: N818 - an outcome that the table shows, not an error of this program
    """An arm could not be prepared or run; the message is its own."""


class WorkerArm:
    """Runs ``python -m MODULE ARGUMENTS``, which calls ``serve``, and speaks the protocol above; ``interleave.Arm``.

    ``threads`` is the size of its OpenMP pools.
    """

    def __init__(self, name: str, module: str, arguments: Sequence[str], threads: int) -> None:
        self.name = name
        self._command = [sys.executable, "-P", "-m", module, *arguments]
        self._environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        self._process: subprocess.Popen[str] | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="q4kd-bench-")

    def prepare(self) -> dict[str, Any]:
        """Start the process; return the facts it sends when its model is loaded.

        Raises:
            ArmFailed: when it cannot be loaded.
        """
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=self._environment, text=True
        )
        return self._answer()

    def run(self, ids_BT: Ids, save: Path | None = None) -> float:
        """Return the seconds that the worker measured.

        Raises:
            ArmFailed: when it failed or ended.
        """
        ids = Path(self._folder.name) / "ids.npy"
        np.save(ids, ids_BT, allow_pickle=False)
        process = self._running()
        assert process.stdin is not None
        time.sleep(_SETTLE_S)
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps({"ids": str(ids), "save": None if save is None else str(save)}) + "\n")
            process.stdin.flush()
        return float(self._answer()["seconds"])

    def close(self) -> None:
        """End the process and remove its folder."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(OSError):
                process.communicate(timeout=_STOP_S)
            if process.poll() is None:
                process.kill()
                process.wait()
        self._folder.cleanup()

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            raise ArmFailed(f"{self.name} is not prepared")
        return self._process

    def _answer(self) -> dict[str, Any]:
        process = self._running()
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise ArmFailed(f"{self.name} ended with exit code {process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise ArmFailed(f"{self.name}: {answer['failed']}")
        return answer


def serve(arm: Arm) -> int:
    """Be the worker: prepare ``arm``, then run it for every line of standard input."""
    # Engines print; the protocol keeps the real standard output for itself.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        say(arm.prepare())
        for line in sys.stdin:
            request = json.loads(line)
            ids = np.load(request["ids"], allow_pickle=False)
            say({"seconds": arm.run(ids, None if request["save"] is None else Path(request["save"]))})
    except Exception as error:
        say({"failed": f"{type(error).__name__}: {error}"})
        return 1
    finally:
        arm.close()
    return 0
