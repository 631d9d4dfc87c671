"""What the loss kernels must compute, whatever runs them: the host (test_loss_kernels.py) or a GPU.

The reference is the harness's dense float64 loss. Outputs are poisoned with NaN and surrounded by guard elements.
"""

from dataclasses import replace

import torch
from kernel_checks import GUARD, assert_guarded, poisoned, relative_error
from torch import Tensor

from q4kd.harness.oracles.reference import log_softmax, reference_loss
from q4kd.trainer.loss.config import KDLossConfig
from q4kd.trainer.loss.cuda.kernels import SUMS, LossKernels, Part, knobs_of, segments_of, width_of

BF16, F32 = torch.bfloat16, torch.float32
# The one rounding of a gradient to 8 significant bits: what an element, or a row that one element dominates, may lose.
BF16_ROUNDING = 2.0**-8
TYPES = ((BF16, BF16), (F32, BF16), (F32, F32))


def make_logits(rows: int, columns: int, dtype: torch.dtype, seed: int, pad: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Student and teacher logits of about ± 12 with different offsets, and labels; the teacher's rows are padded."""
    generator = torch.Generator().manual_seed(seed)
    student = 4 * torch.randn(rows, columns, generator=generator) + 3
    # Near the student, as after some training, so that a divergence is the small difference of large terms.
    teacher = (0.9 * student + torch.randn(rows, columns, generator=generator) - 11).to(dtype)
    padded = torch.full((rows, columns + pad), 50.0, dtype=dtype)
    padded[:, :columns] = teacher
    return student.to(dtype), padded[:, :columns], torch.randint(0, columns, (rows,), generator=generator)


def run(
    kernels: LossKernels,
    config: KDLossConfig,
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    out_type: torch.dtype,
    *,
    tiles: list[int] | None = None,
    is_fused: bool = False,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient, CE and T^2 * D a row, from poisoned outputs; with ``tiles``, part after part."""
    device = kernels.device
    padded = None if teacher is None else torch.cat([teacher, torch.full_like(teacher[:, :8], 50.0)], 1).to(device)
    student, labels = student.to(device), labels.to(device)
    rows, columns = student.shape
    # The first row and the guards around it stay where they are: GUARD elements are whole sixteen bytes.
    grad, grad_buffer = poisoned((rows, columns), out_type, device)
    assert GUARD % 8 == 0
    if in_place:
        grad.copy_(student)
        student = grad
    (ce, ce_buffer), (kd, kd_buffer) = poisoned((rows,), F32, device), poisoned((rows,), F32, device)
    knobs = knobs_of(config, device)
    kind = "ce" if teacher is None else config.divergence
    if is_fused:
        sums, sums_buffer = poisoned((rows, segments_of(columns, 8), SUMS), F32, device)
        counters = torch.zeros(rows + 1, dtype=torch.int32, device=device)
        kernels.fused(
            kind, student, None if padded is None else padded[:, :columns], knobs, sums, counters, labels, grad, ce, kd
        )
    else:
        widths = tiles or [columns]
        width = min(width_of(count) for count in widths)
        counts = [segments_of(count, width) for count in widths]
        sums, sums_buffer = poisoned((rows, sum(counts), SUMS), F32, device)
        parts, first, segment = [], 0, 0
        for count, segments in zip(widths, counts, strict=True):
            parts.append((slice(first, first + count), Part(first, segment, sum(counts), width)))
            first, segment = first + count, segment + segments
        for columns_of, part in parts:
            kernels.stats(
                kind, student[:, columns_of], None if padded is None else padded[:, columns_of], knobs, sums, part
            )
        if kind == "jsd":
            assert padded is not None
            for columns_of, part in parts:
                kernels.jsd_parts(student[:, columns_of], padded[:, columns_of], knobs, sums, part)
        for columns_of, part in parts:
            slices = student[:, columns_of], None if padded is None else padded[:, columns_of]
            kernels.gradient(kind, *slices, knobs, sums, part, labels, grad[:, columns_of], ce, kd)
    for buffer in (grad_buffer, ce_buffer, kd_buffer, sums_buffer):
        assert_guarded(buffer)
    return grad.cpu(), ce.cpu(), kd.cpu()


def matches(
    kernels: LossKernels,
    config: KDLossConfig,
    rows: int,
    columns: int,
    types: tuple[torch.dtype, torch.dtype],
    seed: int,
    *,
    with_teacher: bool = True,
    **options,
) -> None:
    """The kernels against float64, row by row."""
    if not with_teacher:  # as kd_loss does: the cross-entropy is all there is
        config = replace(config, alpha=1.0)
    student, teacher, labels = make_logits(rows, columns, types[0], seed, pad=8)
    grad, ce, kd = run(kernels, config, student, teacher if with_teacher else None, labels, types[1], **options)
    s, t = student.double().numpy(), teacher.double().numpy()
    want_grad, want_ce, want_kd = [], [], []
    for row in range(rows):
        exact = reference_loss(
            s[row : row + 1],
            t[row : row + 1],
            labels[row : row + 1].numpy(),
            alpha=config.alpha,
            temperature=config.temperature,
            divergence=config.divergence,
            beta=config.beta,
        )
        want_grad.append(torch.from_numpy(exact.grad_logits))
        want_ce.append(exact.ce)
        want_kd.append(exact.kd if with_teacher else 0.0)
    assert relative_error(ce, torch.tensor(want_ce)) <= 2e-6
    if with_teacher:
        assert relative_error(kd, torch.tensor(want_kd)) <= 1e-5
    else:
        assert (kd == 0).all()
    assert relative_error(grad, torch.cat(want_grad)) <= (2e-5 if types[1] == F32 else BF16_ROUNDING)


def equality_is_exact(kernels: LossKernels, config: KDLossConfig, columns: int, dtype: torch.dtype, **options) -> None:
    """A teacher that is the student costs nothing and pulls nowhere, to the last bit."""
    student, _, labels = make_logits(3, columns, dtype, seed=5)
    grad, _, kd = run(kernels, config, student, student.clone(), labels, BF16, **options)
    assert (kd == 0).all()
    assert (grad == 0).all()


def label_probability(student: Tensor, labels: Tensor) -> Tensor:
    """log q(label) in float64."""
    return torch.from_numpy(log_softmax(student.double().numpy())).gather(1, labels.unsqueeze(1)).squeeze(1)
