"""One declaration per kernel: a method that checks a call and plans its launch once, and from then on only launches.

A kernel is declared as a method of a ``KernelSet`` under ``@kernel``. Its body is the whole declaration: the checks of
the arguments, the kernel's name (whose first word names its source file: see ``launch.module_of``), its arguments in
order, what it writes and how many blocks it takes. The body runs once for all calls that differ only in addresses, the
usual ones; those find the launch prepared and cost a few microseconds. So it may read a tensor's dtype, shape, strides,
device and address modulo 16, and nothing else of it.
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from q4kd.trainer.kernels.launch import THREADS, Argument, CudaLauncher, Launcher

DTYPES = {torch.bfloat16: "bf16", torch.float32: "f32"}
# A model needs some tens of launches for every number of tokens that it is given.
_MAX_PREPARED = 4096
_PLAIN = frozenset((str, int, float, type(None)))  # told apart from tensors sooner than by ``isinstance``


class Launch(NamedTuple):
    """What a checked call launches."""

    kernel: str
    grid: int  # blocks of 256 threads; 0 where there is nothing to do
    arguments: Sequence[Argument]  # in the kernel's order
    writes: Sequence[Tensor]  # those among the arguments that the kernel writes


_Pick = Callable[[tuple[Any, ...]], tuple[Any, ...]]


def _pick(places: Sequence[int]) -> _Pick:
    """Return a function that takes those places of a tuple, as a tuple."""
    # One place is taken as a slice, since ``itemgetter`` returns no tuple for a single index.
    return operator.itemgetter(*places) if len(places) > 1 else operator.itemgetter(slice(places[0], places[0] + 1))


class _Prepared(NamedTuple):
    """A launch whose tensors are places in a call, so that it serves every call with equal facts."""

    kernel: str
    grid: int
    constants: tuple[Argument, ...]  # the kernel's arguments that are no tensors
    arguments: _Pick  # the kernel's, from the call's and the constants
    writes: _Pick  # what the kernel writes, from the call's


class KernelSet:
    """Kernels of one device, with the launches prepared for the calls that they have had.

    Args:
        device: device of every tensor passed in.
        launcher: what runs the kernels; by default it runs them on the CUDA device.

    Raises:
        InputError: when CuPy is missing or the device is too old.
    """

    def __init__(self, device: torch.device | str, launcher: Launcher | None = None) -> None:
        self.device = torch.empty(0, device=device).device  # with its index
        self._launch: Launcher = CudaLauncher(self.device) if launcher is None else launcher
        self._prepared: dict[tuple[Any, ...], _Prepared] = {}

    @property
    def launcher(self) -> Launcher:
        """What runs the kernels; other kernels of the same device may share it."""
        return self._launch

    def _prepare(self, declared: Callable[..., Launch], call: Sequence[Any], names: Sequence[str]) -> _Prepared:
        # Each argument becomes a tensor object of its own, since two of a call may be one tensor.
        values = [value.detach() if isinstance(value, Tensor) else value for value in call]
        first = len(values) - len(names)
        launch = declared(self, *values[:first], **dict(zip(names, values[first:], strict=True)))
        places = {id(value): index for index, value in enumerate(values) if isinstance(value, Tensor)}
        constants: list[Argument] = []
        chosen = []
        for argument in launch.arguments:
            if isinstance(argument, Tensor):
                chosen.append(places[id(argument)])
            else:
                chosen.append(len(values) + len(constants))
                constants.append(argument)
        if len(self._prepared) >= _MAX_PREPARED:
            self._prepared.clear()
        writes = _pick([places[id(tensor)] for tensor in launch.writes])
        return _Prepared(launch.kernel, launch.grid, tuple(constants), _pick(chosen), writes)

    def _check(
        self, name: str, tensor: Tensor, dtypes: Sequence[torch.dtype], *shape: int | None, rows: bool = False
    ) -> None:
        """Require a dtype, a shape (``None``: any length), contiguity and the device.

        With ``rows``, only each row must be contiguous; the stride between rows is free as long as they do not overlap.
        """
        sizes = zip(shape, tensor.shape, strict=False)
        fits = tensor.dim() == len(shape) and all(want in (None, have) for want, have in sizes)
        require(
            fits and tensor.dtype in dtypes and tensor.device == self.device,
            f"{name}: expected {[str(dtype) for dtype in dtypes]} {list(shape)} on {self.device}, "
            f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device}",
        )
        if rows and tensor.numel():
            apart = len(tensor) == 1 or tensor.stride(0) >= math.prod(tensor.shape[1:])
            message = f"{name}: expected rows contiguous in themselves, got strides {tensor.stride()}"
            require(tensor[0].is_contiguous() and apart, message)
        else:
            require(tensor.is_contiguous(), f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")


_Set = TypeVar("_Set", bound=KernelSet)
_Call = ParamSpec("_Call")


def kernel(declared: Callable[Concatenate[_Set, _Call], Launch]) -> Callable[Concatenate[_Set, _Call], None]:
    """Make a kernel's declaration a method that launches it, planned once for tensors that differ only in address."""

    @functools.wraps(declared)
    def launch(kernels: _Set, /, *call: Any, **options: Any) -> None:
        if options:
            call = (*call, *options.values())
        key = (
            declared,
            *options,
            *[
                value
                if type(value) in _PLAIN or not isinstance(value, Tensor)
                else (value.dtype, value.shape, value.stride(), value.device, value.data_ptr() % 16)
                for value in call
            ],
        )
        prepared = kernels._prepared.get(key)
        if prepared is None:
            prepared = kernels._prepared[key] = kernels._prepare(declared, call, tuple(options))
        name, grid, constants, arguments, writes = prepared
        if grid:
            kernels._launch(name, grid, arguments(call + constants), writes(call))

    return launch


def require(condition: bool, message: str) -> None:
    """Raise ``ValueError`` with ``message`` unless ``condition``."""
    if not condition:
        raise ValueError(message)


def offset(tensor: Tensor) -> int:
    """Return a tensor's address modulo 16."""
    return tensor.data_ptr() % 16


def is_wide(*tensors: Tensor | None) -> bool:
    """Return whether eight elements at a time may be read: 16-byte addresses, rows whole multiples of eight."""
    return all(
        tensor is None or (offset(tensor) == 0 and all(stride % 8 == 0 or stride == 1 for stride in tensor.stride()))
        for tensor in tensors
    )


def blocks(threads: int) -> int:
    """Return how many blocks hold so many threads."""
    return -(-threads // THREADS)
