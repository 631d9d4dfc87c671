"""The kernels of mixtures on a GPU: the checks of test_expert_kernels_host.py at real sizes."""

import expert_checks as checks
import pytest
import torch

from q4kd.trainer.kernels.expert_kernels import ExpertKernels
from q4kd.trainer.kernels.grouped import grouped_multiply, has_grouped_kernel
from q4kd.trainer.kernels.teacher_kernels import Kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
BF16, F32 = torch.bfloat16, torch.float32


@pytest.fixture(scope="module")
def teacher() -> Kernels:
    return Kernels("cuda")


@pytest.fixture(scope="module")
def kernels(teacher: Kernels) -> ExpertKernels:
    return ExpertKernels("cuda", teacher.launcher)


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("name", checks.TYPES)
def test_chosen_experts_are_decoded(kernels: ExpertKernels, teacher: Kernels, name: str, dtype: torch.dtype) -> None:
    checks.experts_match(kernels, teacher, name, 7, 96, 768, dtype)
    checks.experts_match(kernels, teacher, name, 4, 768, 2048, dtype)


@pytest.mark.parametrize(
    ("tokens", "experts", "chosen", "parts"),
    [(8192, 128, 8, 2), (1000, 4, 2, 1), (777, 40, 32, 2), (4096, 256, 8, 1), (513, 512, 10, 2)],
)
def test_the_greatest_are_chosen(kernels: ExpertKernels, tokens: int, experts: int, chosen: int, parts: int) -> None:
    checks.route_matches(kernels, tokens, experts, chosen, parts)


def test_logits_that_are_no_numbers_are_seen(kernels: ExpertKernels) -> None:
    checks.bad_logits_are_seen(kernels)


@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize(
    ("tokens", "experts", "chosen"), [(1, 4, 2), (8192, 128, 8), (65536, 128, 8), (65, 300, 4), (100_001, 512, 4)]
)
def test_rows_are_sorted_by_expert(
    kernels: ExpertKernels, tokens: int, experts: int, chosen: int, skewed: bool
) -> None:
    checks.sort_matches(kernels, tokens, experts, chosen, skewed=skewed)


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("hidden", [2048, 2056, 37])
def test_rows_go_to_their_experts_and_back(kernels: ExpertKernels, hidden: int, dtype: torch.dtype) -> None:
    checks.rows_match(kernels, 3000, hidden, dtype)


@pytest.mark.parametrize("counts", [[0, 513, 1, 0, 128, 37, 0], [4000], [0, 0, 7]])
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("ffn", [2880, 33])
def test_rows_are_gated_with_the_biases_of_their_experts(
    kernels: ExpertKernels, ffn: int, dtype: torch.dtype, counts: list[int]
) -> None:
    checks.clamped_swiglu_matches(kernels, ffn, dtype, counts)


def test_groups_are_multiplied_with_their_own_matrix() -> None:
    counts = torch.tensor([0, 513, 1, 0, 128, 37, 0])
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(int(counts.sum()), 768, generator=generator, device="cuda").bfloat16()
    weights = torch.randn(len(counts), 320, 768, generator=generator, device="cuda").bfloat16()
    weights[counts == 0] = torch.nan  # what lies there was not decoded
    ends = counts.cumsum(0)
    found = grouped_multiply(x, weights, ends.int().cuda(), ends.tolist())
    group = torch.repeat_interleave(torch.arange(len(counts)), counts).tolist()
    want = torch.stack([row @ weights[place].double().T for row, place in zip(x.double(), group, strict=True)])
    assert float((found.double() - want).norm() / want.norm()) < 4e-3
    if torch.cuda.get_device_capability() == (9, 0):
        assert has_grouped_kernel(x.device)
