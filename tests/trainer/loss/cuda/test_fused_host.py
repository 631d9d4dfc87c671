"""The CUDA loss's own logic (chunks, slices, tiles, types) on the CPU, over the kernels the host compiler built."""

import pytest
import torch
from host_kernels import host_launcher
from loss_arrays import LAST_STEPS, arrays, exact_loss, relative

from q4kd.trainer.loss import sums as loss_sums
from q4kd.trainer.loss.config import DIVERGENCES, IGNORE_INDEX, LEAST_LOGIT, MODES, KDLossConfig
from q4kd.trainer.loss.cuda import chunks as loss_chunks
from q4kd.trainer.loss.cuda import fused as cuda_loss
from q4kd.trainer.loss.cuda import tensors as loss_tensors
from q4kd.trainer.loss.cuda.kernels import LossKernels
from q4kd.trainer.loss.teacher_head import DenseHead

BF16, F32 = torch.bfloat16, torch.float32


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> LossKernels:
    return LossKernels("cpu", host_launcher(tmp_path_factory))


@pytest.fixture(autouse=True)
def wide_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 products with float32 results, which only CUDA has."""

    def add(out, a, b, *, beta, alpha):  # type: ignore[no-untyped-def]
        assert a.dtype == b.dtype
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, alpha=alpha, out=out)

    monkeypatch.setattr(loss_tensors, "multiply", lambda x, weight, out: out.copy_(x.float() @ weight.float().T))
    monkeypatch.setattr(loss_sums, "multiply_wide", lambda a, b: a.float() @ b.float())
    monkeypatch.setattr(loss_sums, "add_product", add)


def run(kernels: LossKernels, a, config: KDLossConfig, head=None, dtype=F32):  # type: ignore[no-untyped-def]
    hidden, weight = (a[name].clone().to(dtype).requires_grad_() for name in ("hidden", "weight"))
    positions = loss_sums.target_positions(a["labels"])

    def compute(sums: loss_sums.LossSums) -> None:
        teacher = (None, None) if config.alpha == 1 else (a["teacher_hidden"], head or DenseHead(a["teacher_weight"]))
        inputs = loss_sums.LossInputs(hidden.detach(), weight.detach(), a["labels"], positions, *teacher)
        cuda_loss.run_on_cuda(sums, inputs, config, kernels=kernels)

    terms = loss_sums.fused_loss(hidden, weight, float(len(positions)), config, compute, by_tiles=config.mode == "low")
    terms.loss.backward()
    return terms, hidden.grad, weight.grad


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("vocab", "chunk", "tile", "alpha", "temperature"),
    [(120, 0, 0, 0.3, 1.0), (121, 5, 48, 0.0, 2.0), (120, 7, 50, 0.5, 0.5), (64, 4, 24, 1.0, 1.0)],
)
def test_float32_students(kernels, monkeypatch, divergence, mode, vocab, chunk, tile, alpha, temperature) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(loss_chunks, "SLICE", 3)
    a = arrays(1, tokens=9, vocab=vocab)
    a["labels"][::4] = IGNORE_INDEX
    config = KDLossConfig(
        divergence=divergence, mode=mode, chunk_tokens=chunk, vocab_tile=tile, alpha=alpha, temperature=temperature
    )
    terms, grad_hidden, grad_weight = run(kernels, a, config)
    exact, want_hidden, want_weight = exact_loss(a, config)
    assert abs(float(terms.loss.detach()) - exact.loss) <= 2e-6 * abs(exact.loss)
    assert abs(float(terms.ce) - exact.ce) <= 2e-6 * exact.ce
    assert relative(grad_hidden, want_hidden) <= 1e-5
    assert relative(grad_weight, want_weight) <= 1e-5


@pytest.mark.parametrize("logits", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_students(kernels, monkeypatch, mode, logits) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(loss_chunks, "SLICE", 4)
    a = arrays(2, tokens=24, vocab=256)
    for name in ("hidden", "weight", "teacher_hidden", "teacher_weight"):
        a[name] = a[name].bfloat16()
    config = KDLossConfig(alpha=0.3, mode=mode, chunk_tokens=10, vocab_tile=104, logits=logits)
    terms, grad_hidden, grad_weight = run(kernels, a, config, dtype=BF16)
    exact, want_hidden, want_weight = exact_loss(a, config)
    assert abs(float(terms.loss.detach()) - exact.loss) <= (2e-6 if logits == "float32" else 5e-3) * exact.loss
    assert grad_hidden.dtype == grad_weight.dtype == BF16
    bound = 4e-3 if logits == "float32" else 2e-2
    assert relative(grad_hidden.float(), want_hidden) <= bound
    assert relative(grad_weight.float(), want_weight) <= bound


@pytest.mark.parametrize("last_step", LAST_STEPS[1:], ids=str)
@pytest.mark.parametrize("logits", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("mode", MODES)
def test_students_that_scale_or_cap_their_logits(kernels, monkeypatch, mode, dtype, logits, last_step) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(loss_chunks, "SLICE", 4)
    a = arrays(6, tokens=24, vocab=256)
    for name in ("hidden", "weight", "teacher_hidden", "teacher_weight"):
        a[name] = a[name].to(dtype)
    a["labels"][::5] = IGNORE_INDEX
    config = KDLossConfig(
        alpha=0.3, temperature=2.0, mode=mode, chunk_tokens=10, vocab_tile=104, logits=logits, last_step=last_step
    )
    terms, grad_hidden, grad_weight = run(kernels, a, config, dtype=dtype)
    exact, want_hidden, want_weight = exact_loss(a, config)
    rounds = dtype == BF16 and logits == "bfloat16"
    assert abs(float(terms.loss.detach()) - exact.loss) <= (5e-3 if rounds else 3e-6) * exact.loss
    bound = 2e-2 if rounds else 6e-3 if dtype == BF16 else 1e-5
    assert relative(grad_hidden.float(), want_hidden) <= bound
    assert relative(grad_weight.float(), want_weight) <= bound


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("mode", MODES)
def test_tokens_that_the_teacher_rules_out(kernels, mode, divergence, dtype, temperature) -> None:  # type: ignore[no-untyped-def]
    """Minus infinity costs nothing in forward_kl and jsd, and the least logit in reverse_kl."""
    a = arrays(7, tokens=9, vocab=256)
    for name in ("hidden", "weight", "teacher_hidden", "teacher_weight"):
        a[name] = a[name].to(dtype)
    a["teacher_hidden"][:, 0] = 1
    least = {name: tensor.double() for name, tensor in a.items() if name != "labels"} | {"labels": a["labels"]}
    # The first sixteen, one alone, a whole tile, and the last ones.
    for columns in (slice(0, 16), slice(40, 41), slice(104, 208), slice(250, 264)):
        a["teacher_weight"][columns, 0] = -torch.inf
        least["teacher_weight"][columns] = 0
        least["teacher_weight"][columns, 0] = LEAST_LOGIT
    options = {"alpha": 0.2, "beta": 0.3, "chunk_tokens": 5, "vocab_tile": 104}
    config = KDLossConfig(divergence=divergence, mode=mode, temperature=temperature, **options)
    terms, grad_hidden, grad_weight = run(kernels, a, config, dtype=dtype)
    exact, want_hidden, want_weight = exact_loss(least, config)
    assert abs(float(terms.loss.detach()) - exact.loss) <= 4e-6 * abs(exact.loss)
    bound = 6e-3 if dtype == BF16 else 1e-5
    assert relative(grad_hidden.float(), want_hidden) <= bound
    assert relative(grad_weight.float(), want_weight) <= bound


def test_heads_that_are_not_held_give_their_logits(kernels) -> None:  # type: ignore[no-untyped-def]
    a, config = arrays(3, tokens=9), KDLossConfig(chunk_tokens=4)
    want, want_hidden, _ = run(kernels, a, config)
    calls: list[int] = []

    class Streamed(DenseHead):
        def decoded(self) -> None:
            return None

        def __call__(self, hidden):  # type: ignore[no-untyped-def]
            calls.append(len(hidden))
            return super().__call__(hidden)

    terms, grad_hidden, _ = run(kernels, a, config, head=Streamed(a["teacher_weight"]))
    assert calls == [4, 4, 1]
    assert float(terms.loss.detach()) == pytest.approx(float(want.loss.detach()), rel=1e-6)
    assert relative(grad_hidden, want_hidden.numpy()) < 1e-6


def test_equality_is_exact_in_both_modes(kernels) -> None:  # type: ignore[no-untyped-def]
    a = arrays(4, tokens=6)
    a["teacher_hidden"], a["teacher_weight"] = a["hidden"], a["weight"]
    for divergence in DIVERGENCES:
        for mode in MODES:
            config = KDLossConfig(alpha=0.0, divergence=divergence, mode=mode, vocab_tile=56, temperature=2.0)
            terms, grad_hidden, grad_weight = run(kernels, a, config)
            assert float(terms.kd) == 0.0
            assert not grad_hidden.any()
            assert not grad_weight.any()


def test_chunk_is_chosen_by_bytes() -> None:
    types = {"logits_bytes": 4, "gradient_bytes": 2, "with_teacher": True}
    assert loss_chunks.chunk_bytes(4096, 151_936, **types) == 4096 * 151_936 * 2 + 2 * 1024 * 151_936 * 4
    assert loss_chunks.choose_chunk(8192, 151_936, loss_chunks.CHUNK_BYTES, **types) == 4096
    assert loss_chunks.choose_chunk(8192, 151_936, 1 << 30, **types) == 512
    assert loss_chunks.choose_chunk(8192, 151_936, 1, **types) == 256
    assert loss_chunks.choose_chunk(100, 32_000, loss_chunks.CHUNK_BYTES, **types) == 100
    in_place = types | {"logits_bytes": 2}
    assert loss_chunks.chunk_bytes(1024, 1000, **in_place) == 2 * 1024 * 1000 * 2
