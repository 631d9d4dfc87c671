"""The forward pass on the CPU: packed weights decoded a tile at a time into one bounded scratch.

What the families do differently is data: ``formats/families.py`` and ``TeacherConfig``.

Products are float32 or bfloat16 (accumulated in float32); embedding, norms, rotary embedding, attention, the residual
stream and the logits are float32 in either case.

Equations: RMSNorm (https://arxiv.org/abs/1910.07467), rotary embedding (https://arxiv.org/abs/2104.09864) in both
layouts, grouped-query attention (``attention.py``), SwiGLU (https://arxiv.org/abs/2002.05202).

Letters in shapes: B sequences, T positions, M = B * T tokens, H hidden size, N heads, D head size, V vocabulary.
"""

import functools
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from q4kd.trainer.formats.architecture import ROPE_FACTORS, TeacherConfig
from q4kd.trainer.formats.families import Activation, RopeLayout
from q4kd.trainer.formats.model_file import ModelFile
from q4kd.trainer.formats.recurrence import Recurrence
from q4kd.trainer.formats.rope_scaling import LONG_FACTORS, SHORT_FACTORS
from q4kd.trainer.kernels.attention import causal_attention
from q4kd.trainer.kernels.gemm import keep_freed_memory
from q4kd.trainer.teacher.cpu.experts import Experts, expert_products, route
from q4kd.trainer.teacher.cpu.recurrent import DeltaNet, build_delta_net, mix
from q4kd.trainer.teacher.cpu.shared_expert import SharedExpert, build_shared_expert
from q4kd.trainer.teacher.cpu.weights import Matrix, Scratch, build_matrix, decode_matrix, decode_vector
from q4kd.trainer.teacher.rope import Rope, RopeFactors

# Decoded heads up to this size in bytes are held for the duration of a loss.
MAX_HEAD_BYTES = 1_300_000_000


@dataclass(frozen=True)
class _FeedForward:
    """The feed-forward of a dense layer."""

    gate_up: tuple[Matrix, ...]  # two, or one that holds their rows
    down: Matrix


@dataclass(frozen=True)
class _Layer:
    """Weights of one block; norms that its family has not are None."""

    attn_norm: Tensor | None
    qkv: tuple[Matrix, ...]  # three, or one that holds their rows
    attn_output: Matrix
    recurrent: DeltaNet | None
    biases: tuple[Tensor | None, Tensor | None, Tensor | None]
    q_norm: Tensor | None
    k_norm: Tensor | None
    attn_post_norm: Tensor | None
    ffn_norm: Tensor | None
    feed_forward: _FeedForward | Experts
    shared_expert: SharedExpert | None
    ffn_post_norm: Tensor | None
    window: int  # keys that a query reads; 0 for all
    is_rotated: bool


@dataclass(frozen=True)
class _Pass:
    """What all layers of one pass share: its shape, where documents begin, and how positions turn."""

    batch: int
    starts_BT: Tensor | None
    tables: tuple[Tensor, Tensor]
    window_tables: tuple[Tensor, Tensor] | None
    query_scales_BT: Tensor | None

    def tables_of(self, layer: _Layer) -> tuple[Tensor, Tensor] | None:
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


def activate(gate: Tensor, activation: Activation) -> Tensor:
    """Return the gate's activation: SiLU, in place, or GELU by its tanh formula (https://arxiv.org/abs/1606.08415)."""
    return F.silu(gate, inplace=True) if activation == "silu" else F.gelu(gate, approximate="tanh")


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
        self._model, self._backend = model, backend
        self.config: TeacherConfig = model.config
        self.device = torch.device("cpu")
        self.scratch = Scratch()
        self.matrices: dict[str, Matrix] = {}
        self.vector_bytes: Counter[str] = Counter()
        self._embedding = self._matrix("token_embd.weight")
        self._layers = [self._load_layer(index) for index in range(self.config.num_layers)]
        # A scale of the logits is one of the states that the head reads.
        self._output_norm = self._vector("output_norm.weight") * self.config.logit_scale
        self._head = self._embedding if self.config.tied_head else self._matrix("output.weight")
        names = (ROPE_FACTORS, SHORT_FACTORS, LONG_FACTORS)
        self._rope = Rope(self.config, RopeFactors(*map(self._optional, names)))

    def _matrix(self, name: str, dtype: torch.dtype | None = None) -> Matrix:
        tensor = self._model.tensors[name]
        self.matrices[name] = build_matrix(self._backend, tensor, self.scratch, dtype or self.dtype)
        return self.matrices[name]

    def _vector(self, name: str) -> Tensor:
        vector = decode_vector(self._model.tensors[name])
        self.vector_bytes["F32"] += vector.numel() * 4
        return vector

    def _optional(self, name: str) -> Tensor | None:
        return self._vector(name) if name in self._model.tensors else None

    def _load_layer(self, index: int) -> _Layer:
        prefix, config, family = f"blk.{index}.", self.config, self.config.family
        recurrence = config.recurrence_of(index)
        is_fused = family.fused_qkv or recurrence is not None
        qkv = ("attn_qkv",) if is_fused else ("attn_q", "attn_k", "attn_v")
        output = "attn_output" if recurrence is None else "ssm_out"

        def norm(name: str) -> Tensor | None:
            return self._optional(f"{prefix}{name}.weight")

        return _Layer(
            attn_norm=norm("attn_norm"),
            qkv=tuple(self._matrix(f"{prefix}{name}.weight") for name in qkv),
            attn_output=self._matrix(f"{prefix}{output}.weight"),
            recurrent=self._load_recurrent(prefix, recurrence),
            biases=(
                self._optional(prefix + "attn_q.bias"),
                self._optional(prefix + "attn_k.bias"),
                self._optional(prefix + "attn_v.bias"),
            ),
            q_norm=norm("attn_q_norm"),
            k_norm=norm("attn_k_norm"),
            attn_post_norm=norm("post_attention_norm") if family.post_norms else None,
            ffn_norm=norm(family.ffn_norm),
            feed_forward=self._load_experts(prefix) if config.num_experts else self._load_feed_forward(prefix),
            shared_expert=build_shared_expert(prefix, self._matrix, self._vector) if config.shared_ffn_size else None,
            ffn_post_norm=norm("post_ffw_norm"),
            window=config.window(index),
            is_rotated=config.is_rotated(index),
        )

    def _load_feed_forward(self, prefix: str) -> _FeedForward:
        names = ("ffn_up",) if self.config.family.fused_gate_up else ("ffn_gate", "ffn_up")
        gate_up = tuple(self._matrix(f"{prefix}{name}.weight") for name in names)
        return _FeedForward(gate_up, self._matrix(prefix + "ffn_down.weight"))

    def _load_experts(self, prefix: str) -> Experts:
        # The router is multiplied in float32 whatever the dtype, since a rounded product chooses other experts.
        router = self._matrix(prefix + "ffn_gate_inp.weight", torch.float32)
        gate, up, down = (self._matrix(f"{prefix}ffn_{name}_exps.weight") for name in ("gate", "up", "down"))
        return Experts(router, gate, up, down, self.config.num_experts, self.config.experts_per_token)

    def _load_recurrent(self, prefix: str, sizes: Recurrence | None) -> DeltaNet | None:
        if sizes is None:
            return None
        taps = decode_matrix(self._model.tensors[prefix + "ssm_conv1d.weight"]).T.contiguous()
        self.vector_bytes["F32"] += taps.nbytes
        return build_delta_net(prefix, sizes, self._matrix, self._vector, taps)

    def embed(self, row_ids: Tensor) -> Tensor:
        """Return float32 embedding rows ``[n, H]`` of int64 ids ``[n]``."""
        return self._embedding.gather(row_ids)

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
        for layer in self._layers:
            self._add(x_MH, self._attend(layer, self._norm(x_MH, layer.attn_norm), work), layer.attn_post_norm)
            self._add(x_MH, self._feed_forward(layer, x_MH), layer.ffn_post_norm)
        return rms_norm(x_MH, self._output_norm, self.config.rms_eps).view(batch, length, -1)

    def _norm(self, x_MH: Tensor, weight: Tensor | None) -> Tensor:
        return (x_MH if weight is None else rms_norm(x_MH, weight, self.config.rms_eps)).to(self.dtype)

    def _add(self, x_MH: Tensor, delta_MH: Tensor, post_norm: Tensor | None) -> None:
        """Add the output of attention or feed-forward to the residual stream, in place."""
        if post_norm is not None:
            delta_MH = rms_norm(delta_MH.float(), post_norm, self.config.rms_eps)
        x_MH.add_(delta_MH, alpha=self.config.residual_scale)

    def _feed_forward(self, layer: _Layer, x_MH: Tensor) -> Tensor:
        """Return the output of the feed-forward of states that are not normalised yet."""
        weights, activation = layer.feed_forward, self.config.family.activation
        if isinstance(weights, Experts):
            return self._mixture(weights, layer.shared_expert, rms_norm(x_MH, layer.ffn_norm, self.config.rms_eps))
        normed_MH = self._norm(x_MH, layer.ffn_norm)
        if len(weights.gate_up) == 1:
            gate_MF, up_MF = weights.gate_up[0].product(normed_MH).chunk(2, dim=-1)
            return weights.down.product(activate(gate_MF.contiguous(), activation).mul_(up_MF))
        gated_MF = activate(weights.gate_up[0].product(normed_MH), activation)
        gated_MF *= weights.gate_up[1].product(normed_MH)
        return weights.down.product(gated_MF)

    def _mixture(self, experts: Experts, shared: SharedExpert | None, normed_MH: Tensor) -> Tensor:
        """Return the output of a layer's experts, float32, of normalised float32 states."""
        chosen_MC, weights_MC = route(experts.router.product(normed_MH), experts.per_token)
        activation = functools.partial(activate, activation=self.config.family.activation)
        out_MH = expert_products(normed_MH.to(self.dtype), chosen_MC, weights_MC, experts, activation)
        if shared is not None:
            shared.add_to(out_MH, normed_MH, self.dtype, activation)
        return out_MH

    def _qkv(self, layer: _Layer, x_MH: Tensor) -> list[Tensor]:
        """Return queries, keys and values before any norm, float32 ``[M, N * D]`` and ``[M, K * D]``."""
        sizes = [self.config.q_size, self.config.kv_size, self.config.kv_size]
        parts = [matrix.product(x_MH).float() for matrix in layer.qkv]
        if len(parts) == 1:
            parts = list(torch.split(parts[0], sizes, dim=-1))
        for part, bias in zip(parts, layer.biases, strict=True):
            if bias is not None:
                part += bias
        return parts

    def _attend(self, layer: _Layer, x_MH: Tensor, work: _Pass) -> Tensor:
        config, tables = self.config, work.tables_of(layer)
        if layer.recurrent is not None:
            qkv_MX = layer.qkv[0].product(x_MH).float()
            mixed_MA = mix(layer.recurrent, qkv_MX, x_MH, work.batch, work.starts_BT, config.rms_eps)
            return layer.attn_output.product(mixed_MA.to(self.dtype))

        def heads(part_MA: Tensor, norm: Tensor | None, count: int) -> Tensor:
            if norm is not None and len(norm) != config.head_dim:
                part_MA, norm = rms_norm(part_MA, norm, config.rms_eps), None
            out_BNTD = part_MA.view(work.batch, -1, count, config.head_dim).transpose(1, 2)
            return out_BNTD if norm is None else rms_norm(out_BNTD, norm, config.rms_eps)

        def turned(x_BNTD: Tensor) -> Tensor:
            return x_BNTD.contiguous() if tables is None else rotate(x_BNTD, *tables, config.rope_layout)

        # Projections are dropped one by one, as soon as there are heads of them.
        parts = self._qkv(layer, x_MH)
        v_BKTD = heads(parts.pop(), None, config.num_kv_heads).contiguous()
        k_BKTD = turned(heads(parts.pop(), layer.k_norm, config.num_kv_heads))
        q_MA, gate_MND = parts.pop(), None
        if config.family.gated_attention:  # a gate behind each head
            q_MA, gate_MND = q_MA.view(len(q_MA), config.num_heads, 2, config.head_dim).unbind(2)
        q_BNTD = turned(heads(q_MA, layer.q_norm, config.num_heads))
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
        )
        mixed_MND = mixed_BTND.flatten(0, 1)
        if gate_MND is not None:
            mixed_MND = gate_heads(mixed_MND, gate_MND)
        return layer.attn_output.product(mixed_MND.flatten(1).to(self.dtype))

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
