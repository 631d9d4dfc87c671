"""Runs a compiled kernel by name on torch's current stream, through CuPy, which allocates nothing here.

Launches go straight to the driver's ``cuLaunchKernel``: CuPy's own call packs every argument into a NumPy scalar first.
On an H200's host, kernels of 5, 8 and 16 arguments take 6.6, 6.9 and 11.6 microseconds this way and 7.8, 8.8 and 18.7
by CuPy's call (``q4kd bench kernels`` measures both).
"""

import ctypes
import functools
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from q4kd.trainer.kernels.compile import LAZY_MODULES, LOSS_MODULES, MODULES, architecture, load_cubin, nvrtc_version

THREADS = 256  # a block, for every kernel

Argument = Tensor | int | float | None


class Launcher(Protocol):
    """Runs a kernel by name on the current stream of the tensors' device."""

    def __call__(self, kernel: str, grid: int, arguments: Sequence[Argument], writes: Sequence[Tensor]) -> None:
        """Launch ``grid`` blocks of 256 threads. Tensors are passed by address, integers as 64 bits, ``None`` as null.

        ``writes`` are the tensors among ``arguments`` that the kernel writes.
        """


class ArgumentBuffer:
    """The memory in which a kernel's arguments lie while it is launched, eight bytes each, and pointers to them.

    The driver copies them before a launch returns, so one buffer serves every launch of a kernel from one thread; the
    arguments of each have the same types in the same places.
    """

    def __init__(self, arguments: Sequence[Argument]) -> None:
        self._layout = struct.Struct("=" + "".join("f4x" if type(value) is float else "q" for value in arguments))
        self._words = (ctypes.c_int64 * len(arguments))()
        first = ctypes.addressof(self._words)
        self._pointers = (ctypes.c_void_p * len(arguments))(*(first + 8 * i for i in range(len(arguments))))
        self.address = ctypes.addressof(self._pointers)

    def fill(self, arguments: Sequence[Argument]) -> None:
        """Write a launch's arguments: addresses of tensors, 64-bit integers, float32 numbers, null for ``None``."""
        words = [value.data_ptr() if isinstance(value, Tensor) else value or 0 for value in arguments]
        self._layout.pack_into(self._words, 0, *words)


class _ThreadBuffers(threading.local):
    """Argument buffers of one thread, by kernel; the thread's first launch makes them and calls ``enter``."""

    def __init__(self, enter: Callable[[], object]) -> None:
        enter()
        self.of_kernel: dict[str, ArgumentBuffer] = {}


def _current_stream_of() -> Callable[[int], int]:
    """Return a function from a device to its current stream: torch's own, which makes no object, where it has one."""
    shortcut: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return shortcut or (lambda index: int(torch.cuda.current_stream(index).cuda_stream))


# The first word of a kernel's name tells the module that it is in; all others are elementwise. Those that decode one of
# these types, the second word, are in a module beside.
_IQ_MODULE = frozenset(("iq1", "iq2", "iq3", "mxfp4", "nvfp4", "tq1", "tq2"))
_MODULE_OF = {"decode": "decode", "gather": "decode", "repack": "decode", "unpack": "decode", "matvec": "matvec"}
_MODULE_OF |= dict.fromkeys(("route", "count", "scan", "place", "take", "combine", "clamped"), "routing")
_MODULE_OF |= {"experts": "experts", "convolve": "states", "states": "states"}


def module_of(kernel: str) -> str:
    """Return the name of the module that a kernel is in."""
    if kernel.startswith("loss_"):
        return next(name for name in LOSS_MODULES if f"_{name.removeprefix('loss_')}_" in kernel)
    first, second, *_ = kernel.split("_")
    module = _MODULE_OF.get(first, "elementwise")
    return f"{module}_iq" if module in ("decode", "experts") and second in _IQ_MODULE else module


class CudaLauncher:
    """Loads the cubins for a device, compiling them on first use, and launches on torch's current stream.

    ``function`` returns CuPy's function of a kernel's name.

    Args:
        device: a CUDA device, with its index.

    Raises:
        InputError: when CuPy is missing or the device is too old.
        CompileError: when the compiler refuses a kernel.
    """

    def __init__(self, device: torch.device) -> None:
        nvrtc_version()
        import cupy

        self._index = device.index
        self._arch = architecture(torch.cuda.get_device_capability(self._index))
        self._module = functools.cache(self._load)
        self.function = functools.cache(self._find)
        with torch.cuda.device(self._index):
            torch.cuda.current_stream().synchronize()  # makes torch's context current before the modules go into it
            for name in MODULES:
                if name not in LAZY_MODULES:  # the others are loaded at their first launch
                    self._module(name)
            # A thread's first launch binds the device's context to it, as setting the device does since CUDA 12.
            self._buffers = _ThreadBuffers(lambda: cupy.cuda.runtime.setDevice(self._index))
        driver = cupy.cuda.driver
        self._launch_kernel = driver.launchKernel
        self._current_stream = _current_stream_of()

    def __call__(self, kernel: str, grid: int, arguments: Sequence[Argument], writes: Sequence[Tensor]) -> None:
        """Launch; see ``Launcher``."""
        if torch.cuda.current_device() != self._index:
            with torch.cuda.device(self._index):
                self(kernel, grid, arguments, writes)
            return
        buffers = self._buffers.of_kernel
        buffer = buffers.get(kernel)
        if buffer is None:
            buffer = buffers[kernel] = ArgumentBuffer(arguments)
        function = self.function(kernel)
        buffer.fill(arguments)
        stream = self._current_stream(self._index)
        self._launch_kernel(function.ptr, grid, 1, 1, THREADS, 1, 1, 0, stream, buffer.address, 0)

    def _load(self, name: str) -> Any:
        import cupy

        module = cupy.cuda.function.Module()
        module.load(load_cubin(name, self._arch))
        return module

    def _find(self, kernel: str) -> Any:
        return self._module(module_of(kernel)).get_function(kernel)
