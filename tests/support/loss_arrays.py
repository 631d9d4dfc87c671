"""Inputs of the fused loss, and its dense float64 twin."""

import numpy as np
import torch

from q4kd.harness.oracles.reference import reference_loss
from q4kd.trainer.loss.config import IGNORE_INDEX, KDLossConfig, LastStep

# What students do to their head's products: nothing, Granite's division, Gemma 2's cap, and both.
LAST_STEPS = (LastStep(), LastStep(0.125), LastStep(cap=3.0), LastStep(2.5, 4.0))


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


def relative(found: object, exact: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(found) - exact) / np.linalg.norm(exact))


def last_step(products: np.ndarray, step: LastStep) -> tuple[np.ndarray, np.ndarray]:
    """Logits of products, and their derivative, in float64 and by another formula than the trainer's."""
    if not step.cap:
        return step.scale * products, np.full_like(products, step.scale)
    ratio = step.scale * products / step.cap
    return step.cap * np.tanh(ratio), step.scale / np.cosh(ratio) ** 2


def exact_loss(a: dict[str, torch.Tensor], config: KDLossConfig, products: torch.dtype = torch.float64):  # type: ignore[no-untyped-def]
    """The dense float64 loss, of logits made in ``products``, and its gradients for hidden states and head."""
    kept = (a["labels"] != IGNORE_INDEX).numpy()
    hidden, weight = a["hidden"].double().numpy()[kept], a["weight"].double().numpy()
    teacher = (a["teacher_hidden"][kept].to(products) @ a["teacher_weight"].to(products).T).double().numpy()
    student = (a["hidden"][kept].to(products) @ a["weight"].to(products).T).double().numpy()
    logits, slope = last_step(student, config.last_step)
    exact = reference_loss(
        logits,
        teacher[:, : len(weight)],
        a["labels"].numpy()[kept],
        alpha=config.alpha,
        temperature=config.temperature,
        divergence=config.divergence,
        beta=config.beta,
    )
    full = np.zeros((len(kept), weight.shape[1]))
    of_products = exact.grad_logits * slope
    full[kept] = of_products @ weight
    return exact, full, of_products.T @ hidden
