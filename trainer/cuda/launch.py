"""Running a compiled kernel by name on torch's current stream, through CuPy, which allocates nothing here."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from q4kd.trainer.cuda.compile import MODULES, architecture, load_cubin, nvrtc_version

THREADS = 256  # a block, for every kernel

Argument = Tensor | int | float | None


class Launcher(Protocol):
    """Runs a kernel by name on the current stream of the tensors' device."""

    def __call__(self, kernel: str, grid: int, arguments: Sequence[Argument], writes: Sequence[Tensor]) -> None:
        """Launch ``grid`` blocks of 256 threads. Tensors are passed by address, integers as 64 bits, ``None`` as null.

        Args:
            kernel: its name.
            grid: blocks.
            arguments: in the kernel's order.
            writes: those of ``arguments`` that the kernel writes.
        """


class _StreamHandle:
    """A ``cudaStream_t`` under the protocol by which CuPy adopts other libraries' streams."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._handle


class CudaLauncher:
    """Loads the cubins for a device, compiling them on first use, and launches on torch's current stream.

    Args:
        device: a CUDA device, with its index.

    Raises:
        InputError: when CuPy is missing or the device is too old.
        CompileError: when the compiler refuses a kernel.
    """

    def __init__(self, device: torch.device) -> None:
        nvrtc_version()
        import cupy
        import numpy

        self._index = device.index
        arch = architecture(torch.cuda.get_device_capability(self._index))
        self._modules = []
        with torch.cuda.device(self._index):
            torch.cuda.current_stream().synchronize()  # makes torch's context current before the modules go into it
            for name in MODULES:
                module = cupy.cuda.function.Module()
                module.load(load_cubin(name, arch))
                self._modules.append(module)
        self._driver_error = cupy.cuda.driver.CUDADriverError
        # CuPy 14 deprecates the one, CuPy 13 lacks the other.
        from_external = getattr(cupy.cuda.Stream, "from_external", None)
        self._adopt = (
            (lambda handle: from_external(_StreamHandle(handle))) if from_external else cupy.cuda.ExternalStream
        )
        self._float32 = numpy.float32
        self._functions: dict[str, Any] = {}
        self._streams: dict[int, Any] = {}

    def __call__(self, kernel: str, grid: int, arguments: Sequence[Argument], writes: Sequence[Tensor]) -> None:
        """Launch; see ``Launcher``."""
        values = tuple(
            argument.data_ptr()
            if isinstance(argument, Tensor)
            else self._float32(argument)
            if isinstance(argument, float)
            else argument or 0
            for argument in arguments
        )
        handle = torch.cuda.current_stream(self._index).cuda_stream
        if handle not in self._streams:
            self._streams[handle] = self._adopt(handle)
        function = self._functions.get(kernel) or self._find(kernel)
        if torch.cuda.current_device() == self._index:
            function((grid,), (THREADS,), values, stream=self._streams[handle])
        else:
            with torch.cuda.device(self._index):
                function((grid,), (THREADS,), values, stream=self._streams[handle])

    def _find(self, kernel: str) -> Any:
        for module in self._modules:
            try:
                function = module.get_function(kernel)
            except self._driver_error:
                continue
            self._functions[kernel] = function
            return function
        raise KeyError(f"no kernel {kernel}")
