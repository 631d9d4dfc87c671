"""The loss kernels' own source against the dense float64 loss, run by the host compiler's build: no GPU needed."""

import loss_checks as checks
import pytest
import torch
from host_kernels import host_launcher

from q4kd.trainer.loss.config import DIVERGENCES, KDLossConfig
from q4kd.trainer.loss.cuda.kernels import LossKernels, knobs_of, segments_of, whole

BF16, F32 = torch.bfloat16, torch.float32


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> LossKernels:
    return LossKernels("cpu", host_launcher(tmp_path_factory))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("types", checks.TYPES)
@pytest.mark.parametrize(("columns", "temperature", "alpha"), [(520, 1.0, 0.3), (8200, 2.0, 0.0), (301, 0.5, 0.7)])
def test_whole_rows(kernels: LossKernels, divergence, types, columns, temperature, alpha) -> None:  # type: ignore[no-untyped-def]
    config = KDLossConfig(divergence=divergence, temperature=temperature, alpha=alpha, beta=0.3)
    checks.matches(kernels, config, 3, columns, types, seed=1)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("tiles", [[256, 8448, 40], [5, 300, 1]])
def test_tiles_of_a_vocabulary(kernels: LossKernels, divergence, tiles: list[int]) -> None:  # type: ignore[no-untyped-def]
    config = KDLossConfig(divergence=divergence, temperature=1.5, alpha=0.4)
    checks.matches(kernels, config, 2, sum(tiles), (F32, F32), seed=2, tiles=tiles)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("in_type", [BF16, F32])
def test_one_launch_of_one_segment(kernels: LossKernels, divergence, in_type: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    for temperature in (1.0, 3.0):
        config = KDLossConfig(divergence=divergence, temperature=temperature, alpha=0.2)
        checks.matches(kernels, config, 3, 2056, (in_type, BF16), seed=3, is_fused=True)


def test_gradient_in_the_place_of_the_logits(kernels: LossKernels) -> None:
    for types in ((BF16, BF16), (F32, F32)):
        checks.matches(kernels, KDLossConfig(alpha=0.3), 2, 8200, types, seed=4, in_place=True)
    checks.matches(kernels, KDLossConfig(alpha=0.3), 2, 520, (BF16, BF16), seed=4, in_place=True, is_fused=True)


@pytest.mark.parametrize("types", checks.TYPES)
def test_cross_entropy_alone(kernels: LossKernels, types) -> None:  # type: ignore[no-untyped-def]
    config = KDLossConfig(alpha=1.0, temperature=2.0)
    checks.matches(kernels, config, 2, 8201, types, seed=6, with_teacher=False)
    if types[1] == BF16:
        checks.matches(kernels, config, 2, 520, types, seed=6, with_teacher=False, is_fused=True)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("columns", [520, 2101])
def test_equality_costs_exactly_nothing(kernels: LossKernels, divergence, columns: int) -> None:  # type: ignore[no-untyped-def]
    for temperature in (1.0, 2.0):
        config = KDLossConfig(divergence=divergence, temperature=temperature, alpha=0.0)
        for dtype in (BF16, F32):
            checks.equality_is_exact(kernels, config, columns, dtype)
    checks.equality_is_exact(kernels, KDLossConfig(divergence=divergence, alpha=0.0), 520, F32, is_fused=True)


def test_what_is_not_finite_is_seen(kernels: LossKernels) -> None:
    student, teacher, labels = checks.make_logits(4, 520, F32, seed=7)
    student[0, 3], student[1, 400], teacher[2, 9] = torch.nan, torch.inf, torch.nan
    grad, ce, kd = checks.run(kernels, KDLossConfig(alpha=0.5), student, teacher, labels, BF16)
    assert torch.isnan(ce).tolist() == [True, True, False, False]
    assert torch.isnan(kd).tolist() == [True, True, True, False]
    assert grad[3].isfinite().all()


def test_tensors_that_do_not_fit_are_refused(kernels: LossKernels) -> None:
    config, rows, columns = KDLossConfig(), 2, 64
    s, t, labels = (x.contiguous() for x in checks.make_logits(rows, columns, F32, seed=8))
    knobs, sums, part = knobs_of(config, kernels.device), torch.zeros(rows, 1, 8), whole(columns)
    ce, kd, out = torch.zeros(rows), torch.zeros(rows), torch.zeros(rows, columns)
    odd = torch.zeros(rows * columns + 1)[1:].view(rows, columns)
    refused = [
        lambda: kernels.stats("forward_kl", s, None, knobs, sums, part),
        lambda: kernels.stats("ce", s, t, knobs, sums, part),
        lambda: kernels.stats("forward_kl", s, t.bfloat16(), knobs, sums, part),
        lambda: kernels.stats("forward_kl", s, t[:, :32], knobs, sums, part),
        lambda: kernels.stats("forward_kl", s.half(), t.half(), knobs, sums, part),
        lambda: kernels.stats("forward_kl", odd, t, knobs, sums, part),
        lambda: kernels.stats("forward_kl", s.T.contiguous().T, t, knobs, sums, part),
        lambda: kernels.stats("forward_kl", s, t, knobs[:4], sums, part),
        lambda: kernels.stats("forward_kl", s, t, knobs, sums[:1], part),
        lambda: kernels.stats("forward_kl", s[:0], t[:0], knobs, sums[:0], part),
        lambda: kernels.gradient("forward_kl", s, t, knobs, sums, part, labels.int(), out, ce, kd),
        lambda: kernels.gradient("forward_kl", s, t, knobs, sums, part, labels, out[:1], ce, kd),
        lambda: kernels.gradient("forward_kl", s, t, knobs, sums, part, labels, out, ce[:1], kd),
        lambda: kernels.gradient("forward_kl", s, t, knobs, sums, part, labels, out, ce, kd.double()),
        lambda: kernels.fused("forward_kl", s, t, knobs, sums, torch.zeros(2, dtype=torch.int32), labels, out, ce, kd),
        lambda: kernels.fused(
            "forward_kl", s, t, knobs, sums, torch.zeros(2, dtype=torch.int32), labels, out.bfloat16(), ce, kd
        ),
    ]
    for index, call in enumerate(refused):
        with pytest.raises(ValueError, match="expected"):
            call()
            pytest.fail(f"call {index} was accepted")
    assert segments_of(151_936, 8) == 19
