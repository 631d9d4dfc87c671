"""The stream of decoded weights: each group is decoded into a bounded scratch just before it is multiplied.

A *slab* is a run of a group's rows that fits one scratch buffer; most groups are one slab. Within a pass the slabs are
always used in the same order, so the next one can be decoded while the current one is multiplied::

    side stream   decode 0 | decode 1   | decode 2        | decode 3
    main stream            | GEMM 0     | GEMM 1          | GEMM 2
    buffer          0      |   1        |   0 (after GEMM 0)  1 (after GEMM 1)

Letters in shapes: M tokens, R rows (outputs), K columns (inputs).
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from q4kd.trainer.teacher.cuda.weights import CudaMatrix, Group

# Gate and up of a 7B model, 2 x 18944 rows of 3584 in bfloat16, are 271.6 MB: one slab, one product. Buffers alternate,
# so the other one holds at most the down projection, 135.8 MB.
DEFAULT_SCRATCH_BYTES = 272_000_000


@dataclass(frozen=True)
class MatrixRows:
    """Rows ``start`` to ``stop`` of one matrix of a group, at row ``offset`` of their slab."""

    matrix: CudaMatrix
    start: int
    stop: int
    offset: int


@dataclass(frozen=True, eq=False)
class Slab:
    """Rows ``start`` to ``stop`` of a group, decoded together; ``buffer`` is the scratch they are decoded into."""

    buffer: int
    start: int
    stop: int
    parts: tuple[MatrixRows, ...]


def cut_slabs(group: Group, max_rows: int) -> list[tuple[int, int, tuple[MatrixRows, ...]]]:
    """Cut a group into runs of at most ``max_rows`` rows: ``(start, stop, parts)`` each."""
    count = -(-group.rows // max_rows)
    height = -(-group.rows // count)
    slabs = []
    for start in range(0, group.rows, height):
        stop = min(start + height, group.rows)
        parts, first = [], 0
        for matrix in group.matrices:
            low, high = max(start, first), min(stop, first + matrix.rows)
            if low < high:
                parts.append(MatrixRows(matrix, low - first, high - first, low - start))
            first += matrix.rows
        slabs.append((start, stop, tuple(parts)))
    return slabs


class Timeline:
    """Orders writes and reads of a scratch buffer; here one stream does everything in order, so nothing has to wait."""

    def begin(self) -> None:
        """Start a pass: what the current stream did before comes before any decoding."""

    def writing(self, buffer: int) -> AbstractContextManager[None]:
        """Return a context for decoding into ``buffer``, after its last reader and before its next one."""
        return nullcontext()

    def reading(self, buffer: int) -> None:
        """Make the current stream wait for what was last written to ``buffer``."""

    def release(self, buffer: int) -> None:
        """Mark the end of the current stream's reads of ``buffer``."""


class SideStream(Timeline):
    """Decoding on a stream of its own, ordered with the current one by two events per buffer.

    Write after read: a decode waits for ``free``, recorded after the GEMM that last read the buffer. Read after write:
    a GEMM waits for ``ready``, recorded after the decode. A pass begins by waiting for the current stream, so ``free``
    events of earlier passes say nothing new and, while a graph is captured, must not be waited for: they lie outside.
    """

    def __init__(self, device: torch.device, buffers: int) -> None:
        self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self._ready = [torch.cuda.Event() for _ in range(buffers)]  # type: ignore[no-untyped-call]
        self._free = [torch.cuda.Event() for _ in range(buffers)]  # type: ignore[no-untyped-call]
        self._released: set[int] = set()

    def begin(self) -> None:
        """Make the side stream wait for the current one: for its last pass, and for whatever allocated the buffers."""
        self._stream.wait_stream(torch.cuda.current_stream())
        self._released.clear()

    @contextmanager
    def writing(self, buffer: int) -> Iterator[None]:
        """Switch to the side stream, after the buffer's last reader."""
        if buffer in self._released:
            self._stream.wait_event(self._free[buffer])
        with torch.cuda.stream(self._stream):
            yield
        self._ready[buffer].record(self._stream)

    def reading(self, buffer: int) -> None:
        """Wait for the last decode into the buffer."""
        torch.cuda.current_stream().wait_event(self._ready[buffer])

    def release(self, buffer: int) -> None:
        """Record that everything launched so far on the current stream has read the buffer."""
        self._free[buffer].record(torch.cuda.current_stream())
        self._released.add(buffer)


class WeightStream:
    """Decodes a model's groups slab by slab into one scratch buffer, or two when decoding overlaps the products.

    Args:
        passes: groups of each kind of pass, in the order in which it uses them. Resident ones need no scratch.
        dtype: dtype of the decoded weights, bfloat16 or float32.
        device: device of the scratch.
        scratch_bytes: bound of one buffer, each as large as its largest slab; a single row that needs more gets it.
        timeline: what orders decoding ahead into two buffers; None decodes in line, into one.
    """

    def __init__(
        self,
        passes: Sequence[Sequence[Group]],
        *,
        dtype: torch.dtype,
        device: torch.device,
        scratch_bytes: int = DEFAULT_SCRATCH_BYTES,
        timeline: Timeline | None = None,
    ) -> None:
        self._ahead_timeline = timeline
        self._timeline = Timeline()
        count = 1 if timeline is None else 2
        self._slabs: dict[Group, tuple[Slab, ...]] = {}
        self._following: dict[Slab, Slab] = {}
        for groups in passes:
            order: list[Slab] = []
            for group in groups:
                if group.resident is None:
                    cut = cut_slabs(group, max(1, scratch_bytes // (group.cols * dtype.itemsize)))
                    slabs = [Slab((len(order) + place) % count, *slab) for place, slab in enumerate(cut)]
                    self._slabs[group] = tuple(slabs)
                    order += slabs
            self._following |= dict(pairwise(order))
        every = [slab for slabs in self._slabs.values() for slab in slabs]
        sizes = [max((_weights(slab) for slab in every if slab.buffer == buffer), default=0) for buffer in range(count)]
        self._buffers = [torch.empty(size, dtype=dtype, device=device) for size in sizes]
        self._looks_ahead = False
        self._ahead: Slab | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the scratch buffers."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def begin(self, *, look_ahead: bool) -> None:
        """Start a pass on the current stream, on which every pass must come after the last one.

        Args:
            look_ahead: whether the pass takes its groups in the given order, without leaving any out, and is long
                enough for decoding ahead to pay.
        """
        self._timeline = self._ahead_timeline if look_ahead and self._ahead_timeline is not None else Timeline()
        self._looks_ahead = self._timeline is self._ahead_timeline
        self._timeline.begin()

    def is_whole(self, group: Group) -> bool:
        """Return whether a group is one slab, or resident."""
        return group.resident is not None or len(self._slabs[group]) == 1

    def decoded(self, group: Group) -> Iterator[tuple[slice, Tensor]]:
        """Yield a group's rows as ``(rows of the group, weights [r, K])``, each valid until the next is asked for."""
        if group.resident is not None:
            yield slice(0, group.rows), group.resident
            return
        for slab in self._slabs[group]:
            if self._ahead is not slab:
                self._decode(slab)
            self._timeline.reading(slab.buffer)
            self._ahead = self._following.get(slab) if self._looks_ahead else None
            if self._ahead is not None:
                self._decode(self._ahead)
            yield slice(slab.start, slab.stop), self._tile(slab)
            self._timeline.release(slab.buffer)

    def _tile(self, slab: Slab) -> Tensor:
        return self._buffers[slab.buffer][: _weights(slab)].view(slab.stop - slab.start, -1)

    def _decode(self, slab: Slab) -> None:
        tile = self._tile(slab)
        with self._timeline.writing(slab.buffer):
            for part in slab.parts:
                rows = part.stop - part.start
                part.matrix.decode(part.start, part.stop, tile[part.offset : part.offset + rows])


def _weights(slab: Slab) -> int:
    return (slab.stop - slab.start) * slab.parts[0].matrix.cols
