"""A gated delta net on a CUDA device; the equations are those of ``cpu/recurrent.py`` and ``delta_rule.py``.

Projections are cuBLAS products of decoded weights, as of an attention. What lies between them is float32: one kernel
for the convolution, its activation and the heads' lengths, one for the gated norm (``src/states.cu``), and torch's
operations for the delta rule, whose products are batched ones of cuBLAS with TF32 off, as are its triangular systems.
They take 164 thousand FLOP for each token, value head of 128 elements and layer (``rule_flop``), which is 0.16 G of 6 G
for a token of Qwen3.6-35B-A3B (30 recurrent layers of 32 heads).

Letters in shapes: B sequences, T positions, M = B * T tokens, X channels of the convolution, W taps, V value heads, D
head size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from q4kd.trainer.formats.recurrence import Recurrence
from q4kd.trainer.teacher.cpu.recurrent import decays, split_heads
from q4kd.trainer.teacher.delta_rule import CHUNK, UNIT_EPS, delta_rule

if TYPE_CHECKING:
    from q4kd.trainer.kernels.state_kernels import StateKernels
    from q4kd.trainer.teacher.cuda.weights import DeviceTensor, Group

# Systems of so many bytes are solved at once, before the states go through their chunks one after another.
RUN_BYTES = 256 << 20
# Sequences are taken together up to so many tokens.
STATE_TOKENS = 8192


@dataclass(frozen=True)
class DeltaNet:
    """What a recurrent layer has beside its two projections to and from the heads.

    Attributes:
        sizes: of its heads.
        steps: alpha and beta, ``[2 * V, H]``, whose products are float32.
        taps_WX, dt_V, decay_V, norm_D: as in ``cpu.recurrent.DeltaNet``, float32.
    """

    sizes: Recurrence
    steps: "Group"
    taps_WX: Tensor
    dt_V: Tensor
    decay_V: Tensor
    norm_D: Tensor


def build_delta_net(
    prefix: str,
    sizes: Recurrence,
    group: Callable[..., "Group"],
    vector: Callable[[str], Tensor],
    taps_XW: Tensor,
) -> DeltaNet:
    """Arrange a layer's tensors, whose names begin with ``prefix``."""
    return DeltaNet(
        sizes,
        steps=group(prefix + "ssm_alpha.weight", prefix + "ssm_beta.weight"),
        taps_WX=taps_XW.T.contiguous(),
        dt_V=vector(prefix + "ssm_dt.bias"),
        decay_V=vector(prefix + "ssm_a"),
        norm_D=vector(prefix + "ssm_norm.weight"),
    )


def decode_taps(tensor: "DeviceTensor", decode: Callable[..., None]) -> Tensor:
    """Return a convolution's taps, float32 ``[X, W]``."""
    taps_XW = torch.empty(tensor.shape, dtype=torch.float32, device=tensor.packed.device)
    decode(tensor.type, tensor.packed, 0, *tensor.shape, taps_XW)
    return taps_XW


def rule_flop(sizes: Recurrence) -> int:
    """Return the FLOP that the delta rule takes for a token: C positions of a chunk at a time."""
    chunk, size = CHUNK, sizes.head_dim
    # Keys with keys, queries with keys, weights with corrections, and half of the system for both of its sides.
    within = 2 * chunk * size * 3 + chunk * 2 * size
    through = 2 * size * size * 3  # what corrections and queries read of the state, and what it is given
    return sizes.value_heads * (within + through)


def chunk_bytes(sizes: Recurrence, batch: int) -> int:
    """Return the bytes that a chunk of B sequences takes while its systems are made and solved.

    torch's solver takes two copies of the right-hand side of twice a head, as measured on an H200.
    """
    return batch * sizes.value_heads * 4 * CHUNK * (5 * CHUNK + 12 * sizes.head_dim)


def recurrent_bytes(sizes: Recurrence, batch: int, length: int) -> int:
    """Return the bytes that a recurrent layer takes at its peak between its two projections.

    Convolved channels, what heads read, and the parts and systems of the chunks that are solved at once.
    """
    rows = min(batch, max(1, STATE_TOKENS // length))
    chunks = -(-length // CHUNK)
    at_once = min(chunks, max(1, RUN_BYTES // chunk_bytes(sizes, rows)))
    tokens = rows * length
    return 4 * tokens * (sizes.conv_size + sizes.value_size + 2 * sizes.value_heads) + at_once * chunk_bytes(
        sizes, rows
    )


def read_states(
    kernels: "StateKernels",
    net: DeltaNet,
    qkvz: Tensor,
    steps: Tensor,
    out: Tensor,
    *,
    batch: int,
    starts_BT: Tensor | None,
    eps: float,
) -> None:
    """Write what the heads read of their states, normalised and gated, to ``out``.

    Args:
        kernels: of the device.
        net: the layer.
        qkvz: queries, keys, values and gates before their activations, compute dtype ``[M, X + V * D]``.
        steps: products with alpha and with beta, float32 ``[M, 2 * V]``.
        out: compute dtype ``[M, V * D]``.
        batch: B.
        starts_BT: int64 first position of each position's document, on the device; None where a row is one document.
        eps: of the norm.
    """
    sizes, length = net.sizes, len(qkvz) // batch
    rows = max(1, STATE_TOKENS // length)
    for first in range(0, batch, rows):
        last = min(first + rows, batch)
        tokens, starts = slice(first * length, last * length), None if starts_BT is None else starts_BT[first:last]
        shape = last - first, length, -1
        mixed_MX = torch.empty(tokens.stop - tokens.start, sizes.conv_size, dtype=torch.float32, device=qkvz.device)
        kernels.convolve(
            qkvz[tokens, : sizes.conv_size],
            net.taps_WX,
            None if starts is None else starts.flatten(),
            length,
            sizes.head_dim,
            2 * sizes.key_size,
            UNIT_EPS,
            mixed_MX,
        )
        alpha, beta = steps[tokens].chunk(2, dim=-1)
        read_BTVD = delta_rule(
            *split_heads(mixed_MX.view(shape), sizes),
            decays(alpha, net.dt_V, net.decay_V).view(shape),
            torch.sigmoid(beta).view(shape),
            starts,
            chunks_at_once=max(1, RUN_BYTES // chunk_bytes(sizes, last - first)),
        )
        kernels.gate(read_BTVD.flatten(0, 1), qkvz[tokens, sizes.conv_size :], net.norm_D, eps, out[tokens])
