"""The expert of a mixture that every token is given to: a feed-forward times the sigmoid of a product (Qwen3.5).

Letters in shapes: M tokens, H hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from q4kd.trainer.teacher.cpu.experts import Gated
from q4kd.trainer.teacher.cpu.weights import Matrix


@dataclass(frozen=True)
class SharedExpert:
    """Its matrices, ``[F, H]`` and ``[H, F]``, and what its gate is the product with, float32 ``[H]``."""

    gate: Matrix
    up: Matrix
    down: Matrix
    token_gate_H: Tensor

    def add_to(self, out_MH: Tensor, normed_MH: Tensor, dtype: torch.dtype, gated: Gated) -> None:
        """Add its gated output to ``out_MH``, in place.

        Args:
            out_MH: float32.
            normed_MH: normalised states, float32.
            dtype: of the matrix products; the gate is computed in float32.
            gated: what the feed-forward makes of its two first products.
        """
        x_MH = normed_MH.to(dtype)
        gated_MF = gated(self.gate.product(x_MH), self.up.product(x_MH))
        shares_M1 = torch.sigmoid(normed_MH @ self.token_gate_H).unsqueeze(-1)
        out_MH.addcmul_(self.down.product(gated_MF).float(), shares_M1)


def build_shared_expert(prefix: str, matrix: Callable[[str], Matrix], vector: Callable[[str], Tensor]) -> SharedExpert:
    """Arrange the tensors of a layer's, whose names begin with ``prefix``."""
    gate, up, down = (matrix(f"{prefix}ffn_{name}_shexp.weight") for name in ("gate", "up", "down"))
    return SharedExpert(gate, up, down, vector(prefix + "ffn_gate_inp_shexp.weight"))
