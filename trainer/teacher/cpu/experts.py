"""A mixture of experts on the CPU: tokens sorted by expert, experts one after another over their packed slices.

Letters in shapes: M tokens, H hidden size, E experts, F feed-forward size of an expert, C experts of a token, n tokens
of one expert.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from q4kd.trainer.teacher.cpu.weights import Matrix

# Takes gate and up, both ``[n, F]``, which it may overwrite, and returns what the down matrix is given.
Gated = Callable[[Tensor, Tensor], Tensor]


class Biases(NamedTuple):
    """What is added to the products of a layer's experts, float32.

    Attributes:
        router: ``[E]``.
        gate, up: ``[E, F]``.
        down: ``[E, H]``.
    """

    router: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


@dataclass(frozen=True)
class Experts:
    """The feed-forward of a layer with experts.

    Attributes:
        router: ``[E, H]``.
        gate, up: ``[E * F, H]``, the rows of one expert after those of another; without ``up`` the gate holds both,
            ``[E * 2 F, H]``, the rows of an expert's up behind those of its gate.
        down: ``[E * H, F]``.
        count: E.
        per_token: C.
        biases: None for a family without.
    """

    router: Matrix
    gate: Matrix
    up: Matrix | None
    down: Matrix
    count: int
    per_token: int
    biases: Biases | None = None

    def choose(self, normed_MH: Tensor) -> tuple[Tensor, Tensor]:
        """Return what ``route`` does, of float32 normalised states."""
        logits_ME = self.router.product(normed_MH)
        return route(logits_ME if self.biases is None else logits_ME.add_(self.biases.router), self.per_token)


def route(logits_ME: Tensor, per_token: int) -> tuple[Tensor, Tensor]:
    """Choose the experts of every token: those of the largest softmax over all, whose shares are made to sum to one.

    The sum of the chosen shares is at least C / E, so nothing has to guard the division. gpt-oss defines its weights as
    a softmax over the chosen logits alone: that is the same function, since the sum over all divides out.

    Args:
        logits_ME: products of tokens and router, float32.
        per_token: C.

    Returns:
        Numbers of the chosen experts, int64 ``[M, C]``, and their weights, float32 ``[M, C]``.
    """
    shares_MC, chosen_MC = torch.softmax(logits_ME, dim=-1).topk(per_token, dim=-1)
    return chosen_MC, shares_MC / shares_MC.sum(dim=-1, keepdim=True)


def expert_products(x_MH: Tensor, chosen_MC: Tensor, weights_MC: Tensor, experts: Experts, gated: Gated) -> Tensor:
    """Return the weighted sum of the chosen experts' outputs, float32 ``[M, H]``.

    Every token is given to all of its experts, however many tokens an expert gets; the weights of an expert that gets
    none are not decoded. A token's experts are added in the order of their numbers.

    Args:
        x_MH: normalised states in the compute dtype.
        chosen_MC, weights_MC: as ``route`` returns them.
        experts: the weights.
        gated: what an expert makes of its two first products.
    """
    per_token = chosen_MC.shape[1]
    places = chosen_MC.flatten().argsort(stable=True)
    counts = torch.bincount(chosen_MC.flatten(), minlength=experts.count).tolist()
    out_MH = torch.zeros(x_MH.shape, dtype=torch.float32)
    start = 0
    for expert, count in enumerate(counts):
        if count:
            places_n = places[start : start + count]
            tokens_n, weights_n1 = places_n // per_token, weights_MC.flatten()[places_n, None]
            part_nH = _expert(x_MH.index_select(0, tokens_n), expert, experts, gated).float()
            out_MH.index_add_(0, tokens_n, part_nH.mul_(weights_n1))
        start += count
    return out_MH


def _expert(x_nH: Tensor, expert: int, experts: Experts, gated: Gated) -> Tensor:
    """Return the output of one expert, ``[n, H]`` in the dtype of ``x_nH``."""
    biases = experts.biases

    def product(matrix: Matrix, x: Tensor, bias: Tensor | None) -> Tensor:
        rows = matrix.rows // experts.count
        out = matrix.part(expert * rows, (expert + 1) * rows).product(x)
        return out if bias is None else out.add_(bias[expert])

    gate_nF = product(experts.gate, x_nH, biases and biases.gate)
    if experts.up is None:  # no family has biases here
        gate_nF, up_nF = (half.contiguous() for half in gate_nF.chunk(2, dim=-1))
    else:
        up_nF = product(experts.up, x_nH, biases and biases.up)
    return product(experts.down, gated(gate_nF, up_nF), biases and biases.down)
