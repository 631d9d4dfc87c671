"""Mode ``low`` of the fused loss in plain torch: tiled over the vocabulary as well, so that no ``[C, V]`` exists.

The vocabulary is walked twice, tile by tile, all tokens of a tile chunk by chunk: once for the logarithms of the sums
of exp (student at 1 and at T, teacher at T, each merged into what came before by log-add-exp), once, with the logits
made again, for values and gradients. reverse_kl and jsd, whose gradient needs the row's value, walk once more between.
A tile of the teacher's head is decoded into one buffer per walk; a tile's head gradient is complete when the walk
leaves it, so it is rounded straight into the gradient of the head's own type.

Bytes beyond parameters and their gradients, float32, C = 256, R = 8,192, for 8,192 tokens of a 7B teacher (H' = 3,584)
and a 0.5B student (H = 896): at most eight ``[C, R]`` (of jsd) 67 MB, a sum's float64 copy 4 MB + teacher tile
``[R, H']`` 117 MB + student tile and its gradient, where the head is bfloat16, 59 MB + hidden states of the unmasked
positions 29 + 117 MB + their gradient 29 MB = 422 MB, whatever V is. (On CUDA: ``cuda/tiled.py``.)

Letters in shapes: M tokens, C tokens of a chunk, R columns of a tile, H hidden size, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from q4kd.trainer.kernels.gemm import multiply
from q4kd.trainer.loss.config import LEAST_LOGIT, KDLossConfig
from q4kd.trainer.loss.divergence import Distributions, distributions, slope, subtract_rows, values
from q4kd.trainer.loss.last_step import apply_last_step, chain, slope_of
from q4kd.trainer.loss.sums import LossInputs, LossSums, wide
from q4kd.trainer.loss.teacher_head import TeacherHead

DEFAULT_TILE = 8192
_DEFAULT_CHUNK = 256


class _Rows:
    """Running sums, then values, of every unmasked row."""

    def __init__(self, count: int) -> None:
        # The sums are float64, since many small tiles would add up the rounding of each.
        self.log_z_1 = torch.full((count,), -torch.inf, dtype=torch.float64)  # of the student at temperature 1
        self.log_z = self.log_z_1.clone()  # of the student at T
        self.log_w = self.log_z_1.clone()  # of the teacher at T
        self.label_logit, self.value = torch.zeros(2, count, dtype=torch.float64)
        self.student_2 = torch.zeros(2, count, dtype=torch.float64)  # what the slope needs of whole rows


def _merge(log_sum_C: Tensor, logits_CR: Tensor) -> None:
    """Add a tile's sum of exp to the running one; its logarithm is never rounded to float32."""
    top_C1 = logits_CR.amax(1, keepdim=True)
    tile_C = (logits_CR - top_C1).exp_().sum(1).double().log_().add_(top_C1.squeeze(1))
    log_sum_C.copy_(torch.logaddexp(log_sum_C, tile_C))


@dataclass(frozen=True)
class _Tile:
    """Columns of the vocabulary, and both heads' rows of them."""

    columns: slice
    weight: Tensor
    teacher: Tensor | None


class _Walks:
    """The walks over one call's tensors, in the float type sums are taken in."""

    def __init__(self, tensors: LossInputs, config: KDLossConfig) -> None:
        assert isinstance(tensors.teacher_head, TeacherHead | None)
        self.tensors, self.config, self.teacher_head = tensors, config, tensors.teacher_head
        self.hidden_PH = wide(tensors.hidden[tensors.positions])
        self.labels_P = tensors.labels[tensors.positions]
        self.teacher_PH: Tensor | None = None
        if self.teacher_head is not None and tensors.teacher_hidden is not None:
            self.teacher_PH = tensors.teacher_hidden[tensors.positions].to(self.teacher_head.dtype)
        self.rows = _Rows(len(self.labels_P))
        chunk = config.chunk_tokens or _DEFAULT_CHUNK
        self.chunks = [slice(start, start + chunk) for start in range(0, len(self.labels_P), chunk)]

    def tiles(self) -> Iterator[_Tile]:
        """Yield the tiles in order; the teacher's weights of one are overwritten by the next."""
        head, weight_VH = self.teacher_head, self.tensors.weight
        vocab, step = len(weight_VH), self.config.vocab_tile or DEFAULT_TILE
        buffer = None
        if head is not None and self.teacher_PH is not None:
            buffer = torch.empty(min(step, vocab), self.teacher_PH.shape[1], dtype=head.dtype)
        for start in range(0, vocab, step):
            stop = min(start + step, vocab)
            teacher_RH = None
            if head is not None and buffer is not None:
                teacher_RH = buffer[: stop - start]
                head.decode(start, stop, teacher_RH)
            yield _Tile(slice(start, stop), wide(weight_VH[start:stop]), teacher_RH)

    def logits(self, tile: _Tile, chunk: slice) -> tuple[Tensor, Tensor | None]:
        """Return a chunk's student logits ``[C, R]``, and the teacher's divided by T."""
        student_CR = apply_last_step(self.hidden_PH[chunk] @ tile.weight.T, self.config.last_step)
        if self.teacher_PH is None or tile.teacher is None:
            return student_CR, None
        teacher_CR = multiply(self.teacher_PH[chunk].contiguous(), tile.teacher).to(student_CR.dtype)
        if self.teacher_head is not None:
            apply_last_step(teacher_CR, self.teacher_head.last_step)
        return student_CR, teacher_CR.clamp_(min=LEAST_LOGIT).div_(self.config.temperature)

    def inside(self, tile: _Tile, chunk: slice) -> tuple[Tensor, Tensor]:
        """Return which rows of a chunk have their label in a tile, and its column there (0 for the others)."""
        column_C = self.labels_P[chunk] - tile.columns.start
        has_C = (column_C >= 0) & (column_C < len(tile.weight))
        return has_C, torch.where(has_C, column_C, 0).unsqueeze(1)

    def sum_up(self) -> None:
        """Walk once for the rows' sums and the labels' logits."""
        rows, temperature = self.rows, self.config.temperature
        for tile in self.tiles():
            for chunk in self.chunks:
                student_CR, teacher_CR = self.logits(tile, chunk)
                has_C, column_C1 = self.inside(tile, chunk)
                rows.label_logit[chunk] += torch.where(has_C, student_CR.gather(1, column_C1).squeeze(1), 0)
                _merge(rows.log_z_1[chunk], student_CR)
                if teacher_CR is not None:
                    _merge(rows.log_w[chunk], teacher_CR)
                    _merge(rows.log_z[chunk], student_CR.div_(temperature))

    def add_values(self) -> None:
        """Walk once for the divergence of every row and the student's part of it."""
        for tile in self.tiles():
            for chunk in self.chunks:
                student_CR, teacher_CR = self.logits(tile, chunk)
                assert teacher_CR is not None
                scaled_CR = student_CR.div_(self.config.temperature)
                self._add_values(chunk, self._distributions(chunk, scaled_CR, teacher_CR))

    def _add_values(self, chunk: slice, both: Distributions) -> None:
        """Add a tile's part of the values, and of what the slope needs."""
        value_C, student_2C = values(both, self.config)
        self.rows.value[chunk] += value_C
        self.rows.student_2[:, chunk] += student_2C

    def _distributions(self, chunk: slice, scaled_CR: Tensor, teacher_CR: Tensor) -> Distributions:
        """Return a tile's probabilities; its logits become their logarithms."""
        log_q = subtract_rows(scaled_CR, self.rows.log_z[chunk])
        return distributions(subtract_rows(teacher_CR, self.rows.log_w[chunk]), log_q, self.config)

    def add_gradients(self, sums: LossSums) -> None:
        """Walk once for the gradients, and for the values of forward_kl."""
        for tile in self.tiles():
            head_gradient_RH = sums.open_tile(tile.columns)
            for chunk in self.chunks:
                # Made in a function of its own: a chunk's tensors are gone before the next one's are made.
                grad_CR = self._gradient(tile, chunk)
                if sums.wanted:
                    positions, hidden_CH = self.tensors.positions[chunk], self.hidden_PH[chunk]
                    is_first = chunk.start == 0
                    sums.add_tile(positions, grad_CR, hidden_CH, tile.weight, head_gradient_RH, first=is_first)
                del grad_CR
            if self.chunks:
                sums.close_tile(tile.columns, head_gradient_RH)

    def _gradient(self, tile: _Tile, chunk: slice) -> Tensor:
        """Return the summed loss's gradient with respect to a chunk's products with the student's head ``[C, R]``."""
        rows, config = self.rows, self.config
        student_CR, teacher_CR = self.logits(tile, chunk)
        slope_CR = slope_of(student_CR, config.last_step)
        grad_CR = subtract_rows(student_CR.clone(), rows.log_z_1[chunk]).exp_()
        has_C, column_C1 = self.inside(tile, chunk)
        grad_CR.scatter_add_(1, column_C1, -has_C.to(grad_CR.dtype).unsqueeze(1))
        grad_CR *= config.alpha
        if teacher_CR is None:
            return chain(grad_CR, slope_CR)
        both = self._distributions(chunk, student_CR.div_(config.temperature), teacher_CR)
        if config.divergence == "forward_kl":
            self._add_values(chunk, both)
        tilt_CR = slope(both, rows.student_2[:, chunk], config)
        grad_CR.add_(tilt_CR, alpha=(1 - config.alpha) * config.temperature)
        return chain(grad_CR, slope_CR)


def run_low(sums: LossSums, tensors: LossInputs, config: KDLossConfig) -> None:
    """Fill ``sums``, which are made for tiles; see the module's text. The teacher, if any, has a ``TeacherHead``."""
    walks = _Walks(tensors, config)
    walks.sum_up()
    has_teacher = walks.teacher_PH is not None
    if has_teacher and config.divergence != "forward_kl":
        walks.add_values()
    if sums.wanted or (has_teacher and config.divergence == "forward_kl"):
        walks.add_gradients(sums)
    rows = walks.rows
    sums.add_terms((rows.log_z_1 - rows.label_logit).sum(dtype=torch.float64), config.temperature**2 * rows.value.sum())
