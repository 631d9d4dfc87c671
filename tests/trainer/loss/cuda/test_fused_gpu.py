"""The fused loss on a GPU: kernels and both modes against float64 at real widths, bytes held, and what repeats."""

import loss_checks as checks
import pytest
import torch
from loss_arrays import LAST_STEPS
from torch import Tensor

from q4kd.trainer.loss import sums as loss_sums
from q4kd.trainer.loss.config import DIVERGENCES, IGNORE_INDEX, LEAST_LOGIT, MODES, KDLossConfig
from q4kd.trainer.loss.cuda import fused as cuda_loss
from q4kd.trainer.loss.cuda.kernels import LossKernels, loss_kernels, segments_of
from q4kd.trainer.loss.fused import kd_loss
from q4kd.trainer.loss.teacher_head import DenseHead
from q4kd.trainer.loss.topk import topk_kd_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
BF16, F32 = torch.bfloat16, torch.float32
VOCAB = 151_936


@pytest.fixture(scope="module")
def kernels() -> LossKernels:
    return loss_kernels(torch.empty(0, device="cuda").device)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("types", checks.TYPES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_two_launches(kernels: LossKernels, divergence, types, temperature: float) -> None:  # type: ignore[no-untyped-def]
    config = KDLossConfig(divergence=divergence, temperature=temperature, alpha=0.3, beta=0.3)
    for columns in (VOCAB, 50_257, 520):
        checks.matches(kernels, config, 5, columns, types, seed=1)
    checks.matches(kernels, config, 5, 40_000, types, seed=2, tiles=[8192, 16_384, 8192, 7232])


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("in_type", [BF16, F32])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_one_launch(kernels: LossKernels, divergence, in_type: torch.dtype, temperature: float) -> None:  # type: ignore[no-untyped-def]
    config = KDLossConfig(divergence=divergence, temperature=temperature, alpha=0.3, beta=0.3)
    for rows, columns in ((5, VOCAB), (67, 16_392), (3, 520)):
        checks.matches(kernels, config, rows, columns, (in_type, BF16), seed=3, is_fused=True)
    checks.matches(kernels, config, 2, 32_000, (in_type, BF16), seed=4, is_fused=True, with_teacher=False)


@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("in_type", [BF16, F32])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_tokens_that_the_teacher_rules_out(  # type: ignore[no-untyped-def]
    kernels: LossKernels, divergence, in_type: torch.dtype, temperature: float, is_fused: bool
) -> None:
    """Minus infinity gives the bits that the least logit gives: the first of a row, a whole segment, and the last."""
    config = KDLossConfig(divergence=divergence, temperature=temperature, alpha=0.3, beta=0.3)
    student, teacher, labels = checks.make_logits(7, 40_000, in_type, seed=9, pad=8)
    for columns in (slice(0, 16), slice(100, 101), slice(8192, 16_384), slice(39_990, 40_000)):
        teacher[:, columns] = LEAST_LOGIT
    want = checks.run(kernels, config, student, teacher, labels, BF16, is_fused=is_fused)
    teacher[teacher <= LEAST_LOGIT] = -torch.inf
    found = checks.run(kernels, config, student, teacher, labels, BF16, is_fused=is_fused)
    assert all(part.isfinite().all() for part in found)
    for part, wanted in zip(found, want, strict=True):
        assert torch.equal(part, wanted)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_one_launch_repeats_its_bits_and_is_two_launches_to_rounding(kernels: LossKernels, divergence) -> None:  # type: ignore[no-untyped-def]
    # 1,024 rows of 19 segments: many times what runs at one time, so rows wait for each other.
    student = (4 * torch.randn(1024, VOCAB, device="cuda")).contiguous()
    teacher = (0.9 * student + torch.randn(1024, VOCAB, device="cuda")).contiguous()
    labels = torch.randint(0, VOCAB, (1024,), device="cuda")
    config = KDLossConfig(divergence=divergence, alpha=0.3)
    knobs, part = cuda_loss.knobs_of(config, student.device), cuda_loss.whole(VOCAB)
    results = []
    for turn in range(6):
        sums = torch.full((1024, segments_of(VOCAB, 8), 8), torch.nan, device="cuda")
        out = torch.full((1024, VOCAB), torch.nan, dtype=BF16, device="cuda")
        ce, kd = torch.full((2, 1024), torch.nan, device="cuda")
        if turn == 0:
            kernels.stats(divergence, student, teacher, knobs, sums, part)
            if divergence == "jsd":
                kernels.jsd_parts(student, teacher, knobs, sums, part)
            kernels.gradient(divergence, student, teacher, knobs, sums, part, labels, out, ce, kd)
        else:
            counters = torch.zeros(1025, dtype=torch.int32, device="cuda")
            kernels.fused(divergence, student, teacher, knobs, sums, counters, labels, out, ce, kd)
        results.append((out, ce, kd))
    (two_out, two_ce, two_kd), one, *again = results
    for other in again:
        for ours, theirs in zip(one, other, strict=True):
            assert torch.equal(ours, theirs)
    # Powers of two in one launch, exp in the other.
    assert checks.relative_error(one[1], two_ce.double()) <= 2e-6
    assert checks.relative_error(one[2], two_kd.double()) <= 1e-5
    assert checks.relative_error(one[0], two_out.double()) <= checks.BF16_ROUNDING


def test_equality_costs_exactly_nothing(kernels: LossKernels) -> None:
    for divergence in DIVERGENCES:
        for temperature in (1.0, 3.0):
            config = KDLossConfig(divergence=divergence, temperature=temperature, alpha=0.0)
            for dtype in (BF16, F32):
                checks.equality_is_exact(kernels, config, VOCAB, dtype)
                checks.equality_is_exact(kernels, config, VOCAB, dtype, is_fused=True)


def make(tokens: int, vocab: int, dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(tokens, 128), torch.randn(vocab, 128) * 0.2
    labels = torch.randint(0, vocab, (tokens,))
    labels[::5] = IGNORE_INDEX
    # A teacher near the student: its head is the student's, its hidden states are other.
    given = {
        "hidden": hidden,
        "weight": weight,
        "teacher_hidden": torch.cat([hidden + 0.3 * torch.randn_like(hidden), torch.randn(tokens, 128)], 1),
        "teacher_weight": torch.cat([torch.cat([weight, torch.randn(vocab, 128) * 0.02], 1), torch.randn(64, 256)], 0),
    }
    return {name: tensor.to("cuda", dtype) for name, tensor in given.items()} | {"labels": labels.cuda()}


def run(a: dict[str, Tensor], config: KDLossConfig):  # type: ignore[no-untyped-def]
    hidden, weight = a["hidden"].clone().requires_grad_(), a["weight"].clone().requires_grad_()
    terms = kd_loss(
        hidden,
        weight,
        a["labels"],
        teacher_hidden=a["teacher_hidden"],
        teacher_head=DenseHead(a["teacher_weight"]),
        num_targets=float((a["labels"] != IGNORE_INDEX).sum()),
        config=config,
    )
    terms.loss.backward()
    return terms, hidden.grad, weight.grad


def dense(a: dict[str, Tensor], config: KDLossConfig):  # type: ignore[no-untyped-def]
    """Float64 on the device, gradients by autograd."""
    kept = a["labels"] != IGNORE_INDEX
    hidden, weight = a["hidden"].double().requires_grad_(), a["weight"].double().requires_grad_()
    step, products = config.last_step, hidden[kept] @ weight.T
    s = step.cap * torch.tanh(step.scale * products / step.cap) if step.cap else step.scale * products
    t = (a["teacher_hidden"][kept].double() @ a["teacher_weight"].double().T)[:, : len(weight)]
    log_q, log_p = torch.log_softmax(s / config.temperature, 1), torch.log_softmax(t / config.temperature, 1)
    q, p = log_q.exp(), log_p.exp()
    if config.divergence == "forward_kl":
        value = (p * (log_p - log_q)).sum()
    elif config.divergence == "reverse_kl":
        value = (q * (log_q - log_p)).sum()
    else:
        log_m = (config.beta * p + (1 - config.beta) * q).log()
        value = config.beta * (p * (log_p - log_m)).sum() + (1 - config.beta) * (q * (log_q - log_m)).sum()
    ce = torch.nn.functional.cross_entropy(s, a["labels"][kept])
    kd = config.temperature**2 * value / kept.sum()
    loss = config.alpha * ce + (1 - config.alpha) * kd
    loss.backward()
    return loss.detach(), ce.detach(), kd.detach(), hidden.grad, weight.grad


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize(("vocab", "temperature", "alpha"), [(32_000, 1.0, 0.1), (50_257, 2.0, 0.5)])
def test_both_modes_are_the_dense_float64_loss(divergence, mode, dtype, vocab, temperature, alpha) -> None:  # type: ignore[no-untyped-def]
    a = make(300, vocab, dtype)
    config = KDLossConfig(
        divergence=divergence, mode=mode, temperature=temperature, alpha=alpha, beta=0.3, chunk_tokens=128
    )
    terms, grad_hidden, grad_weight = run(a, config)
    loss, ce, kd, want_hidden, want_weight = dense(a, config)
    errors = [abs(float(x) - float(y)) / float(y) for x, y in ((terms.loss, loss), (terms.ce, ce), (terms.kd, kd))]
    of_hidden, of_weight = relative(grad_hidden, want_hidden), relative(grad_weight, want_weight)
    print(f"loss, ce, kd {errors}, gradients {of_hidden:.1e} {of_weight:.1e}")
    assert max(errors) <= 1e-4
    assert grad_hidden.dtype == grad_weight.dtype == dtype
    bound = 5e-3 if dtype == BF16 else 1e-4
    assert of_hidden <= bound
    assert of_weight <= bound


@pytest.mark.parametrize("last_step", LAST_STEPS[1:], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("dtype", "logits"), [(BF16, "float32"), (BF16, "bfloat16"), (F32, "float32")])
def test_students_that_scale_or_cap_their_logits(mode, dtype, logits, last_step) -> None:  # type: ignore[no-untyped-def]
    a = make(300, 32_000, dtype)
    config = KDLossConfig(alpha=0.3, temperature=2.0, mode=mode, logits=logits, chunk_tokens=128, last_step=last_step)
    terms, grad_hidden, grad_weight = run(a, config)
    loss, ce, kd, want_hidden, want_weight = dense(a, config)
    errors = [abs(float(x) - float(y)) / float(y) for x, y in ((terms.loss, loss), (terms.ce, ce), (terms.kd, kd))]
    of_hidden, of_weight = relative(grad_hidden, want_hidden), relative(grad_weight, want_weight)
    print(f"loss, ce, kd {errors}, gradients {of_hidden:.1e} {of_weight:.1e}")
    rounds = logits == "bfloat16"
    assert max(errors[:2]) <= (1e-2 if rounds else 1e-4)
    # The gradient is rounded once by the kernel and once more by the cap.
    bound = 3e-2 if rounds else 1e-2 if dtype == BF16 else 1e-4
    assert max(of_hidden, of_weight) <= bound


def test_bfloat16_logits_are_near(kernels: LossKernels) -> None:
    a = make(300, 32_000, BF16)
    terms, grad_hidden, grad_weight = run(a, KDLossConfig(alpha=0.5, logits="bfloat16"))
    loss, ce, kd, want_hidden, want_weight = dense(a, KDLossConfig(alpha=0.5))
    print([abs(float(x) - float(y)) / float(y) for x, y in ((terms.loss, loss), (terms.ce, ce), (terms.kd, kd))])
    assert abs(float(terms.loss) - float(loss)) <= 1e-2 * float(loss)
    assert relative(grad_hidden, want_hidden) <= 3e-2
    assert relative(grad_weight, want_weight) <= 3e-2


def test_masters_in_float32_get_float32_gradients() -> None:
    a = make(300, 32_000, BF16)
    hidden, weight = a["hidden"].clone().requires_grad_(), a["weight"].float().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        terms = kd_loss(
            hidden,
            weight,
            a["labels"],
            teacher_hidden=a["teacher_hidden"],
            teacher_head=DenseHead(a["teacher_weight"]),
            num_targets=240.0,
            config=KDLossConfig(alpha=0.5),
        )
    terms.loss.backward()
    assert weight.grad is not None
    assert weight.grad.dtype == F32
    *_, want_weight = dense(a, KDLossConfig(alpha=0.5))
    assert relative(weight.grad, want_weight) <= 5e-3


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_low_takes_at_most_512_megabytes(divergence) -> None:  # type: ignore[no-untyped-def]
    tokens, hidden_size = 8192, 896
    hidden = torch.randn(tokens, hidden_size, device="cuda", dtype=BF16).requires_grad_()
    weight = (torch.randn(VOCAB, hidden_size, device="cuda") * 0.02).to(BF16).requires_grad_()
    head = DenseHead((torch.randn(VOCAB + 128, 3584, device="cuda") * 0.02).to(BF16))
    source = torch.randn(tokens, 3584, device="cuda", dtype=BF16)
    labels = torch.randint(0, VOCAB, (tokens,), device="cuda")
    labels[::50] = IGNORE_INDEX
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    terms = kd_loss(
        hidden,
        weight,
        labels,
        teacher_hidden=source,
        teacher_head=head,
        num_targets=float(tokens),
        config=KDLossConfig(mode="low", divergence=divergence),
    )
    terms.loss.backward()
    torch.cuda.synchronize()
    beyond = torch.cuda.max_memory_allocated() - before - hidden.nbytes - weight.nbytes
    print(f"{divergence}: {beyond / 1e6:.0f} MB beyond parameters and gradients")
    assert beyond <= 512_000_000


def test_kernels_allocate_nothing(kernels: LossKernels) -> None:
    student, teacher = torch.randn(2, 64, 32_000, device="cuda")
    config = KDLossConfig()
    knobs, sums = cuda_loss.knobs_of(config, student.device), torch.empty(64, 4, 8, device="cuda")
    counters, labels = (
        torch.zeros(65, dtype=torch.int32, device="cuda"),
        torch.zeros(64, dtype=torch.int64, device="cuda"),
    )
    out, (ce, kd) = torch.empty(64, 32_000, dtype=BF16, device="cuda"), torch.empty(2, 64, device="cuda")
    before = None
    for _ in range(5):
        counters.zero_()
        kernels.fused("forward_kl", student, teacher, knobs, sums, counters, labels, out, ce, kd)
        torch.cuda.synchronize()
        now = torch.cuda.memory_stats()["allocation.all.allocated"]
        assert before in (None, now)
        before = now


def test_sanitizer_loss(kernels: LossKernels) -> None:
    for divergence in DIVERGENCES:
        config = KDLossConfig(divergence=divergence, temperature=2.0, alpha=0.3)
        for types in checks.TYPES:
            for columns in (520, 301):
                checks.matches(kernels, config, 3, columns, types, seed=5)
        checks.matches(kernels, config, 3, 8200, (F32, BF16), seed=6, is_fused=True)
        checks.matches(kernels, config, 3, 608, (F32, F32), seed=7, tiles=[256, 256, 96])
    checks.matches(kernels, KDLossConfig(alpha=1.0), 3, 520, (BF16, BF16), seed=8, with_teacher=False)


def test_products_add_to_float32_in_place_and_by_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.randn(20_001, 256, device="cuda").to(BF16), torch.randn(256, 64, device="cuda").to(BF16)
    start = torch.randn(20_001, 64, device="cuda")
    want = start.double() + a.double() @ b.double()
    print("in place:", loss_sums._adds_in_float32(start.device))
    for by_slabs in (False, True):
        if by_slabs:
            monkeypatch.setattr(loss_sums, "_adds_in_float32", lambda _device: False)
        out = start.clone()
        loss_sums.add_product(out, a, b, beta=1, alpha=1)
        assert relative(out, want) < 1e-6
        loss_sums.add_product(out.fill_(torch.nan), a, b, beta=0, alpha=1)
        assert relative(out, want - start.double()) < 1e-6


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_cached_teachers_of_all_tokens_are_the_dense_float64_loss(divergence) -> None:  # type: ignore[no-untyped-def]
    a = make(300, 2000, BF16)
    log_p = torch.log_softmax((a["teacher_hidden"].double() @ a["teacher_weight"].double().T)[:, :2000], 1)
    config = KDLossConfig(divergence=divergence, alpha=0.3, beta=0.3, chunk_tokens=128)
    hidden, weight = a["hidden"].clone().requires_grad_(), a["weight"].clone().requires_grad_()
    terms = topk_kd_loss(
        hidden,
        weight,
        a["labels"],
        topk_ids_MK=torch.arange(2000, device="cuda").expand(300, -1),
        topk_log_probs_MK=log_p.float(),
        tail_log_prob_M=torch.full((300,), -torch.inf, device="cuda"),
        num_targets=240.0,
        config=config,
    )
    terms.loss.backward()
    loss, _, _, want_hidden, want_weight = dense(a, config)
    assert abs(float(terms.loss) - float(loss)) <= 1e-4 * float(loss)
    assert relative(hidden.grad, want_hidden) <= 5e-3  # type: ignore[arg-type]
    assert relative(weight.grad, want_weight) <= 5e-3  # type: ignore[arg-type]
