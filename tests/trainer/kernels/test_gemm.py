"""Products of few tokens are near to float64, those of many take the fast kernel, and both are right."""

import pytest
import torch

from q4kd.trainer.kernels import gemm


def away(tokens: int, cols: int) -> float:
    torch.manual_seed(3)
    x_MK, weight_RK = torch.randn(tokens, cols), torch.randn(640, cols)
    exact_MR = x_MK.double() @ weight_RK.double().T
    return float((gemm.multiply(x_MK, weight_RK).double() - exact_MR).norm() / exact_MR.norm())


@pytest.mark.skipif(not gemm.has_avx512_product(), reason="there is one product only")
@pytest.mark.parametrize("cols", [2048, 4864])
def test_a_product_of_few_tokens_adds_short_chains(cols: int) -> None:
    # One chain of 1,024 terms is 5.6e-7 away.
    assert away(64, cols) < 4e-7


@pytest.mark.parametrize("tokens", [1, 64, 65, 300])
def test_a_product_is_right_on_both_sides_of_the_border(tokens: int) -> None:
    assert away(tokens, 896) < 6e-7
