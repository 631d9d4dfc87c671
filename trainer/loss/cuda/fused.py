"""The fused loss on CUDA: cuBLAS for the products, one kernel for softmax, divergence and gradient (``kd_loss.cuh``).

Products take the student's type (bfloat16, else float32) and accumulate in float32; logits are float32, or bfloat16 by
choice (``KDLossConfig.logits``); the gradient with respect to the logits is rounded once to the products' type.

Mode ``fast``, counted for 8,192 tokens, V = 151,936, H' = 3,584, H = 896, bfloat16, so N = 8,192 V = 1.245e9 logits a
side::

    four products   2 N (H' + 3 H) = 15.6 TFLOP                        22 ms at 700 TFLOP/s
    kernel, float32 logits: read 4 + 4, write 2 bytes each: 12.4 GB    3.0 ms at 4.2 TB/s, 4.1 ms at 3.0 TB/s
    kernel, bfloat16 logits: read 2 + 2, write 2: 7.5 GB               1.8 ms and 2.5 ms
    head gradient, summed in float32 over chunks: 8 V H = 1.1 GB a chunk after the first, under its product's arithmetic

Two launches would read 22.4 GB of float32 logits (5.3 and 7.5 ms). So one launch reads them once, and the two gradient
products take chunks of up to 4,096 tokens, fed by slices of 1,024 tokens of logits: ``[chunk, V]`` bfloat16 plus two
``[slice, V]`` float32 are 2.5 GB. bfloat16 logits become their gradient in place, in slices as long as the chunk.
``CHUNK_BYTES`` bounds them. Measured on an H200, the kernel takes 4.9 ms on float32 logits and 3.3 ms on bfloat16 ones:
its blocks wait for each other's sums, and only three or four of them fit a multiprocessor. Mode ``low`` is in
``tiled.py``.

A student that scales or caps its logits has a pass of its own over each slice of products and one over the gradient,
10.0 and 5.0 GB more of the shapes above, counted and not measured. A cap keeps logits apart from their gradient.

Letters in shapes: M tokens, P unmasked ones, C tokens of a chunk, S of a slice, H hidden size, V vocabulary.
"""

import torch
from torch import Tensor

from q4kd.trainer.kernels.numerics import pinned_numerics
from q4kd.trainer.loss.config import KDLossConfig
from q4kd.trainer.loss.cuda.chunks import fast_chunk, slice_of
from q4kd.trainer.loss.cuda.kernels import SUMS, LossKernels, knobs_of, loss_kernels, whole
from q4kd.trainer.loss.cuda.tensors import LossTensors, project
from q4kd.trainer.loss.cuda.tiled import run_low
from q4kd.trainer.loss.last_step import apply_last_step, chain, slope_of
from q4kd.trainer.loss.sums import LossInputs, LossSums
from q4kd.trainer.loss.teacher_head import TeacherHead


def run_on_cuda(sums: LossSums, inputs: LossInputs, config: KDLossConfig, kernels: LossKernels | None = None) -> None:
    """Fill ``sums``, which are made for tiles if ``config.mode`` is low.

    The head of ``inputs`` is a ``TeacherHead``, or in fast a function from hidden states to logits; ``kernels`` are
    those of the tensors' device and are made when absent.

    Raises:
        InputError: when the kernels cannot be compiled or loaded.
    """
    if len(inputs.positions) == 0:
        return
    device = inputs.hidden.device
    kernels = loss_kernels(device) if kernels is None else kernels
    dtype = torch.bfloat16 if inputs.hidden.dtype == torch.bfloat16 else torch.float32
    is_whole = len(inputs.positions) == len(inputs.labels)

    def unmasked(tensor: Tensor) -> Tensor:
        return tensor if is_whole else tensor[inputs.positions]

    teacher_hidden, teacher_head = inputs.teacher_hidden, inputs.teacher_head
    if teacher_hidden is not None:
        kept = teacher_head.dtype if isinstance(teacher_head, TeacherHead) else teacher_hidden.dtype
        teacher_hidden = unmasked(teacher_hidden).to(device, kept)
    given = LossTensors(
        hidden=unmasked(inputs.hidden).to(dtype),
        weight=inputs.weight.to(dtype),
        labels=unmasked(inputs.labels).contiguous(),
        positions=inputs.positions,
        teacher_hidden=teacher_hidden,
        teacher_head=teacher_head,
        config=config,
        logits_type=torch.bfloat16 if config.logits == "bfloat16" and dtype == torch.bfloat16 else torch.float32,
    )
    with pinned_numerics():
        if config.mode == "low":
            run_low(given, sums, kernels)
        else:
            _run_fast(given, sums, kernels)


def _run_fast(given: LossTensors, sums: LossSums, kernels: LossKernels) -> None:
    tokens, vocab, device = len(given.labels), len(given.weight), given.hidden.device
    gradient_type, with_teacher = given.hidden.dtype, given.teacher_hidden is not None
    chunk = fast_chunk(tokens, vocab, given.config, given.hidden, with_teacher=with_teacher)
    # Logits of the gradient's type become it in place, but where the cap's derivative needs them after it.
    last_step = given.config.last_step
    in_place = given.logits_type == gradient_type and not last_step.cap
    step = slice_of(chunk, in_place=in_place)
    grad_CV = torch.empty(chunk, vocab, dtype=gradient_type, device=device)
    student_SV = None if in_place else given.logits(step, vocab)
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
                    project(given.teacher_hidden[rows], decoded[:vocab], teacher)
                    apply_last_step(teacher, given.teacher_head.last_step)
            student = grad_SV if student_SV is None else student_SV[: stop - start]
            project(given.hidden[rows], given.weight, student)
            softmax(rows, apply_last_step(student, last_step), teacher, grad_SV)
            if sums.wanted:
                chain(grad_SV, slope_of(student, last_step, in_place=True))
        if sums.wanted:
            sums.add_gradient(
                given.positions[first:last], grad_CV[: last - first], given.hidden[first:last], given.weight, share=1
            )
    sums.add_terms(softmax.ce.sum(dtype=torch.float64), softmax.kd.sum(dtype=torch.float64))


class _Softmax:
    """The kernels' calls for whole rows, and what they need beside the logits."""

    def __init__(self, given: LossTensors, kernels: LossKernels, rows: int, vocab: int, share: float) -> None:
        device = given.hidden.device
        self._given, self._kernels, self._part = given, kernels, whole(vocab)
        self._knobs = knobs_of(given.config, device, share)
        self._sums = torch.empty(rows, self._part.all_segments, SUMS, device=device)
        self._counters = torch.empty(rows + 1, dtype=torch.int32, device=device)
        # A row whose label is in no column keeps its NaN, so that it cannot pass unseen.
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
