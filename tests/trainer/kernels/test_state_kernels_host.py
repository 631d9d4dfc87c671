"""The kernels of gated delta nets, their own source run by the host compiler's build: no GPU needed."""

import pytest
import state_checks as checks
import torch
from host_kernels import HostLauncher, host_launcher

from q4kd.trainer.kernels.state_kernels import StateKernels

BF16, F32 = torch.bfloat16, torch.float32


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> HostLauncher:
    return host_launcher(tmp_path_factory)


@pytest.fixture
def kernels(launcher: HostLauncher) -> StateKernels:
    return StateKernels("cpu", launcher)


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize(
    ("batch", "positions", "heads", "taps"),
    [(2, 9, (2, 4, 128), 4), (1, 1, (1, 3, 64), 4), (3, 5, (1, 1, 40), 2), (1, 7, (1, 2, 7), 1), (1, 3, (1, 1, 32), 6)],
)
def test_channels_are_convolved_within_their_documents(
    kernels: StateKernels, batch: int, positions: int, heads: tuple[int, int, int], taps: int, dtype: torch.dtype
) -> None:
    checks.convolution_matches(kernels, batch, positions, heads, taps, dtype)


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize(("tokens", "heads", "size"), [(5, 4, 128), (3, 1, 7), (1, 3, 64)])
def test_what_heads_read_is_normalised_and_gated(
    kernels: StateKernels, tokens: int, heads: int, size: int, dtype: torch.dtype
) -> None:
    checks.gate_matches(kernels, tokens, heads, size, dtype)


def test_what_does_not_fit_is_refused(kernels: StateKernels) -> None:
    x, taps, out = torch.zeros(6, 96), torch.zeros(4, 96), torch.zeros(6, 96)
    kernels.convolve(x, taps, None, 3, 32, 64, 1e-6, out)
    for wrong in (
        lambda: kernels.convolve(x, taps[:, :95].contiguous(), None, 3, 32, 64, 1e-6, out),
        lambda: kernels.convolve(x, taps, None, 4, 32, 64, 1e-6, out),
        lambda: kernels.convolve(x, taps, None, 3, 40, 64, 1e-6, out),
        lambda: kernels.convolve(x, taps, None, 3, 32, 40, 1e-6, out),
        lambda: kernels.convolve(x, taps, torch.zeros(5, dtype=torch.int64), 3, 32, 64, 1e-6, out),
        lambda: kernels.convolve(x, taps, None, 3, 32, 64, 1e-6, out.bfloat16()),
        lambda: kernels.gate(x.view(6, 3, 32), x, taps[0, :31].contiguous(), 1e-6, out),
        lambda: kernels.gate(x.view(6, 3, 32), x, taps[0, :32].contiguous(), 1e-6, out.bfloat16()),
    ):
        with pytest.raises(ValueError, match=r"expected|rows of"):
            wrong()
