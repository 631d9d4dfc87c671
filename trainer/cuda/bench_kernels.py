"""How close each decoder comes to the bandwidth of a copy, on the device at hand.

Bytes are those that must move: packed ones read, decoded ones written. Every call works on another set of buffers, so
that no read is served by the cache; times are medians of CUDA events.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from q4kd.trainer.cuda.kernels import Q6_K_SOA, Kernels
from q4kd.trainer.formats import block_format

# Gate and up of a 7B model: 272 MB of bfloat16, several times any L2.
ROWS, COLS = 37888, 3584
BENCH_TYPES = ("Q4_K", "Q5_K", "Q6_K", Q6_K_SOA, "Q8_0", "Q4_0", "Q5_0", "F16", "BF16", "F32")


@dataclass(frozen=True)
class Bandwidth:
    """One measured decoder.

    Attributes:
        name: its type, or ``copy``.
        gigabytes_per_second: bytes read and written over the median time, in 1e9.
        fraction_of_copy: the same over that of the copy.
        spread: (slowest quarter - fastest quarter) / median of the times.
    """

    name: str
    gigabytes_per_second: float
    fraction_of_copy: float
    spread: float


def _time(calls: Sequence[Callable[[], object]], repeats: int) -> tuple[float, float]:
    """Return the median seconds of a call, taking turns between buffer sets, and the relative quartile spread."""
    for call in (*calls, *calls):
        call()
    torch.cuda.synchronize()
    seconds = []
    for turn in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        calls[turn % len(calls)]()
        stop.record()
        seconds.append((start, stop))
    torch.cuda.synchronize()
    times = [start.elapsed_time(stop) * 1e-3 for start, stop in seconds]
    quarters = statistics.quantiles(times, n=4)
    return statistics.median(times), (quarters[2] - quarters[0]) / quarters[1]


def decode_bandwidth(kernels: Kernels | None = None, *, repeats: int = 60, sets: int = 4) -> list[Bandwidth]:
    """Measure a copy and the decoder of every type to bfloat16, ``[37888, 3584]``.

    Args:
        kernels: those of a CUDA device; made for the current one when absent.
        repeats: timed calls of each.
        sets: buffer sets taken in turn.

    Returns:
        The copy first, then a row a type.
    """
    kernels = Kernels("cuda") if kernels is None else kernels
    device = kernels.device
    weights = ROWS * COLS
    outs = [torch.empty(ROWS, COLS, dtype=torch.bfloat16, device=device) for _ in range(sets)]
    sources = [torch.randn(ROWS, COLS, device=device).bfloat16() for _ in range(sets)]

    copies = [partial(out.copy_, source) for out, source in zip(outs, sources, strict=True)]
    seconds, spread = _time(copies, repeats)
    copied = 4 * weights / seconds
    rows = [Bandwidth("copy", copied / 1e9, 1.0, spread)]
    del sources, copies
    for name in BENCH_TYPES:
        row_bytes = block_format("Q6_K" if name == Q6_K_SOA else name).row_bytes(COLS)
        packed = [torch.randint(0, 256, (ROWS, row_bytes), dtype=torch.uint8, device=device) for _ in range(sets)]

        decodes = [
            partial(kernels.decode, name, source, 0, ROWS, COLS, out) for source, out in zip(packed, outs, strict=True)
        ]
        seconds, spread = _time(decodes, repeats)
        moved = (ROWS * row_bytes + 2 * weights) / seconds
        rows.append(Bandwidth(name, moved / 1e9, moved / copied, spread))
    return rows


def table(rows: list[Bandwidth]) -> str:
    """Return the rows as aligned text."""
    lines = [f"{'type':<10} {'GB/s':>8} {'of copy':>8} {'spread':>7}"]
    lines += [
        f"{row.name:<10} {row.gigabytes_per_second:8.0f} {row.fraction_of_copy:8.3f} {row.spread:7.3f}" for row in rows
    ]
    return "\n".join(lines)
