"""Allocation failures of torch, NumPy and CuPy are recognised; each is explained: what was asked, held, would help."""

import subprocess
import sys
import weakref
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import torch

import q4kd.trainer.train.memory.out_of_memory as out_of_memory
from q4kd.trainer.config.settings import DistillConfig, make_config
from q4kd.trainer.demo import student_path, teacher_path
from q4kd.trainer.errors import OutOfMemoryError
from q4kd.trainer.train.memory.out_of_memory import bytes_asked, explaining_memory, is_out_of_memory
from q4kd.trainer.train.memory.planner import place_run_teacher

HUGE = 1 << 55


def config(tmp_path: Path) -> DistillConfig:
    return make_config(
        {"teacher": teacher_path(), "student": student_path(), "data": tmp_path, "out": tmp_path, "seq_len": 64}
    )


def explaining(tmp_path: Path) -> AbstractContextManager[None]:
    settings = config(tmp_path)
    return explaining_memory(settings, place_run_teacher(settings), lambda: None)


@pytest.mark.parametrize(
    ("message", "asked"),
    [
        ("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 79.11 GiB", 3 << 29),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes.", 4096),
        ("Unable to allocate 2.00 MiB for an array with shape (1,)", 2 << 20),
        ("Out of memory allocating 4,096 bytes (allocated so far: 0 bytes).", 4096),
        ("out of memory", None),
        ("tried to allocate 1 parsec", None),
    ],
)
def test_the_bytes_asked_for_are_read_from_the_message(message: str, asked: int | None) -> None:
    assert bytes_asked(message) == asked


def test_real_failures_of_torch_and_numpy_are_recognised() -> None:
    with pytest.raises(RuntimeError) as torch_error:
        torch.empty(HUGE, dtype=torch.uint8)
    with pytest.raises(MemoryError) as numpy_error:
        np.empty(HUGE, np.uint8)
    for error in (torch_error.value, numpy_error.value):
        assert is_out_of_memory(error)
        assert bytes_asked(str(error)) == HUGE
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_the_explanation_names_asked_held_and_what_helps(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-000004").mkdir(parents=True)
    with pytest.raises(OutOfMemoryError) as caught, explaining(tmp_path):
        torch.empty(HUGE, dtype=torch.uint8)
    message = str(caught.value)
    assert caught.value.exit_code == 75
    for words in ("asked for 36028797.02 GB", "host", "batch_size 4 with accumulation 2", "saves", "kept: step-000004"):
        assert words in message


def test_what_the_failed_step_held_is_given_back_before_explaining(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def step() -> None:
        activations = torch.zeros(1 << 20)
        held.append(weakref.ref(activations))
        torch.empty(HUGE, dtype=torch.uint8)

    alive: list[bool] = []
    monkeypatch.setattr(out_of_memory, "_helps", lambda *_arguments: str(alive.append(held[0]() is not None)))
    with pytest.raises(OutOfMemoryError), explaining(tmp_path):
        step()
    assert alive == [False]


EXHAUSTED = """
import resource, sys
from pathlib import Path
import torch
from q4kd.trainer.config.settings import make_config
from q4kd.trainer.demo import student_path, teacher_path
from q4kd.trainer.train.memory.out_of_memory import explaining_memory
from q4kd.trainer.train.memory.planner import place_run_teacher, plan_run
folder = Path(sys.argv[1])
config = make_config(
    {"teacher": teacher_path(), "student": student_path(), "data": folder, "out": folder, "seq_len": 64}
)
placement = place_run_teacher(config)
plan_run(config, placement)
with explaining_memory(config, placement, lambda: None):
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    torch.empty(1 << 40, dtype=torch.uint8)
"""


def test_an_exhausted_process_still_says_what_helps(tmp_path: Path) -> None:
    command = [sys.executable, "-c", EXHAUSTED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "OutOfMemoryError: out of memory on cpu: asked for 1099.51 GB" in done.stderr
    assert "what helps: batch_size 4 with accumulation 2 (the same batch) (saves " in done.stderr


def test_other_errors_pass_and_a_plan_that_fails_still_explains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError, match="shapes"), explaining(tmp_path):
        raise RuntimeError("shapes do not match")

    def broken(*_arguments: object) -> object:
        raise MemoryError

    monkeypatch.setattr("q4kd.trainer.train.memory.planner.plan_run", broken)
    assert "gradient_checkpointing" in out_of_memory.explain(config(tmp_path), None, "out of memory", None)
