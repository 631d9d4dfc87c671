"""Experts beside a dense feed-forward on the CPU (Gemma 4): both read a layer's states, and their outputs are added.

Each part has norms of its own, before and behind, and so has the router, whose norm has a weight for each element and
is divided by the root of the hidden size. transformers' ``Gemma4TextDecoderLayer`` and llama.cpp's
``src/models/gemma4.cpp`` do the same.

Letters in shapes: M tokens, H hidden size, E experts.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from q4kd.trainer.teacher.cpu.experts import Experts, Gated, expert_products
from q4kd.trainer.teacher.cpu.weights import Matrix


@dataclass(frozen=True)
class DenseAndExperts:
    """The feed-forward of such a layer; vectors are float32.

    Attributes:
        gate, up, down: matrices of the dense part, whose norm before it is the layer's.
        dense_post_norm: ``[H]``, behind the dense part.
        experts: the router and the experts' matrices.
        router_scale: ``[H]``, the weight of the router's norm, over the root of H.
        experts_norm, experts_post_norm: ``[H]``, before and behind the experts.
        expert_scales: ``[E]``, what each expert's output is multiplied by beside its token's weight.
    """

    gate: Matrix
    up: Matrix
    down: Matrix
    dense_post_norm: Tensor
    experts: Experts
    router_scale: Tensor
    experts_norm: Tensor
    experts_post_norm: Tensor
    expert_scales: Tensor

    def add_experts(self, dense_MH: Tensor, x_MH: Tensor, eps: float, dtype: torch.dtype, gated: Gated) -> Tensor:
        """Return the sum of both parts, each normalised, float32 ``[M, H]``.

        Args:
            dense_MH: output of the dense part.
            x_MH: states behind attention, not normalised, float32.
            eps: what the norms add to a mean square.
            dtype: of the experts' products; the router's are float32.
            gated: what an expert makes of its two first products.
        """

        def norm(part_MH: Tensor, weight: Tensor) -> Tensor:
            return F.rms_norm(part_MH.float(), (part_MH.shape[-1],), weight, eps)

        sum_MH = norm(dense_MH, self.dense_post_norm)
        chosen_MC, weights_MC = self.experts.choose(norm(x_MH, self.router_scale))
        weights_MC = weights_MC * self.expert_scales[chosen_MC]
        states_MH = norm(x_MH, self.experts_norm).to(dtype)
        mixed_MH = expert_products(states_MH, chosen_MC, weights_MC, self.experts, gated)
        return sum_MH.add_(norm(mixed_MH, self.experts_post_norm))
