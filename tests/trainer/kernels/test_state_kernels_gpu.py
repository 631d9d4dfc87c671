"""The kernels of gated delta nets on a GPU: the checks of test_state_kernels_host.py at real sizes."""

import pytest
import state_checks as checks
import torch

from q4kd.trainer.kernels.state_kernels import StateKernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
BF16, F32 = torch.bfloat16, torch.float32


@pytest.fixture(scope="module")
def kernels() -> StateKernels:
    return StateKernels("cuda")


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize(
    ("batch", "positions", "heads", "taps"), [(2, 200, (16, 32, 128), 4), (1, 3, (2, 6, 64), 4), (3, 5, (1, 1, 40), 2)]
)
def test_channels_are_convolved_within_their_documents(
    kernels: StateKernels, batch: int, positions: int, heads: tuple[int, int, int], taps: int, dtype: torch.dtype
) -> None:
    checks.convolution_matches(kernels, batch, positions, heads, taps, dtype)


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize(("tokens", "heads", "size"), [(3000, 32, 128), (3, 1, 7)])
def test_what_heads_read_is_normalised_and_gated(
    kernels: StateKernels, tokens: int, heads: int, size: int, dtype: torch.dtype
) -> None:
    checks.gate_matches(kernels, tokens, heads, size, dtype)
