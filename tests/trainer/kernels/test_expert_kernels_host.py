"""The kernels of mixtures, their own source run by the host compiler's build: no GPU needed."""

import expert_checks as checks
import pytest
import torch
from host_kernels import HostLauncher, host_launcher

from q4kd.trainer.kernels.expert_kernels import ExpertKernels
from q4kd.trainer.kernels.teacher_kernels import Kernels

BF16, F32 = torch.bfloat16, torch.float32


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> HostLauncher:
    return host_launcher(tmp_path_factory)


@pytest.fixture
def kernels(launcher: HostLauncher) -> ExpertKernels:
    return ExpertKernels("cpu", launcher)


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("name", checks.TYPES)
def test_chosen_experts_are_decoded(
    kernels: ExpertKernels, launcher: HostLauncher, name: str, dtype: torch.dtype
) -> None:
    checks.experts_match(kernels, Kernels("cpu", launcher), name, 7, 3, 256, dtype)
    checks.experts_match(kernels, Kernels("cpu", launcher), name, 4, 5, 512, dtype)


@pytest.mark.parametrize(
    ("tokens", "experts", "chosen", "parts"),
    [(9, 128, 8, 2), (3, 4, 2, 1), (5, 40, 32, 2), (2, 256, 8, 1), (2, 512, 10, 2)],
)
def test_the_greatest_are_chosen(kernels: ExpertKernels, tokens: int, experts: int, chosen: int, parts: int) -> None:
    checks.route_matches(kernels, tokens, experts, chosen, parts)


def test_logits_that_are_no_numbers_are_seen(kernels: ExpertKernels) -> None:
    checks.bad_logits_are_seen(kernels)


@pytest.mark.parametrize(
    ("tokens", "experts", "chosen"), [(1, 4, 2), (100, 128, 8), (128, 5, 2), (65, 300, 4), (333, 1, 1)]
)
@pytest.mark.parametrize("skewed", [False, True])
def test_rows_are_sorted_by_expert(
    kernels: ExpertKernels, tokens: int, experts: int, chosen: int, skewed: bool
) -> None:
    checks.sort_matches(kernels, tokens, experts, chosen, skewed=skewed)


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("hidden", [2056, 37])
def test_rows_go_to_their_experts_and_back(kernels: ExpertKernels, hidden: int, dtype: torch.dtype) -> None:
    checks.rows_match(kernels, 11, hidden, dtype)


@pytest.mark.parametrize("counts", [[0, 3, 0, 0, 5, 1, 0], [4], [0, 0, 7]])
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("ffn", [136, 33])
def test_rows_are_gated_with_the_biases_of_their_experts(
    kernels: ExpertKernels, ffn: int, dtype: torch.dtype, counts: list[int]
) -> None:
    checks.clamped_swiglu_matches(kernels, ffn, dtype, counts)


def test_what_does_not_fit_is_refused(kernels: ExpertKernels) -> None:
    packed, out = torch.zeros(6, 144, dtype=torch.uint8), torch.empty(2, 3, 256)
    with pytest.raises(ValueError, match="experts of NVFP4: there is no decoder"):
        kernels.decode_experts("NVFP4", packed, 256, 2, 0, None, out)
    with pytest.raises(ValueError, match="experts 1:3 of 2"):
        kernels.decode_experts("Q4_K", packed, 256, 2, 1, None, out)
    with pytest.raises(ValueError, match="expected 864 bytes"):
        kernels.decode_experts("Q4_K", packed[:5], 256, 2, 0, None, out)
    with pytest.raises(ValueError, match="513 experts"):
        kernels.route(torch.zeros(1, 1, 513), torch.zeros(1, 8, dtype=torch.int32), torch.zeros(1, 8), 1)
    ends = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ValueError, match="biases: expected"):
        kernels.clamped_swiglu(torch.zeros(2, 16), torch.zeros(3, 8), ends, torch.zeros(2, 8))
    with pytest.raises(ValueError, match="ends: expected"):
        kernels.clamped_swiglu(torch.zeros(2, 16), torch.zeros(2, 16), ends, torch.zeros(2, 8))
    with pytest.raises(ValueError, match="biases: expected those of one expert or more"):
        kernels.clamped_swiglu(torch.zeros(2, 16), torch.zeros(0, 16), ends[:0], torch.zeros(2, 8))
    with pytest.raises(ValueError, match="rows 2:5 of 4"):
        kernels.take_rows(torch.zeros(2, 8), torch.zeros(4, dtype=torch.int32), 2, torch.zeros(3, 8))
