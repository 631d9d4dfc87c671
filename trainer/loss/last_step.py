"""The last step from a student's head to its logits: a scale (Granite, Cohere), a cap (Gemma 2), or both.

With z the head's products, ``s = cap * tanh(scale * z / cap)``, so ``ds/dz = scale * (1 - (s / cap)^2)``; without a cap
``s = scale * z``. (Gemma 2: https://arxiv.org/abs/2408.00118, section 2.) Both are made in place, on one chunk at a
time.

Letters in shapes: C tokens of a chunk, V columns.
"""

from torch import Tensor

from q4kd.trainer.loss.config import LastStep


def apply_last_step(products_CV: Tensor, last_step: LastStep) -> Tensor:
    """Make the head's products ``[C, V]`` the logits, in place and in their own type; return them."""
    if not last_step.cap:
        return products_CV if last_step.scale == 1 else products_CV.mul_(last_step.scale)
    return products_CV.mul_(last_step.scale / last_step.cap).tanh_().mul_(last_step.cap)


def slope_of(logits_CV: Tensor, last_step: LastStep, *, in_place: bool = False) -> Tensor | float:
    """Return ds/dz at logits ``[C, V]``: a number without a cap, else ``[C, V]``, which may take the logits' place."""
    if not last_step.cap:
        return last_step.scale
    ratio_CV = logits_CV.div_(last_step.cap) if in_place else logits_CV / last_step.cap
    return ratio_CV.square_().neg_().add_(1).mul_(last_step.scale)


def chain(gradient_CV: Tensor, slope: Tensor | float) -> Tensor:
    """Multiply a gradient with respect to logits by ds/dz, in place; return it: that with respect to the products."""
    return gradient_CV if isinstance(slope, float) and slope == 1 else gradient_CV.mul_(slope)
