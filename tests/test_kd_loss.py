"""The fused loss: the written equation, its gradients, masks, widths, and nothing larger than a chunk."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from q4kd.harness.reference import reference_loss
from q4kd.trainer.kd_loss import DIVERGENCES, IGNORE, KDLossConfig, kd_loss


def arrays(seed: int, tokens: int = 24, vocab: int = 120, hidden: int = 16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    return {
        "hidden": normal(tokens, hidden),
        "weight": normal(vocab, hidden, scale=0.5),
        "teacher_hidden": normal(tokens, 20),
        "teacher_weight": normal(vocab + 8, 20, scale=0.4),
        "labels": torch.randint(0, vocab, (tokens,), generator=generator),
    }


def run(a: dict[str, torch.Tensor], config: KDLossConfig, num_targets: float | None = None):  # type: ignore[no-untyped-def]
    hidden, weight = a["hidden"].clone().requires_grad_(), a["weight"].clone().requires_grad_()
    terms = kd_loss(
        hidden,
        weight,
        a["labels"],
        teacher_hidden=a["teacher_hidden"],
        teacher_head=lambda rows: rows @ a["teacher_weight"].T,
        num_targets=num_targets or float((a["labels"] != IGNORE).sum()),
        config=config,
    )
    terms.loss.backward()
    return terms, hidden.grad, weight.grad


def relative(found: object, exact: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(found) - exact) / np.linalg.norm(exact))


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    divergence=st.sampled_from(DIVERGENCES),
    alpha=st.sampled_from([0.0, 0.2, 1.0]),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    beta=st.sampled_from([0.1, 0.5, 0.9]),
    chunk=st.integers(1, 30),
)
def test_loss_and_gradients_are_the_dense_float64_ones(seed, divergence, alpha, temperature, beta, chunk) -> None:  # type: ignore[no-untyped-def]
    a = arrays(seed)
    a["labels"][::4] = IGNORE
    config = KDLossConfig(alpha=alpha, temperature=temperature, divergence=divergence, beta=beta, chunk_tokens=chunk)
    terms, grad_hidden, grad_weight = run(a, config)
    kept = (a["labels"] != IGNORE).numpy()
    hidden, weight = a["hidden"].double().numpy()[kept], a["weight"].double().numpy()
    teacher = a["teacher_hidden"].double().numpy()[kept] @ a["teacher_weight"].double().numpy().T
    exact = reference_loss(
        hidden @ weight.T,
        teacher[:, : len(weight)],
        a["labels"].numpy()[kept],
        alpha=alpha,
        temperature=temperature,
        divergence=divergence,
        beta=beta,
    )
    assert abs(float(terms.loss.detach()) - exact.loss) <= 1e-6 * abs(exact.loss)
    full = np.zeros((len(kept), weight.shape[1]))
    full[kept] = exact.grad_logits @ weight
    assert relative(grad_hidden, full) <= 1e-5
    assert relative(grad_weight, exact.grad_logits.T @ hidden) <= 1e-5


def test_reference_gradient_is_the_numerical_derivative() -> None:
    # The reference itself is checked by finite differences, since everything else is checked against it.
    rng = np.random.default_rng(0)
    student, teacher, labels = rng.normal(size=(3, 7)), rng.normal(size=(3, 7)), np.array([1, 0, 6])
    for divergence in DIVERGENCES:
        options = {"alpha": 0.3, "temperature": 1.7, "divergence": divergence, "beta": 0.4}
        exact = reference_loss(student, teacher, labels, **options).grad_logits  # type: ignore[arg-type]
        for index in np.ndindex(student.shape):
            step = np.zeros_like(student)
            step[index] = 1e-6
            up = reference_loss(student + step, teacher, labels, **options).loss  # type: ignore[arg-type]
            down = reference_loss(student - step, teacher, labels, **options).loss  # type: ignore[arg-type]
            assert abs((up - down) / 2e-6 - exact[index]) < 1e-8


def test_masked_positions_and_normalisation() -> None:
    a = arrays(1)
    a["labels"][5:] = IGNORE
    terms, grad_hidden, _ = run(a, KDLossConfig(alpha=0.5, chunk_tokens=2))
    assert torch.all(grad_hidden[5:] == 0)
    halves, _, _ = run(a, KDLossConfig(alpha=0.5, chunk_tokens=2), num_targets=10.0)
    assert float(halves.loss.detach()) == pytest.approx(float(terms.loss.detach()) / 2, rel=1e-12)


def test_nothing_larger_than_a_chunk_of_logits_exists() -> None:
    a = arrays(2, tokens=200, vocab=90)
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, torch.Tensor):
                    sizes.append(tensor.numel())
            return result

    with Watch():
        run(a, KDLossConfig(alpha=0.5, chunk_tokens=16))
    limit = max(16 * (90 + 8), a["weight"].numel(), a["hidden"].numel(), a["teacher_hidden"].numel())
    assert max(sizes) <= limit < 200 * 90
    assert len(sizes) > 100


def test_what_cannot_be_computed_is_refused() -> None:
    a = arrays(3)
    with pytest.raises(ValueError, match="needs a teacher"):
        kd_loss(
            a["hidden"], a["weight"], a["labels"], teacher_hidden=None, teacher_head=None, num_targets=1,
            config=KDLossConfig(alpha=0.5),
        )  # fmt: skip
    with pytest.raises(ValueError, match="no label is unmasked"):
        kd_loss(
            a["hidden"], a["weight"], a["labels"], teacher_hidden=None, teacher_head=None, num_targets=0,
            config=KDLossConfig(alpha=1.0),
        )  # fmt: skip
