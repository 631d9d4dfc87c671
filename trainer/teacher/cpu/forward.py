"""The forward pass on the CPU: packed weights decoded a tile at a time into one bounded scratch.

What the families do differently is data: ``formats/families.py`` and ``TeacherConfig``.

Products are float32 or bfloat16 (accumulated in float32); embedding, norms, rotary embedding, attention, the residual
stream and the logits are float32 in either case.

Equations: RMSNorm (https://arxiv.org/abs/1910.07467), rotary embedding (https://arxiv.org/abs/2104.09864) in both
layouts, grouped-query attention (``attention.py``), SwiGLU (https://arxiv.org/abs/2002.05202).

Letters in shapes: B sequences, T positions, M = B * T tokens, H hidden size, N heads, D head size, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from q4kd.trainer.formats.architecture import TeacherConfig
from q4kd.trainer.formats.families import RopeLayout
from q4kd.trainer.formats.model_file import ModelFile
from q4kd.trainer.kernels.attention import causal_attention
from q4kd.trainer.kernels.gemm import keep_freed_memory
from q4kd.trainer.teacher.cpu.activation import activate, gated_product
from q4kd.trainer.teacher.cpu.dense_and_experts import DenseAndExperts
from q4kd.trainer.teacher.cpu.experts import Experts, expert_products
from q4kd.trainer.teacher.cpu.layers import Layer, ModelWeights
from q4kd.trainer.teacher.cpu.recurrent import DeltaNet, mix
from q4kd.trainer.teacher.cpu.shared_expert import SharedExpert
from q4kd.trainer.teacher.cpu.weights import Matrix
from q4kd.trainer.teacher.rope import Rope

# Decoded heads up to this size in bytes are held for the duration of a loss.
MAX_HEAD_BYTES = 1_300_000_000


@dataclass(frozen=True)
class _Pass:
    """What all layers of one pass share: its shape, where documents begin, and how positions turn."""

    batch: int
    starts_BT: Tensor | None
    tables: tuple[Tensor, Tensor]
    window_tables: tuple[Tensor, Tensor] | None
    query_scales_BT: Tensor | None

    def tables_of(self, layer: Layer) -> tuple[Tensor, Tensor] | None:
        """Return cos and sin of a layer; None where it has no rotary embedding."""
        if not layer.is_rotated:
            return None
        return self.window_tables if layer.window and self.window_tables is not None else self.tables


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Return ``x`` normalised by its root mean square over the last dimension, float32."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def rotate(x_BNTD: Tensor, cos_TR: Tensor, sin_TR: Tensor, layout: RopeLayout) -> Tensor:
    """Apply rotary embedding, pairing elements ``(i, i + R/2)`` or ``(2i, 2i + 1)`` of the first R of a head.

    Args:
        x_BNTD: float32, of any strides.
        cos_TR, sin_TR: float32 ``[T, R / 2]`` or ``[B, T, R / 2]``.
        layout: which elements are a pair.

    Returns:
        float32 ``[B, N, T, D]``, new and contiguous whatever the strides of ``x_BNTD``.
    """
    out_BNTD = torch.empty(x_BNTD.shape, dtype=torch.float32, device=x_BNTD.device)
    rotated = 2 * cos_TR.shape[-1]
    if rotated < x_BNTD.shape[-1]:
        out_BNTD[..., rotated:] = x_BNTD[..., rotated:]
    if cos_TR.dim() == 3:
        cos_TR, sin_TR = cos_TR.unsqueeze(1), sin_TR.unsqueeze(1)
    x_BNTR, out_BNTR = x_BNTD[..., :rotated], out_BNTD[..., :rotated]
    if layout == "split_halves":
        (first, second), (out_first, out_second) = x_BNTR.chunk(2, dim=-1), out_BNTR.chunk(2, dim=-1)
    else:
        first, second = x_BNTR[..., 0::2], x_BNTR[..., 1::2]
        out_first, out_second = out_BNTR[..., 0::2], out_BNTR[..., 1::2]
    torch.mul(first, cos_TR, out=out_first).addcmul_(second, sin_TR, value=-1)
    torch.mul(second, cos_TR, out=out_second).addcmul_(first, sin_TR)
    return out_BNTD


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """Make x ``cap * tanh(x / cap)``, in place; return it (Gemma 2, https://arxiv.org/abs/2408.00118, section 2)."""
    return x.div_(cap).tanh_().mul_(cap)


def gate_heads(mixed_MND: Tensor, gate_MND: Tensor) -> Tensor:
    """Multiply what each head mixes by the sigmoid of its gate, in place; return it (arXiv:2505.06708)."""
    return mixed_MND.mul_(torch.sigmoid(gate_MND))


class CpuForward:
    """The weights of a model as the CPU holds them, and the forward pass over them.

    Args:
        model: an opened file; its tensors stay views of the memory map.
        backend: ``q4k`` keeps the blocks, ``dense`` decodes every matrix at load.
        dtype: dtype of the matrix products, float32 or bfloat16.
    """

    def __init__(self, model: ModelFile, backend: str, dtype: torch.dtype = torch.float32) -> None:
        keep_freed_memory()
        self.dtype = dtype
        self.config: TeacherConfig = model.config
        self.device = torch.device("cpu")
        self._weights = ModelWeights(model, backend, dtype)
        self.scratch, self.matrices = self._weights.scratch, self._weights.matrices
        self.vector_bytes = self._weights.vector_bytes
        self._head = self._weights.head
        self._rope = Rope(self.config, self._weights.rope_factors)

    def embed(self, row_ids: Tensor) -> Tensor:
        """Return float32 embedding rows ``[n, H]`` of int64 ids ``[n]``."""
        return self._weights.embedding.gather(row_ids)

    def hidden(self, ids_BT: Tensor, starts_BT: Tensor | None = None) -> Tensor:
        """Return the final, normalised hidden states, float32 ``[B, T, H]``, of checked int64 ids ``[B, T]``.

        With ``starts_BT`` (checked int64) a position attends to none before the first of its document. Rotary
        embedding sees differences of positions only, so positions go on counting across documents.
        """
        batch, length = ids_BT.shape
        work = _Pass(
            batch,
            starts_BT,
            self._rope.tables(length, starts_BT),
            self._rope.window_tables(length) if self.config.window_rope_base else None,
            self._rope.query_scales(length, starts_BT),
        )
        x_MH = self.embed(ids_BT.reshape(-1))
        if self.config.embedding_scale != 1:
            x_MH *= self.config.embedding_scale
        for layer in self._weights.layers:
            self._add(x_MH, self._attend(layer, self._norm(x_MH, layer.attn_norm), work), layer.attn_post_norm)
            self._add(x_MH, self._feed_forward(layer, x_MH), layer.ffn_post_norm)
            if layer.output_scale != 1:
                x_MH *= layer.output_scale
        return rms_norm(x_MH, self._weights.output_norm, self.config.rms_eps).view(batch, length, -1)

    def _norm(self, x_MH: Tensor, weight: Tensor | None) -> Tensor:
        return (x_MH if weight is None else rms_norm(x_MH, weight, self.config.rms_eps)).to(self.dtype)

    def _add(self, x_MH: Tensor, delta_MH: Tensor, post_norm: Tensor | None) -> None:
        """Add the output of attention or feed-forward to the residual stream, in place."""
        if post_norm is not None:
            delta_MH = rms_norm(delta_MH.float(), post_norm, self.config.rms_eps)
        x_MH.add_(delta_MH, alpha=self.config.residual_scale)

    def _feed_forward(self, layer: Layer, x_MH: Tensor) -> Tensor:
        """Return the output of the feed-forward of states that are not normalised yet."""
        weights = layer.feed_forward
        if isinstance(weights, Experts):
            return self._mixture(weights, layer.shared_expert, rms_norm(x_MH, layer.ffn_norm, self.config.rms_eps))
        normed_MH = self._norm(x_MH, layer.ffn_norm)
        if isinstance(weights, DenseAndExperts):
            dense_MH = self._gated(weights.gate, weights.up, weights.down, normed_MH)
            return weights.add_experts(dense_MH, x_MH, self.config.rms_eps, self.dtype, self._gate)
        if len(weights.gate_up) == 1:
            gate_MF, up_MF = weights.gate_up[0].product(normed_MH).chunk(2, dim=-1)
            return weights.down.product(self._activate(gate_MF.contiguous()).mul_(up_MF))
        gate, up = weights.gate_up
        return self._gated(gate, up, weights.down, normed_MH)

    def _activate(self, gate: Tensor) -> Tensor:
        return activate(gate, self.config.family.activation)

    def _gated(self, gate: Matrix, up: Matrix, down: Matrix, normed_MH: Tensor) -> Tensor:
        """Return ``down (act(gate x) * up x)``, in the compute dtype."""
        gated_MF = self._activate(gate.product(normed_MH))
        gated_MF *= up.product(normed_MH)
        return down.product(gated_MF)

    def _mixture(self, experts: Experts, shared: SharedExpert | None, normed_MH: Tensor) -> Tensor:
        """Return the output of a layer's experts, float32, of normalised float32 states."""
        chosen_MC, weights_MC = experts.choose(normed_MH)
        out_MH = expert_products(normed_MH.to(self.dtype), chosen_MC, weights_MC, experts, self._gate)
        if shared is not None:
            shared.add_to(out_MH, normed_MH, self.dtype, self._gate)
        return out_MH

    def _gate(self, gate: Tensor, up: Tensor) -> Tensor:
        return gated_product(gate, up, self.config.family.activation)

    def _qkv(self, layer: Layer, x_MH: Tensor) -> list[Tensor]:
        """Return queries, keys and values before any norm, float32 ``[M, N * D]`` and ``[M, K * D]``."""
        sizes = [self.config.q_size, self.config.kv_size, self.config.kv_size]
        parts = [matrix.product(x_MH).float() for matrix in layer.qkv]
        if len(parts) == 1:
            parts = list(torch.split(parts[0], sizes, dim=-1))
        if len(parts) == 2:  # Heads of either are tensors of their own, since both are normalised.
            parts.append(parts[1])
        for part, bias in zip(parts, layer.biases, strict=True):
            if bias is not None:
                part += bias
        return parts

    def _follow_states(self, layer: Layer, net: DeltaNet, x_MH: Tensor, work: _Pass) -> Tensor:
        """Return for a recurrent layer what ``_attend`` does for one that attends."""
        qkv_MX = layer.qkv[0].product(x_MH).float()
        mixed_MA = mix(net, qkv_MX, x_MH, work.batch, work.starts_BT, self.config.rms_eps)
        return layer.attn_output.product(mixed_MA.to(self.dtype))

    def _attend(self, layer: Layer, x_MH: Tensor, work: _Pass) -> Tensor:
        if layer.recurrent is not None:
            return self._follow_states(layer, layer.recurrent, x_MH, work)
        config, tables = self.config, work.tables_of(layer)

        def heads(part_MA: Tensor, norm: Tensor | None, count: int) -> Tensor:
            if norm is not None and len(norm) != layer.head_dim:
                part_MA, norm = rms_norm(part_MA, norm, config.rms_eps), None
            out_BNTD = part_MA.view(work.batch, -1, count, layer.head_dim).transpose(1, 2)
            return out_BNTD if norm is None else rms_norm(out_BNTD, norm, config.rms_eps)

        def turned(x_BNTD: Tensor) -> Tensor:
            return x_BNTD.contiguous() if tables is None else rotate(x_BNTD, *tables, config.rope_layout)

        # Projections are dropped one by one, as soon as there are heads of them.
        parts = self._qkv(layer, x_MH)
        v_BKTD = heads(parts.pop(), None, layer.kv_heads)
        v_BKTD = (rms_norm(v_BKTD, None, config.rms_eps) if config.family.value_norm else v_BKTD).contiguous()
        k_BKTD = turned(heads(parts.pop(), layer.k_norm, layer.kv_heads))
        q_MA, gate_MND = parts.pop(), None
        if config.family.gated_attention:  # a gate behind each head
            q_MA, gate_MND = q_MA.view(len(q_MA), config.num_heads, 2, layer.head_dim).unbind(2)
        q_BNTD = turned(heads(q_MA, layer.q_norm, config.num_heads))
        del q_MA
        if work.query_scales_BT is not None:
            q_BNTD *= work.query_scales_BT[:, None, :, None]
        mixed_BTND = causal_attention(
            q_BNTD,
            k_BKTD,
            v_BKTD,
            work.starts_BT,
            window=layer.window,
            scale=config.query_scale,
            cap=config.attention_cap,
            sinks=layer.sinks,
        )
        mixed_MND = mixed_BTND.flatten(0, 1)
        if gate_MND is not None:
            mixed_MND = gate_heads(mixed_MND, gate_MND)
        out_MH = layer.attn_output.product(mixed_MND.flatten(1).to(self.dtype))
        return out_MH if layer.output_bias is None else out_MH.float().add_(layer.output_bias)

    def head_logits(self, hidden_MH: Tensor, out_MV: Tensor | None = None) -> Tensor:
        """Return float32 logits ``[M, V]`` of hidden states ``[M, H]``: in ``out_MV`` if given, else new."""
        logits_MV = self._head.project(hidden_MH.to(self.dtype), out_MV)
        return soft_cap(logits_MV, self.config.logit_cap) if self.config.logit_cap else logits_MV

    def decoded_head(self) -> Tensor | None:
        """Return the head ``[V, H]`` decoded to the compute dtype, new; None if that is over ``MAX_HEAD_BYTES``."""
        rows, cols = self._head.rows, self._head.cols
        if rows * cols * self.dtype.itemsize > MAX_HEAD_BYTES:
            return None
        out_VH = torch.empty(rows, cols, dtype=self.dtype)
        self.decode_head(0, rows, out_VH)
        return out_VH

    def decode_head(self, start: int, stop: int, out_RH: Tensor) -> None:
        """Write head rows ``start`` to ``stop`` to ``out_RH``, contiguous, of the compute dtype."""
        self._head.decode(start, stop, out_RH)
