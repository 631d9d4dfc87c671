"""A gated delta net on the CPU: projections, a short convolution, the delta rule, and a gated norm of what was read.

The equations are those of ``delta_rule.py`` with, for each token and head (transformers' ``Qwen3_5GatedDeltaNet``)::

    q, k, v = silu(convolution(qkv))    q, k of unit length
    g = -exp(A) softplus(alpha + dt)    the file holds -exp(A)
    beta = sigmoid(beta)                out = RMSNorm(o) * silu(z)

Letters in shapes: B sequences, T positions, M = B * T tokens, H hidden size, X channels of the convolution, W taps,
K key heads, V value heads, D head size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from q4kd.trainer.formats.recurrence import Recurrence
from q4kd.trainer.teacher.cpu.weights import Matrix
from q4kd.trainer.teacher.delta_rule import delta_rule, short_convolution, unit_heads


@dataclass(frozen=True)
class DeltaNet:
    """What a recurrent layer has beside the projections to queries, keys and values and back to the stream.

    Attributes:
        sizes: of its heads.
        gate: z, ``[V * D, H]``.
        alpha, beta: ``[V, H]``.
        taps_WX: of the convolution, float32.
        dt_V: added to alpha, float32.
        decay_V: ``-exp(A)``, float32, at most 0.
        norm_D: float32.
    """

    sizes: Recurrence
    gate: Matrix
    alpha: Matrix
    beta: Matrix
    taps_WX: Tensor
    dt_V: Tensor
    decay_V: Tensor
    norm_D: Tensor


def build_delta_net(
    prefix: str, sizes: Recurrence, matrix: Callable[..., Matrix], vector: Callable[[str], Tensor], taps_WX: Tensor
) -> DeltaNet:
    """Arrange a layer's tensors, whose names begin with ``prefix``.

    Decays add up over thousands of tokens, so that what they are made of is multiplied in float32 whatever the dtype.
    """
    return DeltaNet(
        sizes,
        gate=matrix(prefix + "attn_gate.weight"),
        alpha=matrix(prefix + "ssm_alpha.weight", torch.float32),
        beta=matrix(prefix + "ssm_beta.weight", torch.float32),
        taps_WX=taps_WX,
        dt_V=vector(prefix + "ssm_dt.bias"),
        decay_V=vector(prefix + "ssm_a"),
        norm_D=vector(prefix + "ssm_norm.weight"),
    )


def mix(net: DeltaNet, qkv_MX: Tensor, x_MH: Tensor, batch: int, starts_BT: Tensor | None, eps: float) -> Tensor:
    """Return what the heads read, normalised and gated, float32 ``[M, V * D]``.

    Args:
        net: the layer.
        qkv_MX: its product with queries, keys and values, float32.
        x_MH: normalised states, in the compute dtype; alpha and beta are products in float32 whatever it is.
        batch: B.
        starts_BT: int64 first position of each position's document; None where a row is one document.
        eps: of the norm.
    """
    wide_MH = x_MH.float()
    beta_MV = torch.sigmoid_(net.beta.product(wide_MH).float())
    decay_MV = decays(net.alpha.product(wide_MH).float(), net.dt_V, net.decay_V)
    del wide_MH
    z_MVD = net.gate.product(x_MH).float().view(len(x_MH), -1, net.sizes.head_dim)
    out_MVD = torch.empty_like(z_MVD)
    length = len(x_MH) // batch
    for row in range(batch):
        tokens, starts = slice(row * length, (row + 1) * length), None if starts_BT is None else starts_BT[row, None]
        decay, beta = decay_MV[None, tokens], beta_MV[None, tokens]
        read_TVD = _read(net, qkv_MX[None, tokens], decay, beta, starts)[0]
        out_MVD[tokens] = F.rms_norm(read_TVD, (net.sizes.head_dim,), net.norm_D, eps)
    return out_MVD.mul_(F.silu(z_MVD, inplace=True)).flatten(1)


def _read(net: DeltaNet, qkv_1TX: Tensor, decay: Tensor, beta: Tensor, starts_1T: Tensor | None) -> Tensor:
    """Return what the heads read of one sequence, ``[1, T, V, D]``; the rest is gone when it returns."""
    mixed_1TX = F.silu(short_convolution(qkv_1TX, net.taps_WX, starts_1T), inplace=True)
    q, k, v = split_heads(mixed_1TX, net.sizes)
    return delta_rule(unit_heads(q), unit_heads(k), v, decay, beta, starts_1T)


def decays(alpha_MV: Tensor, dt_V: Tensor, decay_V: Tensor) -> Tensor:
    """Return g, the logarithm of what a state keeps at each token, float32 ``[M, V]``."""
    return F.softplus(alpha_MV + dt_V).mul_(decay_V)


def split_heads(mixed_BTX: Tensor, sizes: Recurrence) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries and keys, ``[B, T, K, D]`` each, and values, ``[B, T, V, D]``."""
    parts = torch.split(mixed_BTX, [sizes.key_size, sizes.key_size, sizes.value_size], dim=-1)
    q_BTKD, k_BTKD, v_BTVD = (part.view(*part.shape[:2], -1, sizes.head_dim) for part in parts)
    return q_BTKD, k_BTKD, v_BTVD
