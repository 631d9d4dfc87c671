"""Counts what would make the host wait for a device, in work that runs on the CPU in the device's place."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Operators whose result, or its size, the host reads. ``int(x)``, ``bool(x)`` and ``x.item()`` are the first.
_READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_consecutive", "bincount"}
# On the CPU these are no operators.
_METHODS = {Tensor.tolist, Tensor.numpy, Tensor.cpu}


def _place() -> str:
    """The innermost line that is neither torch's nor this file's."""
    frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
    frame = [frame for frame in frames if frame.filename != __file__][-1]
    return f"{frame.filename.rpartition('/')[2]}: {frame.line}"


class _Operators(TorchDispatchMode):  # type: ignore[misc, no-untyped-call]
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        is_masked = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in _READS or is_masked:
            self.found.append(f"{name} in {_place()}")
        return function(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):  # type: ignore[misc, no-untyped-call]
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A tensor that is made of numbers right on a device comes from pageable memory.
        if function in _METHODS or (function in (torch.tensor, torch.as_tensor) and "device" in (kwargs or {})):
            self.found.append(f"{function.__name__} in {_place()}")
        return function(*args, **(kwargs or {}))


@contextmanager
def host_reads() -> Iterator[list[str]]:
    """Give a list that says, for every wait inside, what made it and where."""
    found: list[str] = []
    with _Methods(found), _Operators(found):
        yield found
