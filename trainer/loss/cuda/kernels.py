"""The CUDA kernels of the loss as typed methods; ``kernels/src/kd_loss.cuh`` says what they compute and how.

Letters in shapes: C tokens of a chunk, V columns of logits (a tile's, or the whole vocabulary's), S segments.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from q4kd.trainer.device.host_copy import copy_from_host
from q4kd.trainer.kernels.launch import Argument
from q4kd.trainer.kernels.plans import DTYPES, KernelSet, Launch, kernel, offset, require
from q4kd.trainer.loss.config import KDLossConfig

# kd_loss.cuh has the same columns of a block, by width, and the same number of sums of a segment.
_SEGMENTS = {8: 8192, 1: 2048}
SUMS = 8
NUM_KNOBS = 5


def knobs_of(config: KDLossConfig, device: torch.device, share: float = 1.0) -> Tensor:
    """Return the equation's numbers as the kernels read them, float32 ``[5]``; gradients come times ``share``."""
    temperature, kd_weight = config.temperature, 1 - config.alpha
    values = [config.alpha * share, 1 / temperature, kd_weight * temperature * share, temperature**2, config.beta]
    return copy_from_host(torch.tensor(values, dtype=torch.float32), device)


def width_of(columns: int) -> int:
    """Return how many elements of freshly allocated rows of ``columns`` are read at a time."""
    return 8 if columns % 8 == 0 else 1


def segments_of(columns: int, width: int) -> int:
    """Return S, the blocks that a row of ``columns`` is cut into."""
    return -(-columns // _SEGMENTS[width])


@dataclass(frozen=True)
class Part:
    """The columns of the vocabulary that a call's logits are."""

    first_column: int
    first_segment: int  # first of their segments among the row's
    all_segments: int  # S of the whole row
    width: int  # elements read at a time, the same for every part of a row


def whole(columns: int) -> Part:
    """Return the part that is the whole row."""
    width = width_of(columns)
    return Part(0, 0, segments_of(columns, width), width)


class LossKernels(KernelSet):
    """The kernels of the loss, for one device, each declared once as the teacher's are (see ``plans.py``).

    Every method takes ``kind`` (a divergence, or ``ce`` without a teacher), logits bfloat16 or float32 ``[C, V]`` of
    one type whose rows may be apart, ``knobs`` of ``knobs_of`` and ``sums``, float32 ``[C, S, 8]``. A row may be given
    in parts, tiles of the vocabulary one after another: first ``stats`` of every part, then for jsd ``jsd_parts`` of
    every part, then ``gradient`` of every part. All raise ValueError for tensors that do not fit.
    """

    @kernel
    def stats(
        self, kind: str, student: Tensor, teacher: Tensor | None, knobs: Tensor, sums: Tensor, part: Part
    ) -> Launch:
        """Write to ``sums`` what these columns add to their rows' sums."""
        return self._sums(f"stats_{kind}", kind, student, teacher, knobs, sums, part)

    @kernel
    def jsd_parts(self, student: Tensor, teacher: Tensor, knobs: Tensor, sums: Tensor, part: Part) -> Launch:
        """Write to ``sums``, complete from ``stats``, what these columns add to the two halves of jsd."""
        return self._sums("jsd", "jsd", student, teacher, knobs, sums, part)

    def _sums(
        self, name: str, kind: str, student: Tensor, teacher: Tensor | None, knobs: Tensor, sums: Tensor, part: Part
    ) -> Launch:
        segments, arguments = self._logits(kind, student, teacher, knobs, sums, part)
        arguments += [part.first_segment, part.all_segments, knobs, sums]
        return Launch(f"loss_{name}_{DTYPES[student.dtype]}_v{part.width}", len(student) * segments, arguments, [sums])

    @kernel
    def gradient(
        self,
        kind: str,
        student: Tensor,
        teacher: Tensor | None,
        knobs: Tensor,
        sums: Tensor,
        part: Part,
        labels: Tensor,
        out: Tensor,
        ce: Tensor,
        kd: Tensor,
    ) -> Launch:
        """Write the gradient of the summed loss with respect to the student's logits, and each row's terms.

        Args:
            kind, student, teacher, knobs, sums, part: as for ``stats``; ``sums`` is complete.
            labels: int64 ``[C]``, each below the vocabulary.
            out: ``[C, V]``, float32 (of float32 logits only) or bfloat16; may be ``student`` itself if of its type.
            ce: float32 ``[C]``: cross-entropy, written by the part that has the label's column.
            kd: float32 ``[C]``: T^2 * D, written by the first part.
        """
        segments, arguments = self._logits(kind, student, teacher, knobs, sums, part)
        types = self._outputs(student, labels, out, ce, kd, part.width)
        arguments += [part.all_segments, knobs, sums, part.first_column, labels, out, out.stride(0), ce, kd]
        return Launch(f"loss_grad_{kind}_{types}_v{part.width}", len(student) * segments, arguments, [out, ce, kd])

    @kernel
    def fused(
        self,
        kind: str,
        student: Tensor,
        teacher: Tensor | None,
        knobs: Tensor,
        sums: Tensor,
        counters: Tensor,
        labels: Tensor,
        out: Tensor,
        ce: Tensor,
        kd: Tensor,
    ) -> Launch:
        """Do all of it for whole rows in one launch that reads the logits once.

        Args:
            kind, knobs, sums: as for ``stats``; ``sums`` may hold anything.
            student, teacher: logits as for ``stats``; V is a multiple of 8, the addresses multiples of 16.
            counters: int32 ``[C + 1]``, zero before and of no use after.
            labels, ce, kd: as for ``gradient``.
            out: bfloat16 ``[C, V]``.
        """
        rows, columns = student.shape
        part = Part(0, 0, segments_of(columns, 8), 8)
        segments, arguments = self._logits(kind, student, teacher, knobs, sums, part)
        types = self._outputs(student, labels, out, ce, kd, part.width)
        require(out.dtype == torch.bfloat16, "gradient: expected bfloat16")
        self._check("counters", counters, [torch.int32], rows + 1)
        arguments += [counters, knobs, sums, labels, out, out.stride(0), ce, kd]
        return Launch(f"loss_fused_{kind}_{types}_v8", rows * segments, arguments, [counters, sums, out, ce, kd])

    def _logits(
        self, kind: str, student: Tensor, teacher: Tensor | None, knobs: Tensor, sums: Tensor, part: Part
    ) -> tuple[int, list[Argument]]:
        """Check what every call is given; return its segments and its first arguments."""
        self._check("student", student, list(DTYPES), None, None, rows=True)
        rows, columns = student.shape
        require(rows > 0 and columns > 0, "student: expected logits [C, V], not empty")
        require(
            (teacher is None) == (kind == "ce"),
            f"teacher: expected logits for {kind}" if teacher is None else "teacher: expected none for ce alone",
        )
        if teacher is not None:
            self._check("teacher", teacher, [student.dtype], rows, columns, rows=True)
        if part.width == 8:
            _require_wide(student, *(() if teacher is None else (teacher,)))
        self._check("knobs", knobs, [torch.float32], NUM_KNOBS)
        self._check("sums", sums, [torch.float32], rows, part.all_segments, SUMS)
        segments = segments_of(columns, part.width)
        require(part.first_segment + segments <= part.all_segments, "sums: expected room for these segments")
        stride = 0 if teacher is None else teacher.stride(0)
        return segments, [student, student.stride(0), teacher, stride, columns, segments]

    def _outputs(self, student: Tensor, labels: Tensor, out: Tensor, ce: Tensor, kd: Tensor, width: int) -> str:
        """Check what a gradient is written to; return the two types in a kernel's name."""
        rows, columns = student.shape
        self._check("labels", labels, [torch.int64], rows)
        # A gradient is no wider than the logits.
        types = list(DTYPES) if student.dtype == torch.float32 else [torch.bfloat16]
        self._check("gradient", out, types, rows, columns, rows=True)
        if width == 8:
            _require_wide(out)
        self._check("ce", ce, [torch.float32], rows)
        self._check("kd", kd, [torch.float32], rows)
        return f"{DTYPES[student.dtype]}_{DTYPES[out.dtype]}"


def _require_wide(*tensors: Tensor) -> None:
    fits = all(tensor.shape[1] % 8 == 0 and offset(tensor) == 0 and tensor.stride(0) % 8 == 0 for tensor in tensors)
    require(fits, "logits: expected 16-byte addresses and rows of whole eights")


@cache
def loss_kernels(device: torch.device) -> LossKernels:
    """Return this process's loss kernels of a CUDA device.

    Raises:
        InputError: when CuPy is missing or the device is too old: there is no other way to take the loss there.
    """
    return LossKernels(device)
