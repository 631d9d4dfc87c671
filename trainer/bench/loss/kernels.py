"""How fast the loss kernels move their bytes on the device at hand: in one launch, and in two that read twice.

Bytes are those that one read of the logits and one write of the gradient move; the two launches move more and are
given the same, so that both figures say how long a token takes.
"""

from collections.abc import Callable

import torch

from q4kd.trainer.bench.device_probes import copy_bandwidth, current_device, median_seconds
from q4kd.trainer.loss.config import DIVERGENCES, Divergence, KDLossConfig
from q4kd.trainer.loss.cuda.kernels import SUMS, LossKernels, knobs_of, loss_kernels, whole

ROWS = 1024


def kernel_rates(vocab: int, temperature: float = 1.0) -> list[dict[str, object]]:
    """Measure every divergence, type of logits and way of launching on ``[1024, vocab]``, vocab a multiple of 8.

    Returns:
        Rows with ``milliseconds_of_8192`` (tokens), ``bytes_per_s`` and ``of_copy``, its share of a copy's.
    """
    device, copied = current_device(), copy_bandwidth()
    torch.cuda.empty_cache()
    kernels = loss_kernels(device)
    rows: list[dict[str, object]] = []
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher = ((3 * torch.randn(ROWS, vocab, device=device)).to(dtype) for _ in range(2))
        for divergence in DIVERGENCES:
            what = {"divergence": divergence, "logits": str(dtype).removeprefix("torch.")}
            for name, call in _calls(kernels, student, teacher, divergence, temperature).items():
                seconds = median_seconds(call)
                moved = ROWS * vocab * (2 * dtype.itemsize + 2) / seconds
                rates = {"milliseconds_of_8192": seconds * 1e3 * 8192 / ROWS, "bytes_per_s": moved}
                rows.append({"kernel": name, **what, **rates, "of_copy": moved / copied})
    return rows


def _calls(
    kernels: LossKernels, student: torch.Tensor, teacher: torch.Tensor, divergence: Divergence, temperature: float
) -> dict[str, Callable[[], None]]:
    config = KDLossConfig(divergence=divergence, temperature=temperature, alpha=0.1)
    rows, vocab = student.shape
    device, part = student.device, whole(vocab)
    knobs, sums = knobs_of(config, device), torch.empty(rows, part.all_segments, SUMS, device=device)
    counters = torch.zeros(rows + 1, dtype=torch.int32, device=device)
    labels = torch.randint(0, vocab, (rows,), device=device)
    out = torch.empty(rows, vocab, dtype=torch.bfloat16, device=device)
    ce, kd = torch.empty(2, rows, device=device)

    def one() -> None:
        counters.zero_()
        kernels.fused(divergence, student, teacher, knobs, sums, counters, labels, out, ce, kd)

    def two() -> None:
        kernels.stats(divergence, student, teacher, knobs, sums, part)
        if divergence == "jsd":
            kernels.jsd_parts(student, teacher, knobs, sums, part)
        kernels.gradient(divergence, student, teacher, knobs, sums, part, labels, out, ce, kd)

    return {"one launch": one, "two launches": two}


def kernel_table(rows: list[dict[str, object]]) -> list[str]:
    """Return the rows as aligned text."""
    head = f"{'kernel':<13} {'divergence':<11} {'logits':<9} {'ms of 8192':>11} {'GB/s':>6} {'of copy':>8}"
    return [head] + [
        f"{row['kernel']:<13} {row['divergence']:<11} {row['logits']:<9} {row['milliseconds_of_8192']:11.2f} "
        f"{float(str(row['bytes_per_s'])) / 1e9:6.0f} {row['of_copy']:8.3f}"
        for row in rows
    ]
