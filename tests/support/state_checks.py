"""What the kernels of gated delta nets must compute, whatever runs them: the host or a GPU. References are float64."""

import torch
from torch import Tensor

from q4kd.trainer.kernels.state_kernels import StateKernels

BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8}


def relative(found: Tensor, exact: Tensor) -> float:
    """Largest difference over the largest number."""
    return float((found.cpu().double() - exact).abs().max() / exact.abs().max())


def convolution_matches(
    kernels: StateKernels, batch: int, positions: int, heads: tuple[int, int, int], taps: int, dtype: torch.dtype
) -> None:
    """Key heads, value heads and head size in ``heads``; x are columns of a wider product, and documents begin."""
    keys, values, size = heads
    channels, unit, tokens = (2 * keys + values) * size, 2 * keys * size, batch * positions
    generator = torch.Generator().manual_seed(3)
    wide = torch.randn(tokens, channels + 5, generator=generator).to(dtype)
    weights = torch.randn(taps, channels, generator=generator)
    starts = torch.zeros(batch, positions, dtype=torch.int64)
    for row in range(batch):
        for first in range(1 + row, positions, 3 + row):
            starts[row, first:] = first
    for given in (None, starts):
        out = torch.full((tokens, channels), torch.nan, device=kernels.device)
        flat = None if given is None else given.flatten().to(kernels.device)
        x = wide.to(kernels.device)[:, :channels]
        kernels.convolve(x, weights.to(kernels.device), flat, positions, size, unit, 1e-6, out)
        assert (
            relative(out, _convolved(wide[:, :channels].double(), weights.double(), given, positions, unit, size))
            <= 2e-6
        )


def _convolved(x: Tensor, taps: Tensor, starts: Tensor | None, positions: int, unit: int, size: int) -> Tensor:
    exact = torch.zeros_like(x)
    for row in range(len(x)):
        position = row % positions
        first = 0 if starts is None else int(starts.flatten()[row])
        for back in range(min(position - first, len(taps) - 1) + 1):
            exact[row] += x[row - back] * taps[len(taps) - 1 - back]
    exact = exact / (1 + (-exact).exp())
    heads = exact[:, :unit].view(len(x), -1, size)
    exact[:, :unit] = (heads / (heads.square().sum(-1, keepdim=True) + 1e-6).sqrt()).flatten(1)
    return exact


def gate_matches(kernels: StateKernels, tokens: int, heads: int, size: int, dtype: torch.dtype) -> None:
    """z are columns of a wider product."""
    generator = torch.Generator().manual_seed(4)
    x, wide = torch.randn(tokens, heads, size, generator=generator), torch.randn(tokens, heads * size + 3)
    wide, weight = (2 * wide).to(dtype), torch.rand(size, generator=generator) + 0.5
    out = torch.full((tokens, heads * size), torch.nan, dtype=dtype, device=kernels.device)
    z = wide.to(kernels.device)[:, 3:]
    kernels.gate(x.to(kernels.device), z, weight.to(kernels.device), 1e-6, out)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    gates = wide[:, 3:].double()
    assert relative(out, exact.flatten(1) * gates / (1 + (-gates).exp())) <= BOUNDS[dtype]
