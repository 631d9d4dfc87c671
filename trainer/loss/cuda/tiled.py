"""Mode ``low`` of the CUDA loss: nothing larger than ``[chunk, tile]`` exists.

It walks the vocabulary in tiles of R = 8,192, all tokens of a tile in chunks of C = 2,048; bytes beyond parameters and
gradients, for the shapes in ``fused.py``: two ``[C, R]`` float32 134 MB + gradient 34 MB + teacher tile ``[R, H']``
59 MB + tile of the head's gradient in float32 29 MB + sums 5 MB + hidden states where some positions are masked
15 + 59 MB + their gradient in float32, before it is rounded, 29 MB + cuBLAS's workspace 32 MB = 396 MB, whatever V is.

Letters in shapes: C tokens of a chunk, R columns of a tile, H hidden size, V vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from q4kd.trainer.loss.cuda.chunks import LOW_CHUNK, LOW_TILE
from q4kd.trainer.loss.cuda.kernels import SUMS, LossKernels, Part, knobs_of, segments_of, width_of
from q4kd.trainer.loss.cuda.tensors import LossTensors, project
from q4kd.trainer.loss.last_step import apply_last_step, chain, slope_of
from q4kd.trainer.loss.sums import LossSums


class _Tiles:
    """The vocabulary in tiles of R columns: the teacher's rows of each, decoded into one buffer, and logits of both."""

    def __init__(self, given: LossTensors, chunk: int, tile: int) -> None:
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
            shape = min(tile, vocab), given.teacher_hidden.shape[1]
            self._teacher_tile = torch.empty(shape, dtype=given.teacher_head.dtype, device=device)

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
        project(given.hidden[rows], given.weight[columns], student_CR)
        apply_last_step(student_CR, given.config.last_step)
        if self._teacher is None or self._teacher_tile is None or given.teacher_hidden is None:
            return student_CR, None
        teacher_CR = self._teacher.view(-1)[: shape[0] * shape[1]].view(shape)
        project(given.teacher_hidden[rows], self._teacher_tile[: shape[1]], teacher_CR)
        apply_last_step(teacher_CR, given.teacher_head.last_step)
        return student_CR, teacher_CR


def run_low(given: LossTensors, sums: LossSums, kernels: LossKernels) -> None:
    """Fill ``sums``, made for tiles, in mode ``low``."""
    config, device, tokens = given.config, given.hidden.device, len(given.labels)
    chunk = min(tokens, config.chunk_tokens or LOW_CHUNK)
    tiles = _Tiles(given, chunk, config.vocab_tile or LOW_TILE)
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
    tile = min(config.vocab_tile or LOW_TILE, len(given.weight))
    grad_buffer = torch.empty(chunk * tile, dtype=given.hidden.dtype, device=device)
    for columns, part in tiles:
        tile_RH = sums.open_tile(columns)
        for rows in tiles.chunks():
            student_CR, teacher_CR = tiles.logits(columns, rows)
            grad_CR = grad_buffer[: student_CR.numel()].view(student_CR.shape)
            written = given.labels[rows], grad_CR, ce[rows], kd[rows]
            kernels.gradient(kind, student_CR, teacher_CR, knobs, row_sums[rows], part, *written)
            chain(grad_CR, slope_of(student_CR, config.last_step, in_place=True))
            operands = grad_CR, given.hidden[rows], given.weight[columns]
            sums.add_tile(given.positions[rows], *operands, tile_RH, first=rows.start == 0, share=1)
        sums.close_tile(columns, tile_RH)
    sums.add_terms(ce.sum(dtype=torch.float64), kd.sum(dtype=torch.float64))
