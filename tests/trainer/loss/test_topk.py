"""The loss against a cached teacher: a dense float64 reference over the k + 1 events, the bound, what is refused."""

from typing import Any

import pytest
import torch
from loss_arrays import LAST_STEPS
from torch import Tensor

from q4kd.trainer.loss.config import DIVERGENCES, IGNORE_INDEX, KDLossConfig, LastStep
from q4kd.trainer.loss.fused import kd_loss
from q4kd.trainer.loss.topk import topk_kd_loss

TOKENS, HIDDEN, VOCAB = 13, 8, 50


def make(seed: int, k: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    teacher = 2 * torch.randn(TOKENS, VOCAB, generator=generator, dtype=torch.float64)
    log_p, ids = torch.log_softmax(teacher, 1).topk(k, 1)
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    labels[::4] = IGNORE_INDEX
    rest = torch.log_softmax(teacher, 1).scatter(1, ids, -torch.inf).logsumexp(1)
    return {
        "hidden": torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype),
        "weight": (0.7 * torch.randn(VOCAB, HIDDEN, generator=generator)).to(dtype),
        "labels": labels,
        "teacher": teacher,
        "ids": ids,
        "log_p": log_p.float(),
        "tail": rest.float(),
    }


def run(a: dict[str, Tensor], config: KDLossConfig, **changed: Any) -> tuple[Any, Tensor, Tensor]:
    a = a | changed
    hidden, weight = a["hidden"].clone().requires_grad_(), a["weight"].clone().requires_grad_()
    terms = topk_kd_loss(
        hidden,
        weight,
        a["labels"],
        topk_ids_MK=a["ids"],
        topk_log_probs_MK=a["log_p"],
        tail_log_prob_M=a["tail"],
        num_targets=float((a["labels"] != IGNORE_INDEX).sum()),
        config=config,
    )
    terms.loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return terms, hidden.grad, weight.grad


def dense(a: dict[str, Tensor], config: KDLossConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Float64, by autograd, over explicit event probabilities: no formula of the trainer's."""
    hidden, weight = a["hidden"].double().requires_grad_(), a["weight"].double().requires_grad_()
    kept = a["labels"] != IGNORE_INDEX
    products, step = hidden[kept] @ weight.T, config.last_step
    capped = step.cap * torch.tanh(step.scale * products / step.cap) if step.cap else step.scale * products
    q_all = torch.softmax(capped, 1)
    ids = a["ids"][kept].long()
    listed = torch.zeros_like(q_all).scatter(1, ids, 1.0)
    q = torch.cat([q_all.gather(1, ids), (q_all * (1 - listed)).sum(1, keepdim=True)], 1)
    p = torch.cat([a["log_p"][kept].double().exp(), a["tail"][kept].double().exp().unsqueeze(1)], 1)
    p = p / p.sum(1, keepdim=True)

    def kl(x: Tensor, y: Tensor) -> Tensor:
        return (torch.xlogy(x, x) - torch.xlogy(x, y)).sum()

    mixture = config.beta * p + (1 - config.beta) * q
    value = {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: config.beta * kl(p, mixture) + (1 - config.beta) * kl(q, mixture),
    }[config.divergence]()
    ce = -q_all.gather(1, a["labels"][kept].unsqueeze(1)).log().sum()
    loss = (config.alpha * ce + (1 - config.alpha) * value) / kept.sum()
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return loss.detach(), hidden.grad, weight.grad


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("k", "chunk"), [(1, 5), (7, 1), (VOCAB - 1, 0)])
@pytest.mark.parametrize("last_step", LAST_STEPS, ids=str)
def test_loss_and_gradients_are_the_dense_float64_ones(
    divergence: Any, alpha: float, k: int, chunk: int, last_step: LastStep
) -> None:
    a = make(k, k)
    config = KDLossConfig(alpha=alpha, divergence=divergence, beta=0.3, chunk_tokens=chunk, last_step=last_step)
    terms, grad_hidden, grad_weight = run(a, config)
    loss, want_hidden, want_weight = dense(a, config)
    assert abs(float(terms.loss.detach()) - float(loss)) <= 1e-5 * abs(float(loss))
    assert relative(grad_hidden, want_hidden) <= 1e-5
    assert relative(grad_weight, want_weight) <= 1e-5


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_it_is_a_lower_bound_that_grows_with_k_up_to_the_full_divergence(divergence: Any) -> None:
    config = KDLossConfig(alpha=0.0, divergence=divergence)
    a = make(3, 1)
    eye = torch.eye(VOCAB)
    full = float(
        kd_loss(
            a["hidden"],
            a["weight"],
            a["labels"],
            teacher_hidden=a["teacher"].float(),
            teacher_head=lambda rows: rows @ eye,
            num_targets=float((a["labels"] != IGNORE_INDEX).sum()),
            config=config,
        ).kd
    )
    values = [float(run(make(3, k), config)[0].kd) for k in (1, 4, 16, VOCAB - 1)]
    assert 0 < values[0] < values[1] < values[2] < full
    assert values[3] == pytest.approx(full, rel=1e-5)
    whole = make(3, VOCAB)
    assert torch.isinf(whole["tail"]).all()
    terms, grad_hidden, _ = run(whole, config)
    assert float(terms.kd) == pytest.approx(full, rel=1e-5)
    assert grad_hidden.isfinite().all()


def test_a_teacher_that_is_the_student_costs_nothing() -> None:
    a = make(4, 6)
    log_q = torch.log_softmax(a["hidden"] @ a["weight"].T, 1)
    log_p, ids = log_q.topk(6, 1)
    a |= {"ids": ids.int(), "log_p": log_p, "tail": log_q.scatter(1, ids, -torch.inf).logsumexp(1)}
    terms, grad_hidden, grad_weight = run(a, KDLossConfig(alpha=0.0))
    assert abs(float(terms.kd)) < 1e-7
    assert grad_hidden.abs().max() < 1e-6
    assert grad_weight.abs().max() < 1e-6


def test_bfloat16_students_get_bfloat16_gradients_summed_in_float32() -> None:
    a = make(5, 6, torch.bfloat16)
    config = KDLossConfig(alpha=0.3, chunk_tokens=2)
    terms, grad_hidden, grad_weight = run(a, config)
    loss, want_hidden, want_weight = dense(a, config)
    assert grad_hidden.dtype == grad_weight.dtype == torch.bfloat16
    assert abs(float(terms.loss.detach()) - float(loss)) <= 1e-5 * float(loss)
    assert relative(grad_hidden, want_hidden) <= 2**-8
    assert relative(grad_weight, want_weight) <= 2**-8


def test_what_is_no_signal_is_refused() -> None:
    a, config = make(6, 5), KDLossConfig(alpha=0.5)
    with pytest.raises(ValueError, match="temperature 1, got temperature 2"):
        run(a, KDLossConfig(temperature=2.0))
    with pytest.raises(ValueError, match=r"0 to 49, got \d to 50"):
        run(a, config, ids=a["ids"].clone().index_fill_(1, torch.tensor([2]), VOCAB))
    with pytest.raises(ValueError, match="repeated"):
        run(a, config, ids=a["ids"][:, :1].expand(-1, 5))
    with pytest.raises(ValueError, match="sum of 1"):
        run(a, config, tail=torch.zeros(TOKENS))
    with pytest.raises(ValueError, match="sum of 1"):
        run(a, config, log_p=a["log_p"] * torch.nan)
    with pytest.raises(ValueError, match="no label is unmasked"):
        run(a, config, labels=torch.full((TOKENS,), IGNORE_INDEX))


def test_nothing_larger_than_a_chunk_of_logits_exists() -> None:
    a, sizes = make(7, 5), []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = function(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, Tensor))
            return result

    with Watch():
        run(a, KDLossConfig(alpha=0.5, chunk_tokens=3))
    assert max(sizes) == a["weight"].numel() < TOKENS * VOCAB
