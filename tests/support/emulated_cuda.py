"""The CUDA forward on the CPU: reference kernels, and a timeline that sees a buffer used too early."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from reference_kernels import ReferenceKernels, device_tensors, widening_multiply

import q4kd.trainer.teacher.cuda.forward as forward_module
import q4kd.trainer.teacher.cuda.parts as parts_module
from q4kd.harness.inputs.demo import GOLDEN_TEACHER
from q4kd.trainer.formats.open import open_model
from q4kd.trainer.kernels.teacher_kernels import Kernels
from q4kd.trainer.teacher.cuda.forward import CudaForward


class Recorder:
    """A timeline that fails when a buffer is written while it is read, or read before it was written."""

    def __init__(self) -> None:
        self.in_use: set[int] = set()
        self.written: set[int] = set()
        self.ahead = 0

    def begin(self) -> None:
        assert not self.in_use
        self.written.clear()

    @contextmanager
    def writing(self, buffer: int) -> Iterator[None]:
        assert buffer not in self.in_use
        self.ahead += bool(self.in_use)
        yield
        self.written.add(buffer)

    def reading(self, buffer: int) -> None:
        assert buffer in self.written
        self.in_use.add(buffer)

    def release(self, buffer: int) -> None:
        self.in_use.remove(buffer)


@pytest.fixture(autouse=True)
def product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward_module, "multiply", widening_multiply)
    monkeypatch.setattr(parts_module, "multiply", widening_multiply)
    monkeypatch.setattr(forward_module, "OVERLAP_MIN_TOKENS", 0)


def build(
    backend: str = "q4k",
    recorder: Recorder | None = None,
    path: Path = GOLDEN_TEACHER,
    kernels: Kernels | None = None,
    **options,
) -> CudaForward:
    model = open_model(path)
    if recorder is not None:
        options["overlap"] = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward_module, "SideStream", lambda _device, _buffers: recorder)
        return CudaForward(
            model.config,
            device_tensors(model),
            backend,
            kernels or ReferenceKernels(),
            **{"overlap": False, "graphs": False} | options,
        )
