"""The parts of a layer on the device: attention or a gated delta net, and behind it a feed-forward, experts, or both.

Each reads the normalised states of a pass's buffers, and all but ``mix`` write what is added to the residual stream.

Letters in shapes: B sequences, M tokens, H hidden size, F feed-forward size, S tokens of a turn of the feed-forward, N
heads, K key-value heads, D head size, R rows (outputs) and K columns (inputs) of a group.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from q4kd.trainer.formats.architecture import TeacherConfig
from q4kd.trainer.kernels.numerics import multiply
from q4kd.trainer.kernels.windowed import Reach
from q4kd.trainer.teacher.cuda.experts import Experts
from q4kd.trainer.teacher.cuda.heads import HeadsPass
from q4kd.trainer.teacher.cuda.layers import DenseAndExperts, FeedForward, Layer, SharedExpert
from q4kd.trainer.teacher.cuda.mixture import Mixture
from q4kd.trainer.teacher.cuda.recurrent import DeltaNet, read_states
from q4kd.trainer.teacher.cuda.stream import WeightStream
from q4kd.trainer.teacher.cuda.weights import FUSED_MAX_TOKENS, Group

if TYPE_CHECKING:
    from q4kd.trainer.kernels.state_kernels import StateKernels
    from q4kd.trainer.kernels.teacher_kernels import Kernels


@dataclass(frozen=True)
class Activations:
    """Buffers of one pass, reused by every layer; all but the residual stream are in the compute dtype."""

    residual: Tensor  # float32 [M, H]
    normed: Tensor  # [M, H]
    delta: Tensor  # [M, H]
    qkv: Tensor  # [M, (N + 2 K) D], or as wide as the widest layer's
    gate_up: Tensor  # [min(M, S), 2 F]
    gated: Tensor  # [M, F]


def gated_kernel(config: TeacherConfig, kernels: "Kernels") -> Callable[[Tensor, Tensor], None]:
    """Return the kernel that writes ``act(gate) * up`` of a family: ``swiglu`` or ``geglu``."""
    return kernels.swiglu if config.family.activation == "silu" else kernels.geglu


class Parts:
    """Runs the parts of a model's layers.

    Args:
        config: the model's dimensions.
        kernels: kernels of the device.
        stream: gives the weights of a group, decoded.
        mixture: the products of experts; None for a model without.
        states: kernels of recurrent layers; None for a model without.
        dtype: bfloat16 or float32.
    """

    def __init__(
        self,
        config: TeacherConfig,
        kernels: "Kernels",
        stream: WeightStream,
        mixture: Mixture | None,
        states: "StateKernels | None",
        dtype: torch.dtype,
    ) -> None:
        self._config, self._kernels, self._stream = config, kernels, stream
        self._mixture, self._states, self._dtype = mixture, states, dtype

    def is_few(self, group: Group, tokens: int) -> bool:
        """Return whether products of so many tokens read a group's packed weights, which then are not decoded."""
        return tokens <= FUSED_MAX_TOKENS and self._dtype == torch.bfloat16 and group.is_fusable

    def _product(self, group: Group, x_MK: Tensor, out_MR: Tensor) -> None:
        if self.is_few(group, len(x_MK)):
            group.multiply_few(x_MK, out_MR)
            return
        for rows, weight_RK in self._stream.decoded(group):
            multiply(x_MK, weight_RK, out_MR[:, rows])

    def _projected(self, layer: Layer, buffers: Activations) -> Tensor:
        """Return what a layer's first product gives, contiguous ``[M, R]``, in the buffer for it."""
        tokens = len(buffers.normed)
        out_MR = buffers.qkv.view(-1)[: tokens * layer.qkv.rows].view(tokens, -1)
        self._product(layer.qkv, buffers.normed, out_MR)
        return out_MR

    def attend(self, layer: Layer, buffers: Activations, batch: int, heads: HeadsPass, reach: Reach) -> None:
        """Write the output of a layer's attention to ``buffers.delta``."""
        config, kv_heads, qkv = self._config, layer.kv_heads, self._projected(layer, buffers)
        heads_MAD = qkv.view(len(qkv), -1, layer.head_dim)
        keys_from = config.num_heads * (2 if config.family.gated_attention else 1)
        q_MND, k_MKD = heads_MAD[:, :keys_from], heads_MAD[:, keys_from : keys_from + kv_heads]
        v_MKD = k_MKD if layer.shares_keys else heads_MAD[:, keys_from + kv_heads :]
        gate_MND = None
        if config.family.gated_attention:  # a gate behind each head
            q_MND, gate_MND = q_MND[:, 0::2], q_MND[:, 1::2]
        if layer.v_bias is not None:
            self._kernels.add_bias(qkv[:, -kv_heads * layer.head_dim :], layer.v_bias)
        if config.family.value_norm:  # into a tensor of their own, before the keys, which they may be, are turned
            v_MKD = F.rms_norm(v_MKD.float(), (layer.head_dim,), None, config.rms_eps).to(self._dtype)
        heads.prepare(layer, q_MND, k_MKD, batch)
        parts = (part.view(batch, -1, *part.shape[1:]).transpose(1, 2) for part in (q_MND, k_MKD, v_MKD))
        mixed_MA = reach.attend(
            *parts, window=layer.window, scale=config.query_scale, cap=config.attention_cap, sinks=layer.sinks
        )
        if gate_MND is not None:
            mixed_MA *= torch.sigmoid(gate_MND.float()).flatten(1)
        self._product(layer.attn_output, mixed_MA, buffers.delta)
        if layer.output_bias is not None:
            self._kernels.add_bias(buffers.delta, layer.output_bias)

    def follow_states(
        self, layer: Layer, net: DeltaNet, buffers: Activations, batch: int, starts_BT: Tensor | None
    ) -> None:
        """Do for a recurrent layer what ``attend`` does for one that attends."""
        qkvz = self._projected(layer, buffers)
        steps = torch.empty(len(qkvz), net.steps.rows, dtype=torch.float32, device=qkvz.device)
        self._product(net.steps, buffers.normed, steps)
        read = torch.empty(len(qkvz), net.sizes.value_size, dtype=self._dtype, device=qkvz.device)
        if self._states is None:
            raise RuntimeError("expected a model with recurrent layers")
        eps = self._config.rms_eps
        read_states(self._states, net, qkvz, steps, read, batch=batch, starts_BT=starts_BT, eps=eps)
        self._product(layer.attn_output, read, buffers.delta)

    def feed_forward(self, weights: FeedForward, buffers: Activations) -> None:
        """Write the output of a dense feed-forward to ``buffers.delta``."""
        x_MH, gate_up, gated_MF = buffers.normed, buffers.gate_up, buffers.gated
        tokens, step, gated = len(x_MH), len(gate_up), gated_kernel(self._config, self._kernels)
        if step == tokens:
            self._product(weights.gate_up, x_MH, gate_up)
            gated(gate_up, gated_MF)
        else:
            for _, weight_RK in self._stream.decoded(weights.gate_up):
                for start in range(0, tokens, step):
                    stop = min(start + step, tokens)
                    part = gate_up[: stop - start]
                    multiply(x_MH[start:stop], weight_RK, part)
                    gated(part, gated_MF[start:stop])
        self._product(weights.down, gated_MF, buffers.delta)

    def dense_and_experts(self, weights: DenseAndExperts, buffers: Activations) -> None:
        """Write the sum of a dense feed-forward and the experts beside it, each normalised, to ``buffers.delta``."""
        if self._mixture is None:
            raise RuntimeError("expected a mixture of experts")
        kernels, eps, residual, delta = self._kernels, self._config.rms_eps, buffers.residual, buffers.delta
        self.feed_forward(weights.dense, buffers)
        kernels.rms_norm(delta, weights.dense_post_norm, eps, delta)
        router_MH = torch.empty_like(buffers.normed)
        kernels.rms_norm(residual, weights.router_scale, eps, router_MH)
        kernels.rms_norm(residual, weights.experts_norm, eps, buffers.normed)
        mixed_MH = torch.zeros_like(residual)
        self._mixture.add(weights.experts, buffers.normed, mixed_MH, router_MH)
        kernels.rms_norm(mixed_MH, weights.experts_post_norm, eps, router_MH)
        delta.add_(router_MH)

    def mix(
        self, experts: Experts, shared: SharedExpert | None, next_norm: Tensor | None, buffers: Activations
    ) -> None:
        """Add the outputs of a layer's experts, and normalise the sum for the next part."""
        if self._mixture is None or next_norm is None:
            raise RuntimeError("expected a family of experts with a norm before each part")
        if shared is not None:
            self.feed_forward(shared.feed_forward, buffers)
            shares_M = torch.sigmoid(buffers.normed.float() @ shared.token_gate_H)
            buffers.residual.add_(buffers.delta * shares_M[:, None])
        self._mixture.add(experts, buffers.normed, buffers.residual)
        self._kernels.rms_norm(buffers.residual, next_norm, self._config.rms_eps, buffers.normed)
