"""The forward pass on the CPU: packed weights decoded a tile at a time into one bounded scratch.

Products are float32 or bfloat16 (accumulated in float32); embedding, norms, rotary embedding, attention, the residual
stream and the logits are float32 in either case.

Equations: RMSNorm (https://arxiv.org/abs/1910.07467), rotary embedding (https://arxiv.org/abs/2104.09864) in both
layouts, grouped-query attention (``attention.py``), SwiGLU (https://arxiv.org/abs/2002.05202).

Letters in shapes: B sequences, T positions, M = B * T tokens, H hidden size, N heads, D head size, V vocabulary.
"""

from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from q4kd.trainer.formats.architecture import ROPE_FACTORS, RopeLayout, TeacherConfig
from q4kd.trainer.formats.model_file import ModelFile
from q4kd.trainer.kernels.attention import causal_attention
from q4kd.trainer.kernels.gemm import keep_freed_memory
from q4kd.trainer.teacher.cpu.weights import Matrix, Scratch, build_matrix, decode_vector

# Decoded heads up to this size in bytes are held for the duration of a loss.
MAX_HEAD_BYTES = 1_300_000_000


@dataclass(frozen=True)
class _Layer:
    attn_norm: Tensor
    attn_q: Matrix
    attn_k: Matrix
    attn_v: Matrix
    attn_output: Matrix
    q_bias: Tensor | None
    k_bias: Tensor | None
    v_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    ffn_norm: Tensor
    ffn_gate: Matrix
    ffn_up: Matrix
    ffn_down: Matrix


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return ``x`` normalised by its root mean square over the last dimension, float32."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def rope_tables(positions: int, head_dim: int, base: float, factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return cos and sin, float32 ``[positions, head_dim / 2]``, computed in float64.

    ``factors``, float32 ``[head_dim / 2]``, divide the frequencies (``rope_freqs`` of Llama 3.1).
    """
    frequency = base ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    if factors is not None:
        frequency = frequency / factors.double().cpu()
    angle = torch.outer(torch.arange(positions, dtype=torch.float64), frequency)
    return angle.cos().float(), angle.sin().float()


def rotate(x_BNTD: Tensor, cos_TD: Tensor, sin_TD: Tensor, layout: RopeLayout) -> Tensor:
    """Apply rotary embedding, pairing elements ``(i, i + D/2)`` or ``(2i, 2i + 1)``.

    Returns:
        float32 ``[B, N, T, D]``, new and contiguous whatever the strides of ``x_BNTD``.
    """
    out_BNTD = torch.empty(x_BNTD.shape, dtype=torch.float32)
    if layout == "split_halves":
        (first, second), (out_first, out_second) = x_BNTD.chunk(2, dim=-1), out_BNTD.chunk(2, dim=-1)
    else:
        first, second = x_BNTD[..., 0::2], x_BNTD[..., 1::2]
        out_first, out_second = out_BNTD[..., 0::2], out_BNTD[..., 1::2]
    torch.mul(first, cos_TD, out=out_first).addcmul_(second, sin_TD, value=-1)
    torch.mul(second, cos_TD, out=out_second).addcmul_(first, sin_TD)
    return out_BNTD


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
        self._output_norm = self._vector("output_norm.weight")
        self._head = self._embedding if self.config.tied_head else self._matrix("output.weight")
        self._rope_factors = self._optional(ROPE_FACTORS)

    def _matrix(self, name: str) -> Matrix:
        self.matrices[name] = build_matrix(self._backend, self._model.tensors[name], self.scratch, self.dtype)
        return self.matrices[name]

    def _vector(self, name: str) -> Tensor:
        vector = decode_vector(self._model.tensors[name])
        self.vector_bytes["F32"] += vector.numel() * 4
        return vector

    def _optional(self, name: str) -> Tensor | None:
        return self._vector(name) if name in self._model.tensors else None

    def _load_layer(self, index: int) -> _Layer:
        prefix = f"blk.{index}."
        return _Layer(
            attn_norm=self._vector(prefix + "attn_norm.weight"),
            attn_q=self._matrix(prefix + "attn_q.weight"),
            attn_k=self._matrix(prefix + "attn_k.weight"),
            attn_v=self._matrix(prefix + "attn_v.weight"),
            attn_output=self._matrix(prefix + "attn_output.weight"),
            q_bias=self._optional(prefix + "attn_q.bias"),
            k_bias=self._optional(prefix + "attn_k.bias"),
            v_bias=self._optional(prefix + "attn_v.bias"),
            q_norm=self._optional(prefix + "attn_q_norm.weight"),
            k_norm=self._optional(prefix + "attn_k_norm.weight"),
            ffn_norm=self._vector(prefix + "ffn_norm.weight"),
            ffn_gate=self._matrix(prefix + "ffn_gate.weight"),
            ffn_up=self._matrix(prefix + "ffn_up.weight"),
            ffn_down=self._matrix(prefix + "ffn_down.weight"),
        )

    def embed(self, row_ids: Tensor) -> Tensor:
        """Return float32 embedding rows ``[n, H]`` of int64 ids ``[n]``."""
        return self._embedding.gather(row_ids)

    def hidden(self, ids_BT: Tensor, starts_BT: Tensor | None = None) -> Tensor:
        """Return the final, normalised hidden states, float32 ``[B, T, H]``, of checked int64 ids ``[B, T]``.

        With ``starts_BT`` (checked int64) a position attends to none before the first of its document. Rotary
        embedding sees differences of positions only, so positions go on counting across documents.
        """
        batch, length = ids_BT.shape
        cos_TD, sin_TD = rope_tables(length, self.config.head_dim, self.config.rope_base, self._rope_factors)
        x_MH = self.embed(ids_BT.reshape(-1))
        for layer in self._layers:
            x_MH += self._attend(layer, self._norm(x_MH, layer.attn_norm), batch, cos_TD, sin_TD, starts_BT)
            x_MH += self._feed_forward(layer, self._norm(x_MH, layer.ffn_norm))
        return rms_norm(x_MH, self._output_norm, self.config.rms_eps).view(batch, length, -1)

    def _norm(self, x_MH: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x_MH, weight, self.config.rms_eps).to(self.dtype)

    def _feed_forward(self, layer: _Layer, x_MH: Tensor) -> Tensor:
        gated_MF = F.silu(layer.ffn_gate.product(x_MH), inplace=True)
        gated_MF *= layer.ffn_up.product(x_MH)
        return layer.ffn_down.product(gated_MF)

    def _attend(
        self, layer: _Layer, x_MH: Tensor, batch: int, cos_TD: Tensor, sin_TD: Tensor, starts_BT: Tensor | None
    ) -> Tensor:
        config = self.config

        def heads(matrix: Matrix, bias: Tensor | None, norm: Tensor | None, count: int) -> Tensor:
            out = matrix.product(x_MH).float()
            if bias is not None:
                out += bias
            out_BNTD = out.view(batch, -1, count, config.head_dim).transpose(1, 2)
            return out_BNTD if norm is None else rms_norm(out_BNTD, norm, config.rms_eps)

        q_BNTD = heads(layer.attn_q, layer.q_bias, layer.q_norm, config.num_heads)
        k_BKTD = heads(layer.attn_k, layer.k_bias, layer.k_norm, config.num_kv_heads)
        v_BKTD = heads(layer.attn_v, layer.v_bias, None, config.num_kv_heads).contiguous()
        q_BNTD = rotate(q_BNTD, cos_TD, sin_TD, config.rope_layout)
        k_BKTD = rotate(k_BKTD, cos_TD, sin_TD, config.rope_layout)
        mixed_MA = causal_attention(q_BNTD, k_BKTD, v_BKTD, starts_BT).view(x_MH.shape[0], -1)
        return layer.attn_output.product(mixed_MA.to(self.dtype))

    def head_logits(self, hidden_MH: Tensor, out_MV: Tensor | None = None) -> Tensor:
        """Return float32 logits ``[M, V]`` of hidden states ``[M, H]``: in ``out_MV`` if given, else new."""
        return self._head.project(hidden_MH.to(self.dtype), out_MV)

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
