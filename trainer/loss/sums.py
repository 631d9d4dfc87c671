"""What every form of the fused loss shares: its result, its sums, and the autograd function that only scales.

Loss and gradients are made in one pass (``fused.py``, ``tiled.py``, ``topk.py``, ``cuda/``), so that backward only
multiplies them by the incoming scalar. Letters in shapes: M tokens, C tokens of a chunk, R columns of a tile, H hidden
size, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from q4kd.trainer.loss.config import IGNORE_INDEX, KDLossConfig

# Rows of the head's gradient that are added to at one time, where a product cannot add them itself.
_SLAB = 8192


@dataclass(frozen=True)
class LossTerms:
    """``loss`` carries the gradient; ``ce`` and ``kd`` (T^2 * D) are its detached parts, all scalars per target."""

    loss: Tensor
    ce: Tensor
    kd: Tensor


@dataclass(frozen=True)
class LossInputs:
    """What the loss is of, detached; ``positions`` are those of the M that have a label. See ``kd_loss``."""

    hidden: Tensor  # [M, H]
    weight: Tensor  # [V, H]
    labels: Tensor  # int64 [M]
    positions: Tensor  # int64 [P], rising
    teacher_hidden: Tensor | None  # [M, H']
    teacher_head: Callable[[Tensor], Tensor] | None


def target_positions(labels_M: Tensor) -> Tensor:
    """Return the positions whose label is not ``IGNORE_INDEX``, int64 ``[P]``, rising.

    Their number is read, so the host waits for labels that are on a device.
    """
    return (labels_M != IGNORE_INDEX).nonzero().squeeze(1)


class LossSums:
    """What a pass over the chunks adds up: the two sums in float64, and the gradients divided by the targets.

    A gradient that nobody asks for is None, and its product is not made. ``grad_hidden_MH`` is float32 (or float64);
    ``grad_weight_VH`` too, unless it is finished ``by_tiles`` and so may have the head's own type.
    """

    def __init__(self, hidden_MH: Tensor, weight_VH: Tensor, num_targets: float, *, by_tiles: bool) -> None:
        self.num_targets = num_targets
        self.ce = torch.zeros((), dtype=torch.float64, device=hidden_MH.device)
        self.kd = torch.zeros_like(self.ce)
        self.grad_hidden_MH = self.grad_weight_VH = None
        if torch.is_grad_enabled() and hidden_MH.requires_grad:
            self.grad_hidden_MH = torch.zeros(hidden_MH.shape, dtype=wide_type(hidden_MH), device=hidden_MH.device)
        if torch.is_grad_enabled() and weight_VH.requires_grad:
            dtype = weight_VH.dtype if by_tiles else wide_type(weight_VH)
            self.grad_weight_VH = torch.empty(weight_VH.shape, dtype=dtype, device=weight_VH.device)
        self._has_weight = False

    @property
    def wanted(self) -> bool:
        """Return whether any gradient is asked for."""
        return self.grad_hidden_MH is not None or self.grad_weight_VH is not None

    def add_terms(self, ce: Tensor, kd: Tensor) -> None:
        """Add a chunk's summed cross-entropy and T^2 * D."""
        self.ce += ce
        self.kd += kd

    def add_gradient(
        self, rows: Tensor, grad_CV: Tensor, hidden_CH: Tensor, weight_VH: Tensor, *, share: float | None = None
    ) -> None:
        """Add the products of a chunk's gradient ``[C, V]`` with respect to the student's logits.

        The gradient is the summed loss's; ``share`` 1 says that it is divided by the targets already.
        """
        share = 1 / self.num_targets if share is None else share
        if self.grad_hidden_MH is not None:
            product_CH = multiply_wide(grad_CV, weight_VH)
            self.grad_hidden_MH[rows] = product_CH if share == 1 else product_CH.mul_(share)
        if self.grad_weight_VH is not None:
            # The first product overwrites what was there: its beta is 0.
            add_product(self.grad_weight_VH, grad_CV.T, hidden_CH, beta=int(self._has_weight), alpha=share)
            self._has_weight = True

    def open_tile(self, columns: slice) -> Tensor | None:
        """Return where the head's gradient of a tile of rows is summed, ``[R, H]``; None if nobody asks for it."""
        if self.grad_weight_VH is None:
            return None
        of_head = self.grad_weight_VH[columns]
        return of_head if of_head.dtype == wide_type(of_head) else torch.empty_like(of_head, dtype=torch.float32)

    def add_tile(
        self,
        rows: Tensor,
        grad_CR: Tensor,
        hidden_CH: Tensor,
        weight_RH: Tensor,
        tile_RH: Tensor | None,
        *,
        first: bool,
        share: float | None = None,
    ) -> None:
        """Add what ``add_gradient`` does, of a tile's columns: ``first`` of the chunks overwrites ``tile_RH``."""
        share = 1 / self.num_targets if share is None else share
        if self.grad_hidden_MH is not None:
            self.grad_hidden_MH.index_add_(0, rows, multiply_wide(grad_CR, weight_RH), alpha=share)
        if tile_RH is not None:
            add_product(tile_RH, grad_CR.T, hidden_CH, beta=int(not first), alpha=share)

    def close_tile(self, columns: slice, tile_RH: Tensor | None) -> None:
        """Round a finished tile of the head's gradient to its type."""
        if self.grad_weight_VH is not None and tile_RH is not None:
            if tile_RH.dtype != self.grad_weight_VH.dtype:
                self.grad_weight_VH[columns] = tile_RH
            self._has_weight = True

    def finish(self) -> None:
        """Make the head's gradient zero where no chunk came."""
        if self.grad_weight_VH is not None and not self._has_weight:
            self.grad_weight_VH.zero_()


def wide_type(tensor: Tensor) -> torch.dtype:
    """Return the type that sums are taken in: float32, or float64 for float64."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in the type that plain torch arithmetic is done in, itself if it has it."""
    return tensor.to(wide_type(tensor))


def multiply_wide(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b`` in the wide type; bfloat16 operands are of a CUDA device."""
    return a @ b if a.dtype == wide_type(a) else torch.mm(a, b, out_dtype=torch.float32)


def add_product(out: Tensor, a: Tensor, b: Tensor, *, beta: int, alpha: float) -> None:
    """Set ``out`` to ``beta * out + alpha * a @ b``, summed in ``out``'s type; bfloat16 operands as above, alpha 1."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=beta, alpha=alpha, out=out)
        return
    assert alpha == 1
    if beta == 0:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    elif _adds_in_float32(out.device):
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        # By slabs whose product stays in the device's cache until it is added.
        for part, rows in zip(torch.split(out, _SLAB), torch.split(a, _SLAB), strict=True):
            part += torch.mm(rows, b, out_dtype=out.dtype)


@cache
def _adds_in_float32(device: torch.device) -> bool:
    """Return whether this torch adds a bfloat16 product to float32 in place; some versions want one type for all."""
    out, a = torch.zeros(8, 8, device=device), torch.zeros(8, 8, dtype=torch.bfloat16, device=device)
    try:
        torch.addmm(out, a, a, out_dtype=torch.float32, out=out)
    except RuntimeError:
        return False
    return True


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
        sums.finish()
        ctx.gradients = sums.grad_hidden_MH, sums.grad_weight_VH
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
    hidden_MH: Tensor,
    weight_VH: Tensor,
    num_targets: float,
    config: KDLossConfig,
    compute: Callable[[LossSums], None],
    *,
    by_tiles: bool = False,
) -> LossTerms:
    """Run ``compute`` under autograd and return the terms, mixed by ``config.alpha``.

    Args:
        hidden_MH: student hidden states ``[M, H]``.
        weight_VH: student head ``[V, H]``.
        num_targets: divisor of both sums, > 0.
        config: the equation's knobs.
        compute: fills the sums and those gradients that are not None.
        by_tiles: whether ``compute`` writes the head's gradient tile by tile.

    Raises:
        ValueError: when ``num_targets`` is not positive.
    """
    if not num_targets > 0:
        raise ValueError(f"num_targets must be positive, got {num_targets}: no label is unmasked")
    sums = LossSums(hidden_MH, weight_VH, num_targets, by_tiles=by_tiles)
    apply: Callable[..., tuple[Tensor, Tensor, Tensor]] = _FusedLoss.apply
    return LossTerms(*apply(hidden_MH, weight_VH, compute, sums, config.alpha))
