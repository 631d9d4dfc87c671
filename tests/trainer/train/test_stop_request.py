"""Ctrl-C and SIGTERM are remembered, agreed upon between processes, and obeyed at once the second time."""

import os
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from q4kd.trainer.train.stop_request import StopRequest

ALONE = SimpleNamespace(num_processes=1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_remembered_and_said(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.agreed(ALONE) == 0
        os.kill(os.getpid(), number)
        assert stop.agreed(ALONE) == number
    assert signal.getsignal(number) is before
    assert f"{number.name}: finishing this step, then a checkpoint" in capfd.readouterr().err


def test_all_processes_stop_when_one_has_heard() -> None:
    class Two:
        num_processes, device = 2, torch.device("cpu")

        @staticmethod
        def reduce(mine: torch.Tensor, reduction: str) -> torch.Tensor:
            assert reduction == "sum"
            return mine + torch.tensor([0, 1, 0])  # the other one heard SIGTERM

    with StopRequest() as stop:
        assert stop.signal_number == 0
        assert stop.agreed(Two()) == signal.SIGTERM


def test_a_second_signal_ends_the_process_at_once() -> None:
    program = (
        "import os, signal, time\nfrom q4kd.trainer.train.stop_request import StopRequest\n"
        "with StopRequest():\n"
        "    try:\n"
        "        for _ in range(2):\n            os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.01)\n"
        "        time.sleep(60)\n"
        "    except BaseException:\n        os._exit(1)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 128 + signal.SIGTERM
    assert "stopped at once" in done.stderr


def test_another_thread_than_the_main_one_changes_no_handler() -> None:
    found: list[Any] = []

    def enter() -> None:
        with StopRequest() as stop:
            found.append((signal.getsignal(signal.SIGTERM), stop.agreed(ALONE)))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [(before, 0)]
