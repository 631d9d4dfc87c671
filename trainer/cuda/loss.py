"""The fused loss on CUDA: cuBLAS for the products, one kernel for softmax, divergence and gradient (``kd_loss.cuh``).

Products take the student's type (bfloat16, else float32) and accumulate in float32; logits are float32, or bfloat16 by
choice (``KDLossConfig.logits``); the gradient with respect to the logits is rounded once to the products' type.

Mode ``fast``, counted for 8,192 tokens, V = 151,936, H' = 3,584, H = 896, bfloat16, so N = 8,192 V = 1.245e9 logits a
side::

    four products   2 N (H' + 3 H) = 15.6 TFLOP                        22 ms at 700 TFLOP/s
    kernel, float32 logits: read 4 + 4, write 2 bytes each: 12.4 GB    3.0 ms at 4.2 TB/s, 4.1 ms at 3.0 TB/s
    kernel, bfloat16 logits: read 2 + 2, write 2: 7.5 GB               1.8 ms and 2.5 ms
    head gradient, summed in float32 over chunks: 8 V H = 1.1 GB a chunk after the first, under its product's arithmetic

Read in two launches, float32 logits would be 22.4 GB (5.3 and 7.5 ms). Hence one launch that reads once, and chunks of
up to 4,096 tokens for the two gradient products, fed by slices of 1,024 tokens of logits: ``[chunk, V]`` bfloat16 plus
two ``[slice, V]`` float32 are 2.5 GB. bfloat16 logits become their gradient in place, in slices as long as the chunk.
``CHUNK_BYTES`` bounds them. Measured on an H200, the kernel takes 4.9 ms on float32 logits and 3.3 ms on bfloat16 ones:
its blocks wait for each other's sums, and only three or four of them fit a multiprocessor.

Mode ``low`` walks the vocabulary in tiles of R = 8,192, all tokens of a tile in chunks of C = 2,048; bytes beyond
parameters and gradients: two ``[C, R]`` float32 134 MB + their gradient 34 MB + teacher tile ``[R, H']`` 59 MB + tile
of the head's gradient in float32 29 MB + sums 5 MB + hidden states where some positions are masked 15 + 59 MB + their
gradient in float32, before it is rounded, 29 MB + cuBLAS's workspace 32 MB = 396 MB, whatever V is.

Letters in shapes: M tokens, P unmasked ones, C tokens of a chunk, R columns of a tile, H hidden size, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from q4kd.trainer.cuda.loss_kernels import (
    SUMS,
    LossKernels,
    Part,
    kind_of,
    knobs_of,
    loss_kernels,
    segments_of,
    whole,
    width_of,
)
from q4kd.trainer.cuda.numerics import multiply, pinned_numerics
from q4kd.trainer.loss_terms import KDLossConfig, LossSums
from q4kd.trainer.teacher_head import TeacherHead

CHUNK_BYTES = 3_000_000_000
_CHUNKS = (8192, 4096, 2048, 1024, 512, 256)
SLICE = 1024
_LOW_CHUNK, _LOW_TILE = 2048, 8192


@dataclass(frozen=True)
class _Given:
    """A call's tensors on the device, masked positions left out, in the types of their products."""

    hidden: Tensor  # [P, H]
    weight: Tensor  # [V, H]
    labels: Tensor  # [P]
    positions: Tensor  # [P]
    teacher_hidden: Tensor | None  # [P, H']
    teacher_head: Any  # a TeacherHead, or a function to logits
    config: KDLossConfig
    logits_type: torch.dtype

    @property
    def kind(self) -> str:
        """Which kernels serve."""
        return kind_of(self.config, self.teacher_hidden is not None)

    def logits(self, rows: int, columns: int) -> Tensor:
        """Return a new buffer of logits."""
        return torch.empty(rows, columns, dtype=self.logits_type, device=self.hidden.device)


def run_on_cuda(
    sums: LossSums,
    hidden_MH: Tensor,
    weight_VH: Tensor,
    labels_M: Tensor,
    positions: Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: Any,
    config: KDLossConfig,
    kernels: LossKernels | None = None,
) -> None:
    """Fill ``sums``; see ``kd_loss`` for the arguments, which are detached.

    Args:
        sums: made for tiles if ``config.mode`` is low.
        hidden_MH: ``[M, H]``.
        weight_VH: ``[V, H]``.
        labels_M: ``[M]``.
        positions: int64 ``[P]``, the unmasked ones.
        teacher_hidden: ``[M, H']`` or None.
        teacher_head: a ``TeacherHead``, or in fast a function from hidden states to logits.
        config: the equation's knobs.
        kernels: those of the tensors' device; made when absent.

    Raises:
        InputError: when the kernels cannot be compiled or loaded.
    """
    if len(positions) == 0:
        return
    device = hidden_MH.device
    kernels = loss_kernels(device) if kernels is None else kernels
    dtype = torch.bfloat16 if hidden_MH.dtype == torch.bfloat16 else torch.float32
    is_whole = len(positions) == len(labels_M)

    def unmasked(tensor: Tensor) -> Tensor:
        return tensor if is_whole else tensor[positions]

    if teacher_hidden is not None:
        kept = teacher_head.dtype if isinstance(teacher_head, TeacherHead) else teacher_hidden.dtype
        teacher_hidden = unmasked(teacher_hidden).to(device, kept)
    given = _Given(
        hidden=unmasked(hidden_MH).to(dtype),
        weight=weight_VH.to(dtype),
        labels=unmasked(labels_M).contiguous(),
        positions=positions,
        teacher_hidden=teacher_hidden,
        teacher_head=teacher_head,
        config=config,
        logits_type=torch.bfloat16 if config.logits == "bfloat16" and dtype == torch.bfloat16 else torch.float32,
    )
    with pinned_numerics():
        if config.mode == "low":
            _run_low(given, sums, kernels)
        else:
            _run_fast(given, sums, kernels)


def _project(x_CH: Tensor, weight_RH: Tensor, out_CR: Tensor) -> None:
    """Write ``x @ W.T`` to ``out``, also where cuBLAS does not write its type."""
    if out_CR.dtype in (x_CH.dtype, torch.float32):
        multiply(x_CH, weight_RH, out_CR)
    else:
        out_CR.copy_(x_CH @ weight_RH.T)


def slice_of(chunk: int, *, in_place: bool) -> int:
    """Return how many of a chunk's tokens have logits at one time.

    Where logits become their gradient in place, a slice needs no buffer but the teacher's and is as long as the chunk:
    products of 1,024 rows take a tenth longer than those of 4,096 (H200).
    """
    return chunk if in_place else min(chunk, SLICE)


def chunk_bytes(chunk: int, vocab: int, *, logits_bytes: int, gradient_bytes: int, with_teacher: bool) -> int:
    """Return the bytes of ``fast``'s buffers for a chunk of ``chunk`` tokens; see the module's text."""
    rows = slice_of(chunk, in_place=logits_bytes == gradient_bytes)
    logits = rows * vocab * logits_bytes
    return chunk * vocab * gradient_bytes + logits * (with_teacher + (logits_bytes != gradient_bytes))


def choose_chunk(tokens: int, vocab: int, budget: int, **types: Any) -> int:
    """Return the largest chunk, of a fixed list, whose buffers fit ``budget`` bytes (else the smallest).

    Args:
        tokens: P; a chunk is no larger.
        vocab: V.
        budget: bytes.
        types: as for ``chunk_bytes``.
    """
    fitting = (chunk for chunk in _CHUNKS if chunk_bytes(min(chunk, tokens), vocab, **types) <= budget)
    return min(tokens, next(fitting, _CHUNKS[-1]))


def _budget(device: torch.device) -> int:
    if device.type != "cuda":
        return CHUNK_BYTES
    return min(CHUNK_BYTES, torch.cuda.get_device_properties(device).total_memory // 20)


def fast_chunk(tokens: int, vocab: int, config: KDLossConfig, hidden: Tensor, *, with_teacher: bool = True) -> int:
    """Return the tokens of a chunk of ``fast``: as set, else what fits the device's share of bytes.

    Args:
        tokens: P.
        vocab: V.
        config: ``chunk_tokens`` and ``logits``.
        hidden: of the student, for its type and device.
        with_teacher: whether there are logits of a teacher.
    """
    if config.chunk_tokens:
        return min(tokens, config.chunk_tokens)
    gradient_bytes = 2 if hidden.dtype == torch.bfloat16 else 4
    types = {
        "logits_bytes": 2 if config.logits == "bfloat16" and gradient_bytes == 2 else 4,
        "gradient_bytes": gradient_bytes,
        "with_teacher": with_teacher,
    }
    return choose_chunk(tokens, vocab, _budget(hidden.device), **types)


def _run_fast(given: _Given, sums: LossSums, kernels: LossKernels) -> None:
    tokens, vocab, device = len(given.labels), len(given.weight), given.hidden.device
    gradient_type, with_teacher = given.hidden.dtype, given.teacher_hidden is not None
    chunk = fast_chunk(tokens, vocab, given.config, given.hidden, with_teacher=with_teacher)
    step = slice_of(chunk, in_place=given.logits_type == gradient_type)
    grad_CV = torch.empty(chunk, vocab, dtype=gradient_type, device=device)
    # Logits of the gradient's type become it in place.
    student_SV = None if given.logits_type == gradient_type else given.logits(step, vocab)
    teacher_SV = given.logits(step, vocab) if with_teacher else None
    decoded = given.teacher_head.decoded() if isinstance(given.teacher_head, TeacherHead) else None
    softmax = _Softmax(given, kernels, step, vocab, 1 / sums.num_targets)
    for first in range(0, tokens, chunk):
        last = min(first + chunk, tokens)
        for start in range(first, last, step):
            stop = min(start + step, last)
            rows, grad_SV = slice(start, stop), grad_CV[start - first : stop - first]
            teacher = None
            if teacher_SV is not None and given.teacher_hidden is not None:
                teacher = teacher_SV[: stop - start]
                if decoded is None:
                    teacher.copy_(given.teacher_head(given.teacher_hidden[rows])[:, :vocab])
                else:
                    _project(given.teacher_hidden[rows], decoded[:vocab], teacher)
            student = grad_SV if student_SV is None else student_SV[: stop - start]
            _project(given.hidden[rows], given.weight, student)
            softmax(rows, student, teacher, grad_SV)
        if sums.wanted:
            sums.add_gradient(
                given.positions[first:last], grad_CV[: last - first], given.hidden[first:last], given.weight, share=1
            )
    sums.add_terms(softmax.ce.sum(dtype=torch.float64), softmax.kd.sum(dtype=torch.float64))


class _Softmax:
    """The kernels' calls for whole rows, and what they need beside the logits."""

    def __init__(self, given: _Given, kernels: LossKernels, rows: int, vocab: int, share: float) -> None:
        device = given.hidden.device
        self._given, self._kernels, self._part = given, kernels, whole(vocab)
        self._knobs = knobs_of(given.config, device, share)
        self._sums = torch.empty(rows, self._part.all_segments, SUMS, device=device)
        self._counters = torch.empty(rows + 1, dtype=torch.int32, device=device)
        # A label that no column answers to would leave its row as it is.
        self.ce = torch.full((len(given.labels),), torch.nan, device=device)
        self.kd = torch.full_like(self.ce, torch.nan)

    def __call__(self, rows: slice, student: Tensor, teacher: Tensor | None, out: Tensor) -> None:
        count, kind, kernels = len(student), self._given.kind, self._kernels
        labels, ce, kd, sums = self._given.labels[rows], self.ce[rows], self.kd[rows], self._sums[:count]
        if self._part.width == 8 and out.dtype == torch.bfloat16:
            counters = self._counters[: count + 1].zero_()
            kernels.fused(kind, student, teacher, self._knobs, sums, counters, labels, out, ce, kd)
            return
        kernels.stats(kind, student, teacher, self._knobs, sums, self._part)
        if kind == "jsd" and teacher is not None:
            kernels.jsd_parts(student, teacher, self._knobs, sums, self._part)
        kernels.gradient(kind, student, teacher, self._knobs, sums, self._part, labels, out, ce, kd)


class _Tiles:
    """The vocabulary in tiles: both heads' rows of each, decoded into one buffer, and buffers for logits.

    Args:
        given: the call.
        chunk: C.
        tile: R.
    """

    def __init__(self, given: _Given, chunk: int, tile: int) -> None:
        vocab, device = len(given.weight), given.hidden.device
        self._given, self._chunk = given, chunk
        starts = range(0, vocab, tile)
        width = min(width_of(vocab), width_of(min(tile, vocab)))
        counts = [segments_of(min(tile, vocab - start), width) for start in starts]
        self.segments = sum(counts)
        self._parts = [
            (slice(start, min(start + tile, vocab)), Part(start, sum(counts[:index]), self.segments, width))
            for index, start in enumerate(starts)
        ]
        self._student = given.logits(chunk, min(tile, vocab))
        self._teacher = self._teacher_tile = None
        if given.teacher_hidden is not None:
            self._teacher = torch.empty_like(self._student)
            self._teacher_tile = torch.empty(
                min(tile, vocab), given.teacher_hidden.shape[1], dtype=given.teacher_head.dtype, device=device
            )

    def __iter__(self) -> Iterator[tuple[slice, Part]]:
        """Yield the tiles in order, the teacher's rows of each decoded."""
        for columns, part in self._parts:
            if self._teacher_tile is not None:
                head_RH = self._teacher_tile[: columns.stop - columns.start]
                self._given.teacher_head.decode(columns.start, columns.stop, head_RH)
            yield columns, part

    def chunks(self) -> Iterator[slice]:
        """Yield the tokens chunk by chunk."""
        tokens = len(self._given.labels)
        for start in range(0, tokens, self._chunk):
            yield slice(start, min(start + self._chunk, tokens))

    def logits(self, columns: slice, rows: slice) -> tuple[Tensor, Tensor | None]:
        """Return a chunk's logits of the current tile, student's and teacher's, contiguous ``[C, R]``."""
        given, shape = self._given, (rows.stop - rows.start, columns.stop - columns.start)
        student_CR = self._student.view(-1)[: shape[0] * shape[1]].view(shape)
        _project(given.hidden[rows], given.weight[columns], student_CR)
        if self._teacher is None or self._teacher_tile is None or given.teacher_hidden is None:
            return student_CR, None
        teacher_CR = self._teacher.view(-1)[: shape[0] * shape[1]].view(shape)
        _project(given.teacher_hidden[rows], self._teacher_tile[: shape[1]], teacher_CR)
        return student_CR, teacher_CR


def _run_low(given: _Given, sums: LossSums, kernels: LossKernels) -> None:
    config, device, tokens = given.config, given.hidden.device, len(given.labels)
    chunk = min(tokens, config.chunk_tokens or _LOW_CHUNK)
    tiles = _Tiles(given, chunk, config.vocab_tile or _LOW_TILE)
    knobs, kind = knobs_of(config, device, 1 / sums.num_targets), given.kind
    row_sums = torch.empty(tokens, tiles.segments, SUMS, device=device)
    ce = torch.full((tokens,), torch.nan, device=device)
    kd = torch.full_like(ce, torch.nan)
    for columns, part in tiles:
        for rows in tiles.chunks():
            kernels.stats(kind, *tiles.logits(columns, rows), knobs, row_sums[rows], part)
    if kind == "jsd":
        for columns, part in tiles:
            for rows in tiles.chunks():
                student_CR, teacher_CR = tiles.logits(columns, rows)
                assert teacher_CR is not None
                kernels.jsd_parts(student_CR, teacher_CR, knobs, row_sums[rows], part)
    tile = min(config.vocab_tile or _LOW_TILE, len(given.weight))
    grad_buffer = torch.empty(chunk * tile, dtype=given.hidden.dtype, device=device)
    for columns, part in tiles:
        tile_RH = sums.open_tile(columns)
        for rows in tiles.chunks():
            student_CR, teacher_CR = tiles.logits(columns, rows)
            grad_CR = grad_buffer[: student_CR.numel()].view(student_CR.shape)
            kernels.gradient(
                kind,
                student_CR,
                teacher_CR,
                knobs,
                row_sums[rows],
                part,
                given.labels[rows],
                grad_CR,
                ce[rows],
                kd[rows],
            )
            sums.add_tile(
                given.positions[rows],
                grad_CR,
                given.hidden[rows],
                given.weight[columns],
                tile_RH,
                first=rows.start == 0,
                share=1,
            )
        sums.close_tile(columns, tile_RH)
    sums.add_terms(ce.sum(dtype=torch.float64), kd.sum(dtype=torch.float64))
