"""The loss kernels as typed methods, like ``kernels.py``; ``kernels/kd_loss.cuh`` says what they compute and how.

Letters in shapes: C tokens of a chunk, V columns of logits (a tile's, or the whole vocabulary's), S segments.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from q4kd.trainer.cuda.kernels import Kernels
from q4kd.trainer.cuda.launch import Launcher
from q4kd.trainer.cuda.plans import DTYPES, Facts, Plan, Planned, require
from q4kd.trainer.host_copy import copy_from_host
from q4kd.trainer.loss_config import KDLossConfig

# Columns of a block and sums of a segment: as in kd_loss.cuh.
_SEGMENTS = {8: 8192, 1: 2048}
SUMS = 8
NUM_KNOBS = 5


def knobs_of(config: KDLossConfig, device: torch.device, share: float = 1.0) -> Tensor:
    """Return the equation's numbers as the kernels read them, float32 ``[5]``; gradients come times ``share``."""
    temperature, kd_weight = config.temperature, 1 - config.alpha
    values = [config.alpha * share, 1 / temperature, kd_weight * temperature * share, temperature**2, config.beta]
    return copy_from_host(torch.tensor(values, dtype=torch.float32), device)


def kind_of(config: KDLossConfig, with_teacher: bool) -> str:
    """Return which kernels serve: a divergence's, or those of the cross-entropy alone."""
    return config.divergence if with_teacher else "ce"


def width_of(columns: int) -> int:
    """Return how many elements of freshly allocated rows of ``columns`` are read at a time."""
    return 8 if columns % 8 == 0 else 1


def segments_of(columns: int, width: int) -> int:
    """Return S, the blocks that a row of ``columns`` is cut into."""
    return -(-columns // _SEGMENTS[width])


@dataclass(frozen=True)
class Part:
    """Which columns of the vocabulary a call's logits are.

    Attributes:
        first_column: of the call's logits.
        first_segment: of them, among the row's.
        all_segments: S of the whole row.
        width: elements read at a time, the same for every part of a row.
    """

    first_column: int
    first_segment: int
    all_segments: int
    width: int


def whole(columns: int) -> Part:
    """Return the part that is the whole row."""
    width = width_of(columns)
    return Part(0, 0, segments_of(columns, width), width)


def _is_rows(tensor: Facts, rows: int, columns: int) -> bool:
    apart = tensor.shape[0] <= 1 or tensor.strides[0] >= columns
    return tensor.shape == (rows, columns) and (columns <= 1 or tensor.strides[1] == 1) and apart


def _check_logits(
    device: torch.device, kind: str, student: Facts, teacher: Facts | None, knobs: Facts, sums: Facts, part: Part
) -> tuple[int, list[Planned]]:
    """Check what every call is given; return its segments and its first arguments."""
    require(student.dtype in DTYPES and student.device == device, f"student: expected bfloat16 or float32 on {device}")
    require(len(student.shape) == 2 and min(student.shape) > 0, "student: expected logits [C, V], not empty")
    rows, columns = student.shape
    require(_is_rows(student, rows, columns), "student: expected rows contiguous in themselves")
    wide = [student]
    if kind == "ce":
        require(teacher is None, "teacher: expected none for the cross-entropy alone")
    else:
        require(teacher is not None, f"teacher: expected logits for {kind}")
        assert teacher is not None
        require(
            teacher.dtype == student.dtype and teacher.device == device and _is_rows(teacher, rows, columns),
            f"teacher: expected {student.dtype} {(rows, columns)} on {device}, rows contiguous in themselves",
        )
        wide.append(teacher)
    if part.width == 8:
        _require_wide(columns, wide)
    require(
        knobs.shape == (NUM_KNOBS,) and knobs.dtype == torch.float32 and knobs.device == device,
        f"knobs: expected float32 [{NUM_KNOBS}] on {device}",
    )
    require(
        sums.shape == (rows, part.all_segments, SUMS)
        and sums.is_contiguous()
        and sums.dtype == torch.float32
        and sums.device == device,
        f"sums: expected contiguous float32 {(rows, part.all_segments, SUMS)} on {device}",
    )
    segments = segments_of(columns, part.width)
    require(part.first_segment + segments <= part.all_segments, "sums: expected room for these segments")
    stride = 0 if teacher is None else teacher.strides[0]
    return segments, [student, student.strides[0], teacher, stride, columns, segments]


def _require_wide(columns: int, tensors: list[Facts]) -> None:
    fits = columns % 8 == 0 and all(tensor.offset == 0 and tensor.strides[0] % 8 == 0 for tensor in tensors)
    require(fits, "logits: expected 16-byte addresses and rows of whole eights")


def stats(
    device: torch.device, kind: str, student: Facts, teacher: Facts | None, knobs: Facts, sums: Facts, part: Part
) -> Plan:
    """Plan ``LossKernels.stats``."""
    segments, arguments = _check_logits(device, kind, student, teacher, knobs, sums, part)
    name = f"loss_stats_{kind}_{DTYPES[student.dtype]}_v{part.width}"
    arguments += [part.first_segment, part.all_segments, knobs, sums]
    return Plan(name, student.shape[0] * segments, arguments, [sums])


def jsd_parts(device: torch.device, student: Facts, teacher: Facts, knobs: Facts, sums: Facts, part: Part) -> Plan:
    """Plan ``LossKernels.jsd_parts``."""
    segments, arguments = _check_logits(device, "jsd", student, teacher, knobs, sums, part)
    name = f"loss_jsd_{DTYPES[student.dtype]}_v{part.width}"
    arguments += [part.first_segment, part.all_segments, knobs, sums]
    return Plan(name, student.shape[0] * segments, arguments, [sums])


def _check_outputs(
    device: torch.device, student: Facts, labels: Facts, gradient: Facts, ce: Facts, kd: Facts, width: int
) -> str:
    """Check what a gradient is written to; return the two types in a kernel's name."""
    rows, columns = student.shape
    require(
        labels.shape == (rows,) and labels.dtype == torch.int64 and labels.is_contiguous() and labels.device == device,
        f"labels: expected contiguous int64 [{rows}] on {device}",
    )
    types = {torch.float32: list(DTYPES), torch.bfloat16: [torch.bfloat16]}[student.dtype]
    require(
        gradient.dtype in types and gradient.device == device and _is_rows(gradient, rows, columns),
        f"gradient: expected {(rows, columns)} on {device}, no wider than the logits, rows contiguous in themselves",
    )
    if width == 8:
        _require_wide(columns, [gradient])
    for name, tensor in (("ce", ce), ("kd", kd)):
        require(
            tensor.shape == (rows,) and tensor.dtype == torch.float32 and tensor.is_contiguous()
            and tensor.device == device,
            f"{name}: expected contiguous float32 [{rows}] on {device}",
        )  # fmt: skip
    return f"{DTYPES[student.dtype]}_{DTYPES[gradient.dtype]}"


def gradient(
    device: torch.device,
    kind: str,
    student: Facts,
    teacher: Facts | None,
    knobs: Facts,
    sums: Facts,
    part: Part,
    labels: Facts,
    out: Facts,
    ce: Facts,
    kd: Facts,
) -> Plan:
    """Plan ``LossKernels.gradient``."""
    segments, arguments = _check_logits(device, kind, student, teacher, knobs, sums, part)
    types = _check_outputs(device, student, labels, out, ce, kd, part.width)
    arguments += [part.all_segments, knobs, sums, part.first_column, labels, out, out.strides[0], ce, kd]
    name = f"loss_grad_{kind}_{types}_v{part.width}"
    return Plan(name, student.shape[0] * segments, arguments, [out, ce, kd])


def fused(
    device: torch.device,
    kind: str,
    student: Facts,
    teacher: Facts | None,
    knobs: Facts,
    sums: Facts,
    counters: Facts,
    labels: Facts,
    out: Facts,
    ce: Facts,
    kd: Facts,
) -> Plan:
    """Plan ``LossKernels.fused``."""
    rows, columns = student.shape
    part = Part(0, 0, segments_of(columns, 8), 8)
    segments, arguments = _check_logits(device, kind, student, teacher, knobs, sums, part)
    types = _check_outputs(device, student, labels, out, ce, kd, part.width)
    require(out.dtype == torch.bfloat16, "gradient: expected bfloat16")
    require(
        counters.shape == (rows + 1,) and counters.dtype == torch.int32 and counters.device == device,
        f"counters: expected int32 [{rows + 1}] on {device}",
    )
    arguments += [counters, knobs, sums, labels, out, out.strides[0], ce, kd]
    return Plan(f"loss_fused_{kind}_{types}_v8", rows * segments, arguments, [counters, sums, out, ce, kd])


class LossKernels(Kernels):
    """The kernels of the loss, for one device; arguments are checked and planned once, as the teacher's are.

    Every method takes ``kind`` (a divergence, or ``ce`` without a teacher), logits bfloat16 or float32 ``[C, V]`` of
    one type whose rows may be apart, ``knobs`` of ``knobs_of`` and ``sums``, float32 ``[C, S, 8]``. A row may be given
    in parts, tiles of the vocabulary one after another: first ``stats`` of every part, then for jsd ``jsd_parts`` of
    every part, then ``gradient`` of every part. All raise ValueError for tensors that do not fit.
    """

    def __init__(self, device: torch.device | str, launcher: Launcher | None = None) -> None:
        super().__init__(device, launcher)
        self._call: Callable[..., None] = self._run

    def stats(
        self, kind: str, student: Tensor, teacher: Tensor | None, knobs: Tensor, sums: Tensor, part: Part
    ) -> None:
        """Write to ``sums`` what these columns add to their rows' sums."""
        self._call(stats, kind, student, teacher, knobs, sums, part)

    def jsd_parts(self, student: Tensor, teacher: Tensor, knobs: Tensor, sums: Tensor, part: Part) -> None:
        """Write to ``sums``, complete from ``stats``, what these columns add to the two halves of jsd."""
        self._call(jsd_parts, student, teacher, knobs, sums, part)

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
    ) -> None:
        """Write the gradient of the summed loss with respect to the student's logits, and each row's terms.

        Args:
            kind: see above.
            student: see above.
            teacher: see above.
            knobs: see above.
            sums: complete.
            part: which columns these are.
            labels: int64 ``[C]``, each below the vocabulary.
            out: ``[C, V]``, float32 (of float32 logits only) or bfloat16; may be ``student`` itself if of its type.
            ce: float32 ``[C]``: cross-entropy, written by the part that has the label's column.
            kd: float32 ``[C]``: T^2 * D, written by the first part.
        """
        self._call(gradient, kind, student, teacher, knobs, sums, part, labels, out, ce, kd)

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
    ) -> None:
        """Do all of it for whole rows in one launch that reads the logits once.

        Args:
            kind: see above.
            student: see above; V a multiple of 8, addresses of 16.
            teacher: see above.
            knobs: see above.
            sums: any content.
            counters: int32 ``[C + 1]``, zero; used up.
            labels: as for ``gradient``.
            out: bfloat16 ``[C, V]``.
            ce: as for ``gradient``.
            kd: as for ``gradient``.
        """
        self._call(fused, kind, student, teacher, knobs, sums, counters, labels, out, ce, kd)


@cache
def loss_kernels(device: torch.device) -> LossKernels:
    """Return this process's loss kernels of a CUDA device.

    Raises:
        InputError: when CuPy is missing or the device is too old: there is no other way to take the loss there.
    """
    return LossKernels(device)
