"""The CUDA kernels' own source, built by the host compiler and run a fiber a thread (see host_cuda.h)."""

import ctypes
import fcntl
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from torch import Tensor

from q4kd.trainer.kernels.grids_header import GRIDS_HEADER, grids_header
from q4kd.trainer.kernels.launch import Argument

SUPPORT = Path(__file__).resolve().parent
KERNELS = SUPPORT.parents[1] / "trainer/kernels/src"
# As NVRTC's -fmad=false: a fused multiply-add would round once where the reference rounds twice.
# Shared memory is read in words of another size than it was written in, which nvcc allows and C++ does not.
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-fno-strict-aliasing", "-Wall")
FLAGS += ("-Wno-unknown-pragmas",)
LIBRARY = "libq4kd_host_kernels.so"


def host_compiler() -> str | None:
    """The C++ compiler named by CXX, else the first one found."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)


def build(folder: Path, kernels: Path = KERNELS, *, decoders_only: bool = False) -> Path:
    """Compile the kernels in ``kernels``, or only those that decode, to a shared library in ``folder``."""
    compiler = host_compiler()
    assert compiler is not None
    library = folder / LIBRARY
    (folder / GRIDS_HEADER).write_text(grids_header())
    options = [f"-I{SUPPORT}", f"-I{kernels}", f"-I{folder}", *(["-DDECODERS_ONLY"] if decoders_only else [])]
    command = [compiler, *FLAGS, *options, "-x", "c++", str(SUPPORT / "host_kernels.cpp"), "-o", str(library)]
    subprocess.run(command, check=True, timeout=300)
    return library


def extent(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last one."""
    if tensor.numel() == 0:
        return 0
    last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


class HostLauncher:
    """Runs kernels on CPU tensors; an access outside the tensors of the launch is an AssertionError."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.host_launch.restype = ctypes.c_char_p
        self.launched: set[str] = set()

    def __call__(self, kernel: str, grid: int, arguments: Sequence[Argument], writes: Sequence[Tensor]) -> None:
        self.launched.add(kernel)
        written = {tensor.data_ptr() for tensor in writes}
        integers, number = [], 0.0
        for argument in arguments:
            if isinstance(argument, Tensor):
                address, size = ctypes.c_void_p(argument.data_ptr()), ctypes.c_int64(extent(argument))
                self._library.host_allow(address, size, int(argument.data_ptr() in written))
                integers.append(argument.data_ptr())
            elif isinstance(argument, float):
                number = argument
            else:
                integers.append(argument or 0)
        assert len(integers) <= 16
        words = (ctypes.c_int64 * 16)(*integers)
        function = ctypes.cast(getattr(self._library, kernel), ctypes.c_void_p)
        problem = self._library.host_launch(function, grid, 256, words, ctypes.c_float(number))
        assert not problem, f"{kernel}: {problem.decode()}"


def host_launcher(factory: pytest.TempPathFactory) -> HostLauncher:
    """Return a launcher of the kernels, which are built once a session, for all of its processes.

    It skips the test without a C++ compiler, or fails where kernels are required.
    """
    if host_compiler() is None:
        assert not os.environ.get("Q4KD_REQUIRE_KERNELS"), "no C++ compiler; install g++ or clang++"
        pytest.skip("no C++ compiler")
    base = factory.getbasetemp()
    # xdist gives each of its workers a folder of its own inside that of the session.
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "host-kernels"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "built").exists():
            build(folder)
            (folder / "built").touch()
    return HostLauncher(folder / LIBRARY)
