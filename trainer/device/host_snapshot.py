"""A copy of tensors in the host's memory, for which a GPU is not made to wait.

The memory is kept from one copy to the next. For a GPU it is pinned, and the copy is made on a stream of its own: what
is queued afterwards runs beside it, as long as it only reads the tensors. Who changes them waits for ``copied`` first.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

# torch gives pinned memory in powers of two: blocks of these are cut, so that little is lost.
_BLOCK_BYTES = 256 << 20
_ALIGNMENT = 64


class HostSnapshot:
    """Host memory for one copy of named tensors.

    Args:
        device: where the tensors are, most of them: a CPU, or the GPU whose stream is waited for.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._device = device
        self._blocks: list[tuple[Tensor, int]] = []
        self._buffers: dict[str, Tensor] = {}
        make_stream: Any = torch.cuda.Stream
        self._stream: Any = make_stream(device) if self._is_cuda else None
        self.is_pinned = self._is_cuda

    @property
    def is_empty(self) -> bool:
        """Whether no memory is held yet."""
        return not self._buffers

    def reserve(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Take the memory that ``copy`` will need for such tensors."""
        for name, tensor in tensors:
            self._buffer(name, tensor)

    def begin(self) -> None:
        """Wait until what is queued on the GPU is done, the last update too, so that a copy sees it.

        It also orders copies of what is on the host and yet written by the GPU, as paged moments are.
        """
        if self._is_cuda:
            torch.cuda.current_stream(self._device).synchronize()

    def copy(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Copy tensors by name and return the copies. Those from a GPU are complete after ``copied`` only."""
        return {name: self._copy(name, tensor.detach()) for name, tensor in tensors}

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        buffer = self._buffer(name, tensor)
        if not tensor.is_cuda:
            return buffer.copy_(tensor)
        # A tensor that was made for this copy is complete in the stream that made it, and is kept until it is read.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            buffer.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._stream)
        return buffer

    def copied(self) -> Any:
        """Return an event of the GPU behind all copies that are queued; None where they are made at once."""
        return self._stream.record_event() if self._is_cuda else None

    def _buffer(self, name: str, tensor: Tensor) -> Tensor:
        found = self._buffers.get(name)
        if found is None or found.shape != tensor.shape or found.dtype != tensor.dtype:
            size = tensor.numel() * tensor.element_size()
            found = self._cut(size).view(tensor.dtype).reshape(tensor.shape)
            self._buffers[name] = found
        return found

    def _cut(self, size: int) -> Tensor:
        """Return uint8 ``[size]`` of memory that nobody else has."""
        if not self._is_cuda:
            return torch.empty(size, dtype=torch.uint8)
        index = next((at for at, (block, used) in enumerate(self._blocks) if size <= len(block) - used), None)
        if index is None:
            index = len(self._blocks)
            self._blocks.append((self._new_block(max(_BLOCK_BYTES, 1 << max(0, size - 1).bit_length())), 0))
        block, used = self._blocks[index]
        self._blocks[index] = block, used + -(-size // _ALIGNMENT) * _ALIGNMENT
        return block[used : used + size]

    def _new_block(self, size: int) -> Tensor:
        if self.is_pinned:
            try:
                return torch.empty(size, dtype=torch.uint8, pin_memory=True)
            except RuntimeError:  # The system limits locked memory: the host waits for its copies then.
                self.is_pinned = False
        return torch.empty(size, dtype=torch.uint8)
