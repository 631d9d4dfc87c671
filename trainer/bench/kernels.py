"""Measures how close decoders and small-batch products come to memory bandwidth, and what a launch costs the host.

The bytes counted are those that must move: packed ones read, decoded ones written. Every call works on another set of
buffers, so that no read is served by the cache; times are medians of CUDA events. Products take some ten microseconds,
less than launching one from Python, so they are timed as CUDA graphs of one call a buffer set.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from q4kd.trainer.bench.device_probes import current_device
from q4kd.trainer.formats.blocks.layout import block_format
from q4kd.trainer.kernels.launch import THREADS, CudaLauncher
from q4kd.trainer.kernels.numerics import multiply, pinned_numerics
from q4kd.trainer.kernels.teacher_kernels import MAX_MATVEC_TOKENS, Q6_K_SOA, Kernels

# Gate and up of a 7B model: 272 MB of bfloat16, several times any L2.
ROWS, COLS = 37888, 3584
BENCH_TYPES: tuple[str, ...] = ("Q4_K", "Q5_K", "Q6_K", Q6_K_SOA, "Q8_0", "Q4_0", "Q5_0", "F16", "BF16", "F32")
BENCH_TYPES += ("Q4_1", "Q5_1", "Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS")
BENCH_TYPES += ("IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_S", "IQ1_M", "MXFP4", "NVFP4", "TQ1_0", "TQ2_0")

# The two shapes of that model's feed-forward part, and their small-batch products.
MATVEC_SHAPES = ((18944, 3584), (3584, 18944))
MATVEC_TYPES = ("Q4_K", Q6_K_SOA)
MATVEC_TOKENS = (1, 2, 4, 8, MAX_MATVEC_TOKENS)


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


def decode_table(*, repeats: int = 60, sets: int = 4) -> str:
    """Measure ``repeats`` copies, then as many decodings of every type, to bfloat16 ``[37888, 3584]``.

    Returns:
        A row each, as aligned text: bytes read and written over the median time, in 1e9 a second; the same over that of
        the copy; and (slowest quarter - fastest quarter) / median of the times.
    """
    kernels, weights = Kernels("cuda"), ROWS * COLS
    device = kernels.device
    outs = [torch.empty(ROWS, COLS, dtype=torch.bfloat16, device=device) for _ in range(sets)]
    sources = [torch.randn(ROWS, COLS, device=device).bfloat16() for _ in range(sets)]
    copies = [partial(out.copy_, source) for out, source in zip(outs, sources, strict=True)]
    seconds, spread = _time(copies, repeats)
    copied = 4 * weights / seconds
    del sources, copies
    lines = [f"{'type':<10} {'GB/s':>8} {'of copy':>8} {'spread':>7}"]
    lines.append(f"{'copy':<10} {copied / 1e9:8.0f} {1:8.3f} {spread:7.3f}")
    for name in BENCH_TYPES:
        packed = _random_matrices(name, ROWS, COLS, sets, device)
        pairs = zip(packed, outs, strict=True)
        decodes = [partial(kernels.decode, name, source, 0, ROWS, COLS, out) for source, out in pairs]
        seconds, spread = _time(decodes, repeats)
        moved = (packed[0].numel() + 2 * weights) / seconds
        lines.append(f"{name:<10} {moved / 1e9:8.0f} {moved / copied:8.3f} {spread:7.3f}")
    return "\n".join(lines)


def _random_matrices(name: str, rows: int, cols: int, count: int, device: torch.device) -> list[Tensor]:
    """Return packed matrices of random bytes, uint8 ``[rows, row_bytes]`` each."""
    row_bytes = block_format("Q6_K" if name == Q6_K_SOA else name).row_bytes(cols)
    return [torch.randint(0, 256, (rows, row_bytes), dtype=torch.uint8, device=device) for _ in range(count)]


def _time_in_graph(calls: Sequence[Callable[[], object]], repeats: int) -> tuple[float, float]:
    """Return what ``_time`` does, for the mean call of a graph of all ``calls``, each run once."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # Libraries set themselves up at their first call, which must not be captured.
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    seconds, spread = _time([graph.replay], repeats)
    return seconds / len(calls), spread


def read_bandwidth(device: torch.device, *, repeats: int = 60) -> float:
    """Return the bytes a second at which torch sums 1 GB of float32, taking turns between two of them."""
    sources = [torch.ones(250_000_000, device=device) for _ in range(2)]
    out = torch.empty((), device=device)
    seconds, _ = _time([partial(torch.sum, source, 0, out=out) for source in sources], repeats)
    return 1e9 / seconds


def _product_line(
    kernels: Kernels,
    name: str,
    matrices: Sequence[Tensor],
    dense_RK: Tensor,
    tokens: int,
    readable: float,
    repeats: int,
) -> str:
    rows, cols = dense_RK.shape
    x = torch.randn(tokens, cols, device=dense_RK.device).bfloat16()
    out = torch.empty(tokens, rows, dtype=torch.bfloat16, device=dense_RK.device)

    def decode_and_multiply(packed: Tensor) -> None:
        kernels.decode(name, packed, 0, rows, cols, dense_RK)
        multiply(x, dense_RK, out)

    fused, _ = _time_in_graph([partial(kernels.matvec, name, packed, x, rows, out) for packed in matrices], repeats)
    decoded, _ = _time_in_graph([partial(decode_and_multiply, packed) for packed in matrices], repeats)
    speed = matrices[0].numel() / fused
    return (
        f"{name:<9} {f'{rows} x {cols}':>13} {tokens:3d} {fused * 1e6:7.1f} {speed / 1e9:6.0f} "
        f"{speed / readable:8.3f} {decoded * 1e6:11.1f} {fused / decoded:6.3f}"
    )


def product_table(*, repeats: int = 60, sets: int = 8) -> str:
    """Measure the fused products of 1 to 16 tokens against decoding and cuBLAS, bfloat16 in and out.

    Matrices of at least 38 MB are taken in turn, ``sets`` of each kind; each product is timed as ``repeats`` graphs.

    Returns:
        A row for every type, shape and number of tokens, as aligned text: microseconds of the fused product; packed
        bytes over that time, in 1e9 a second; the same over the bandwidth of a sum over 1 GB of float32; microseconds
        of decoding the matrix to bfloat16 and multiplying by cuBLAS; and the ratio of the two times.
    """
    kernels = Kernels("cuda")
    device = kernels.device
    readable = read_bandwidth(device, repeats=repeats)
    lines = [f"{'type':<9} {'R x K':>13} {'M':>3} {'us':>7} {'GB/s':>6} {'of read':>8} {'decoded us':>11} {'ratio':>6}"]
    for name in MATVEC_TYPES:
        for rows, cols in MATVEC_SHAPES:
            matrices = _random_matrices(name, rows, cols, sets, device)
            dense = torch.empty(rows, cols, dtype=torch.bfloat16, device=device)
            with pinned_numerics():
                lines += [
                    _product_line(kernels, name, matrices, dense, tokens, readable, repeats) for tokens in MATVEC_TOKENS
                ]
    return "\n".join(lines)


def _host_microseconds(call: Callable[[], object], repeats: int = 300) -> float:
    """Return the least of nine means of ``repeats`` calls, which the device is given time to finish."""
    means = []
    for _ in range(9):
        call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        means.append((time.perf_counter() - start) / repeats)
        torch.cuda.synchronize()
    return min(means) * 1e6


def launch_table() -> str:
    """Return the host's time for launching kernels of few to many arguments, by us and by CuPy's own call, as text."""
    device = current_device()
    launcher, launches = CudaLauncher(device), list[tuple[Any, ...]]()
    recorder = Kernels(device, lambda *launch: launches.append(launch))
    zeros = partial(torch.zeros, device=device)
    half = partial(zeros, dtype=torch.bfloat16)
    recorder.add_bias(half(1, 3584), zeros(3584))
    recorder.matvec("Q4_K", zeros(3584, 2016, dtype=torch.uint8), half(1, 3584), 3584, half(1, 3584))
    recorder.rope(half(1, 28, 128), half(1, 4, 128), zeros(1, 64), zeros(1, 64), "split", q_norm=zeros(128))

    def launch_by_cupy(kernel: str, grid: int, arguments: Sequence[Any], _writes: object) -> None:
        values = [
            value.data_ptr() if isinstance(value, Tensor) else np.float32(value) if type(value) is float else value or 0
            for value in arguments
        ]
        launcher.function(kernel)((grid,), (THREADS,), values)

    lines = [f"{'launch':<24} {'arguments':>9} {'host us':>8} {'by CuPy':>8}"]
    for launch in launches:
        ours, cupys = (_host_microseconds(partial(call, *launch)) for call in (launcher, launch_by_cupy))
        lines.append(f"{launch[0]:<24} {len(launch[2]):9d} {ours:8.2f} {cupys:8.2f}")
    return "\n".join(lines)
