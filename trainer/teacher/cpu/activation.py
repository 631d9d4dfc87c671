"""What a gated feed-forward makes of its gate and of the product beside it.

Letters in shapes: M tokens, F feed-forward size.
"""

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from q4kd.trainer.formats.families import Activation

# gpt-oss's constants: https://github.com/openai/gpt-oss, gpt_oss/torch/model.py, swiglu.
SWIGLU_LIMIT, SWIGLU_SLOPE = 7.0, 1.702


def activate(gate: Tensor, activation: Activation) -> Tensor:
    """Return the gate's activation: SiLU, in place, or GELU by its tanh formula (https://arxiv.org/abs/1606.08415)."""
    return F.silu(gate, inplace=True) if activation == "silu" else F.gelu(gate, approximate="tanh")


def gated_product(gate_MF: Tensor, up_MF: Tensor, activation: Activation) -> Tensor:
    """Return what the down matrix is given, ``[M, F]`` of the inputs' dtype: ``act(gate) * up``, or ``clamped_swiglu``.

    Both inputs may be overwritten.
    """
    if activation == "clamped_swiglu":
        return clamped_swiglu(gate_MF, up_MF)
    return activate(gate_MF, activation).mul_(up_MF)


def clamped_swiglu(gate_MF: Tensor, up_MF: Tensor) -> Tensor:
    """Return ``g sigmoid(1.702 g) (u + 1)``, where g is the gate, 7 at most, and u the other, from -7 to 7.

    It is computed in float32 and rounded once to the inputs' dtype; float32 inputs are overwritten.
    """
    gate, up = gate_MF.float().clamp_(max=SWIGLU_LIMIT), up_MF.float().clamp_(-SWIGLU_LIMIT, SWIGLU_LIMIT)
    share = torch.mul(gate, SWIGLU_SLOPE).sigmoid_()
    return share.mul_(gate).mul_(up.add_(1)).to(gate_MF.dtype)
