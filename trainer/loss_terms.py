"""What every form of the fused loss shares: its knobs, its result, and the autograd function that only scales.

Loss and gradients are made in one pass (``kd_loss.py``, ``loss_low.py``, ``loss_topk.py``, ``cuda/loss.py``), so that
backward multiplies them by the incoming scalar and makes nothing. Letters in shapes: M tokens, C tokens of a chunk,
H hidden size, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

IGNORE = -100
Divergence = Literal["forward_kl", "reverse_kl", "jsd"]
DIVERGENCES: tuple[Divergence, ...] = ("forward_kl", "reverse_kl", "jsd")
Mode = Literal["fast", "low"]
MODES: tuple[Mode, ...] = ("fast", "low")

# Bytes that a chunk's float32 [C, V] tensors may take together on the CPU, and how many of them live at one time.
_CPU_CHUNK_BYTES = 512 << 20
_CPU_LIVE = 6
_CPU_MAX_CHUNK = 1024


@dataclass(frozen=True, kw_only=True)
class KDLossConfig:
    """Knobs of the equation in ``kd_loss.py``.

    Attributes:
        alpha: weight of the cross-entropy, in [0, 1]; 1 needs no teacher.
        temperature: divides both logits; > 0.
        divergence: which D.
        beta: the mixture weight of ``jsd``, in (0, 1).
        mode: ``fast`` makes a chunk's logits over the whole vocabulary; ``low`` a tile of it at a time, twice.
        chunk_tokens: C, the tokens whose logits exist at one time; 0 chooses (``chunk_for``).
        vocab_tile: columns of logits that exist at one time in ``low``; 0 chooses.
    """

    alpha: float = 0.5
    temperature: float = 1.0
    divergence: Divergence = "forward_kl"
    beta: float = 0.5
    mode: Mode = "fast"
    chunk_tokens: int = 0
    vocab_tile: int = 0

    def chunk_for(self, vocab: int) -> int:
        """Return C for plain torch arithmetic: as set, else up to 1,024, six float32 ``[C, V]`` in 512 MiB."""
        return self.chunk_tokens or max(1, min(_CPU_MAX_CHUNK, _CPU_CHUNK_BYTES // (4 * _CPU_LIVE * vocab)))


@dataclass(frozen=True)
class LossTerms:
    """``loss`` carries the gradient; ``ce`` and ``kd`` (T^2 * D) are its detached parts, all scalars per target."""

    loss: Tensor
    ce: Tensor
    kd: Tensor


class LossSums:
    """What a pass over the chunks adds up: the two sums in float64, the gradients in float32 (or float64).

    A gradient that nobody asks for is None, and its product is not made.

    Args:
        hidden_MH: the student's hidden states.
        weight_VH: the student's head.
        num_targets: divisor of the sums and of both gradients.
    """

    def __init__(self, hidden_MH: Tensor, weight_VH: Tensor, num_targets: float) -> None:
        self.num_targets = num_targets
        self.ce = torch.zeros((), dtype=torch.float64, device=hidden_MH.device)
        self.kd = torch.zeros_like(self.ce)
        self.hidden_MH = _zeros(hidden_MH) if _is_wanted(hidden_MH) else None
        self.weight_VH = _zeros(weight_VH) if _is_wanted(weight_VH) else None

    @property
    def wanted(self) -> bool:
        """Whether any gradient is asked for."""
        return self.hidden_MH is not None or self.weight_VH is not None

    def add_terms(self, ce: Tensor, kd: Tensor) -> None:
        """Add a chunk's summed cross-entropy and T^2 * D."""
        self.ce += ce
        self.kd += kd

    def add_gradient(self, rows: Tensor, grad_CV: Tensor, hidden_CH: Tensor, weight_VH: Tensor) -> None:
        """Add the products of a chunk's gradient ``[C, V]`` of the summed loss with respect to the student's logits."""
        share = 1 / self.num_targets
        if self.hidden_MH is not None:
            self.hidden_MH[rows] = (grad_CV @ weight_VH).mul_(share)
        if self.weight_VH is not None:
            self.weight_VH.addmm_(grad_CV.T, hidden_CH, alpha=share)


def _is_wanted(tensor: Tensor) -> bool:
    return tensor.requires_grad and torch.is_grad_enabled()


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor as the float type that plain torch arithmetic is done in: float32, or float64 as it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _zeros(like: Tensor) -> Tensor:
    dtype = like.dtype if like.dtype == torch.float64 else torch.float32
    return torch.zeros(like.shape, dtype=dtype, device=like.device)


class _FusedLoss(torch.autograd.Function):
    """Runs ``compute``, which makes loss and gradients in one pass; backward scales the gradients, once."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MH: Tensor,
        weight_VH: Tensor,
        compute: Callable[[LossSums], None],
        sums: LossSums,
        alpha: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Autocast would round the float32 products and sums to bfloat16.
        with torch.autocast(hidden_MH.device.type, enabled=False):
            compute(sums)
        ctx.gradients = sums.hidden_MH, sums.weight_VH
        ctx.dtypes = hidden_MH.dtype, weight_VH.dtype
        ce, kd = sums.ce / sums.num_targets, sums.kd / sums.num_targets
        ctx.mark_non_differentiable(ce, kd)
        return alpha * ce + (1 - alpha) * kd, ce, kd

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the fused loss holds its gradients once: backward was called a second time")
        gradients, ctx.gradients = ctx.gradients, None
        scaled = (_scale(gradient, grad_loss, dtype) for gradient, dtype in zip(gradients, ctx.dtypes, strict=True))
        return *scaled, None, None, None


def _scale(gradient: Tensor | None, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
    if gradient is None:
        return None
    factor = factor.to(gradient.dtype)
    if gradient.dtype == dtype:
        return gradient.mul_(factor)
    # One pass: read in float32, multiplied, rounded once.
    return torch.mul(gradient, factor, out=torch.empty(gradient.shape, dtype=dtype, device=gradient.device))


def fused_loss(
    hidden_MH: Tensor, weight_VH: Tensor, num_targets: float, alpha: float, compute: Callable[[LossSums], None]
) -> LossTerms:
    """Run ``compute`` under autograd and return the terms.

    Args:
        hidden_MH: student hidden states ``[M, H]``.
        weight_VH: student head ``[V, H]``.
        num_targets: divisor of both sums, > 0.
        alpha: weight of the cross-entropy.
        compute: fills the sums and those gradients that are not None.

    Raises:
        ValueError: when ``num_targets`` is not positive.
    """
    if num_targets <= 0:
        raise ValueError(f"num_targets must be positive, got {num_targets}: no label is unmasked")
    sums = LossSums(hidden_MH, weight_VH, num_targets)
    apply: Callable[..., tuple[Tensor, Tensor, Tensor]] = _FusedLoss.apply
    return LossTerms(*apply(hidden_MH, weight_VH, compute, sums, alpha))
