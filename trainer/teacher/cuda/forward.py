"""The forward pass on a CUDA device: packed weights decoded into a bounded scratch, cuBLAS, fused kernels, torch SDPA.

Arithmetic in the default dtype: weights are decoded in float32 and rounded once to bfloat16; products take bfloat16 and
accumulate in float32; norms, rotary embedding and the gate's activation compute in float32; the residual stream and the
logits are float32. In float32 (for comparisons) everything is float32 and TF32 is off. Nothing but token ids comes from
the host.

Bytes for M tokens, bfloat16, with S = ``MLP_TOKENS`` (the feed-forward part runs S tokens at a time)::

    residual 4 M H | normed, delta 2 M H each | Q, K, V 2 M (N + 2 K) D | attention 2 M N D
    gate and up 4 M F (4 S F where both fit one slab) | gated 2 M F

Qwen2.5-7B (H 3584, F 18944, (N + 2 K) D 4608) at M = 8,192: 117 + 59 + 59 + 76 + 59 + 621 + 310 MB = 1.30 GB, beside
the weights (4.68 GB) and two scratch buffers (0.27 GB). The head (1.09 GB decoded) is held between the first
``head_logits`` and the next ``hidden``, when the activations are gone.

Letters in shapes: B sequences, T positions, M = B * T tokens, H hidden size, F feed-forward size, N heads, K key-value
heads, D head size, V vocabulary.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from q4kd.trainer.formats.architecture import TeacherConfig
from q4kd.trainer.kernels.numerics import multiply, pinned_numerics
from q4kd.trainer.kernels.windowed import Reach
from q4kd.trainer.teacher.cpu.forward import soft_cap
from q4kd.trainer.teacher.cuda.experts import Experts
from q4kd.trainer.teacher.cuda.graphs import PassGraphs
from q4kd.trainer.teacher.cuda.heads import Heads
from q4kd.trainer.teacher.cuda.layers import DenseAndExperts, ModelWeights
from q4kd.trainer.teacher.cuda.mixture import DEFAULT_ROWS, DEFAULT_SLAB_BYTES, Mixture, windows_at_once
from q4kd.trainer.teacher.cuda.parts import Activations, Parts, gated_kernel
from q4kd.trainer.teacher.cuda.stream import DEFAULT_SCRATCH_BYTES, SideStream, Timeline, WeightStream
from q4kd.trainer.teacher.cuda.weights import FUSED_MAX_TOKENS, DeviceTensor

if TYPE_CHECKING:
    from q4kd.trainer.kernels.teacher_kernels import Kernels

MLP_TOKENS = 4096
# A shorter pass is bound by the host, where ordering two streams costs more than it hides (measured on an H200).
OVERLAP_MIN_TOKENS = 512
# Passes up to here are replayed as CUDA graphs; each keeps the activations of its pass (165 MB for 7B at 1,024).
GRAPH_MAX_TOKENS = 1024
# Decoded heads of more bytes go through the scratch buffers slab by slab at every call instead of being held.
DEFAULT_HEAD_BYTES = 1_300_000_000


class ScratchBytes:
    """Counts what the forward pass holds beside the weights: scratch buffers, and the decoded head while it is held."""

    def __init__(self, stream: WeightStream, mixture: Mixture | None) -> None:
        self._stream, self._mixture = stream, mixture
        self.head: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes held now."""
        experts = 0 if self._mixture is None else self._mixture.num_bytes
        return self._stream.num_bytes + experts + (0 if self.head is None else self.head.nbytes)


class CudaForward:
    """The weights of a model as a CUDA device holds them, and the forward pass over them.

    Args:
        config: the model's dimensions.
        tensors: every tensor of the file, on the device; Q6_K ones are repacked in place, so they serve only once.
        backend: ``q4k`` keeps the blocks, ``dense`` decodes every matrix now and drops them.
        kernels: kernels of the tensors' device.
        dtype: bfloat16, or float32 for comparisons.
        overlap: whether the next weight is decoded beside the current product (two scratch buffers instead of one).
        graphs: whether short passes are replayed as CUDA graphs.
        scratch_bytes: bound of one scratch buffer.
        head_bytes: bytes of the largest decoded head that is held for a pass.
        slab_bytes, expert_rows: bounds of ``Mixture``, for a model of experts.
    """

    def __init__(
        self,
        config: TeacherConfig,
        tensors: Mapping[str, DeviceTensor],
        backend: str,
        kernels: "Kernels",
        *,
        dtype: torch.dtype = torch.bfloat16,
        overlap: bool = True,
        graphs: bool = True,
        scratch_bytes: int = DEFAULT_SCRATCH_BYTES,
        head_bytes: int = DEFAULT_HEAD_BYTES,
        slab_bytes: int = DEFAULT_SLAB_BYTES,
        expert_rows: int = DEFAULT_ROWS,
    ) -> None:
        self.config, self._kernels, self._dtype = config, kernels, dtype
        self.device = next(iter(tensors.values())).packed.device
        self._weights = ModelWeights(config, tensors, backend, kernels, dtype)
        self.matrices, self.vector_bytes = self._weights.matrices, self._weights.vector_bytes
        self._head = self._weights.head
        layers = [group for layer in self._weights.layers for group in layer.groups]
        self._holds_head = self._head.rows * self._head.cols * dtype.itemsize <= head_bytes
        # What repacking freed goes back to the driver, since scratch carved out of it would pin the rest.
        torch.cuda.empty_cache()
        timeline: Timeline | None = SideStream(self.device, 2) if overlap and backend == "q4k" else None
        passes = [layers] if self._holds_head else [layers, [self._head]]
        self._stream = WeightStream(
            passes, dtype=dtype, device=self.device, scratch_bytes=scratch_bytes, timeline=timeline
        )
        self._mixture = self._make_mixture(overlap, slab_bytes, expert_rows) if config.num_experts else None
        states = self._weights.state_kernels
        self._parts = Parts(config, kernels, self._stream, self._mixture, states, dtype)
        self.scratch = ScratchBytes(self._stream, self._mixture)
        self._heads = Heads(config, self._weights.rope_factors, kernels, self.device)
        # The host waits for each layer's rows of experts, which cannot be captured; recurrent layers are not either.
        is_captured = graphs and self._mixture is None and config.recurrence is None
        self._graphs = PassGraphs(self._run) if is_captured else None

    def _make_mixture(self, overlap: bool, slab_bytes: int, max_rows: int) -> Mixture:
        layers = [layer.experts for layer in self._weights.layers if layer.experts is not None]
        return Mixture(
            layers,
            self._weights.expert_kernels,
            gated_kernel(self.config, self._kernels),
            dtype=self._dtype,
            timeline=SideStream(self.device, 2) if overlap and layers[0].resident is None else None,
            slab_bytes=slab_bytes,
            max_rows=max_rows,
        )

    def embed(self, row_ids: Tensor) -> Tensor:
        """Return float32 embedding rows ``[n, H]`` of int64 ids ``[n]``, on the device."""
        out = torch.empty(len(row_ids), self.config.hidden_size, dtype=torch.float32, device=self.device)
        self._weights.embedding.matrices[0].gather(row_ids.to(self.device), out)
        return out

    @torch.no_grad()
    def hidden(self, ids_BT: Tensor, starts_BT: Tensor | None = None) -> Tensor:
        """Return the final, normalised hidden states of checked int64 ids ``[B, T]``.

        With ``starts_BT`` (checked int64, the first position of each position's document), attention takes a mask and
        the pass is not replayed as a graph.

        Returns:
            compute dtype ``[B, T, H]``, on the device.
        """
        self.scratch.head = None
        ids_BT = ids_BT.to(self.device)
        starts_BT = None if starts_BT is None else starts_BT.to(self.device)
        if self._mixture is not None and len(ids_BT) > windows_at_once(ids_BT.shape[1]):
            return self._in_turns(ids_BT, starts_BT)
        if starts_BT is not None:
            return self._run(ids_BT, starts_BT)
        if self._graphs is not None and ids_BT.numel() <= GRAPH_MAX_TOKENS:
            return self._graphs(ids_BT)
        return self._run(ids_BT)

    def _in_turns(self, ids_BT: Tensor, starts_BT: Tensor | None) -> Tensor:
        """Run a few windows at a time, which bounds what a mixture holds beside its weights."""
        out = torch.empty(*ids_BT.shape, self.config.hidden_size, dtype=self._dtype, device=self.device)
        step = windows_at_once(ids_BT.shape[1])
        for start in range(0, len(ids_BT), step):
            turn = slice(start, start + step)
            out[turn] = self._run(ids_BT[turn], None if starts_BT is None else starts_BT[turn])
        return out

    def _run(self, ids_BT: Tensor, starts_BT: Tensor | None = None) -> Tensor:
        batch, length = ids_BT.shape
        config, kernels, layers, parts = self.config, self._kernels, self._weights.layers, self._parts
        heads = self._heads.begin(length, starts_BT)
        reach = Reach(batch, length, starts_BT, self._dtype, self.device)
        self._stream.begin(look_ahead=batch * length >= max(OVERLAP_MIN_TOKENS, FUSED_MAX_TOKENS + 1))
        with pinned_numerics():
            embedded = self.embed(ids_BT.reshape(-1))
            if config.embedding_scale != 1:
                embedded *= config.embedding_scale
            buffers = self._activations(embedded)
            if layers[0].attn_norm is None:
                buffers.normed.copy_(embedded)
            else:
                kernels.rms_norm(embedded, layers[0].attn_norm, config.rms_eps, buffers.normed)
            following = [layer.attn_norm for layer in layers[1:]] + [self._weights.output_norm]
            for layer, next_norm in zip(layers, following, strict=True):
                if layer.recurrent is None:
                    parts.attend(layer, buffers, batch, heads, reach)
                else:
                    parts.follow_states(layer, layer.recurrent, buffers, batch, starts_BT)
                self._add(buffers, layer.attn_post_norm, layer.ffn_norm)
                if isinstance(layer.feed_forward, Experts):
                    parts.mix(layer.feed_forward, layer.shared_expert, next_norm, buffers)
                    continue
                if isinstance(layer.feed_forward, DenseAndExperts):
                    parts.dense_and_experts(layer.feed_forward, buffers)
                else:
                    parts.feed_forward(layer.feed_forward, buffers)
                self._add(buffers, layer.ffn_post_norm, next_norm, layer.output_scale)
        return buffers.normed.view(batch, length, -1)

    def _add(
        self,
        buffers: Activations,
        post_norm: Tensor | None,
        next_norm: Tensor | None,
        output_scale: Tensor | None = None,
    ) -> None:
        """Add a part's output, normalised where there is a norm for it, and normalise the sum for the next part.

        The sum is multiplied by ``output_scale``, ``[1]``, before that.
        """
        eps, scale, kernels = self.config.rms_eps, self.config.residual_scale, self._kernels
        residual, delta, normed = buffers.residual, buffers.delta, buffers.normed
        if post_norm is not None:
            kernels.rms_norm(delta, post_norm, eps, delta)
        if next_norm is not None and scale == 1 and output_scale is None:
            kernels.add_rms_norm(residual, delta, next_norm, eps, normed)
            return
        residual.add_(delta, alpha=scale)
        if output_scale is not None:
            residual.mul_(output_scale)
        if next_norm is None:
            normed.copy_(residual)
        else:
            kernels.rms_norm(residual, next_norm, eps, normed)

    def _activations(self, residual_MH: Tensor) -> Activations:
        tokens, hidden = residual_MH.shape
        config = self.config

        def buffer(rows: int, cols: int) -> Tensor:
            return torch.empty(rows, cols, dtype=self._dtype, device=self.device)

        dense = [layer.dense for layer in self._weights.layers if layer.dense is not None]
        # A group cut into slabs is finished for every token before SwiGLU can start.
        whole = not all(self._stream.is_whole(weights.gate_up) for weights in dense)
        ffn = (config.shared_ffn_size or config.ffn_size) if dense else 0
        return Activations(
            residual=residual_MH,
            normed=buffer(tokens, hidden),
            delta=buffer(tokens, hidden),
            qkv=buffer(tokens, max(layer.qkv.rows for layer in self._weights.layers)),
            gate_up=buffer(tokens if whole else min(tokens, MLP_TOKENS), 2 * ffn),
            gated=buffer(tokens, ffn),
        )

    @torch.no_grad()
    def head_logits(self, hidden_MH: Tensor) -> Tensor:
        """Return float32 logits ``[M, V]`` of hidden states ``[M, H]``, on the device.

        The head is decoded at the first call after ``hidden`` and held until the next pass or ``release_head``, so
        that a caller may take its tokens in chunks.
        """
        x_MH = hidden_MH.to(self.device, self._dtype)
        out_MV = torch.empty(len(x_MH), self._head.rows, dtype=torch.float32, device=self.device)
        if not len(x_MH):  # positions without a label: an evaluation's last batch may have no others
            return out_MV
        with pinned_numerics():
            if self._parts.is_few(self._head, len(x_MH)):
                self._head.multiply_few(x_MH, out_MV)
            elif self._holds_head:
                multiply(x_MH, self._decoded_head(), out_MV)
            else:
                self._stream.begin(look_ahead=True)
                for rows, weight_RK in self._stream.decoded(self._head):
                    multiply(x_MH, weight_RK, out_MV[:, rows])
        return soft_cap(out_MV, self.config.logit_cap) if self.config.logit_cap else out_MV

    def _decoded_head(self) -> Tensor:
        if self._head.resident is not None:
            return self._head.resident
        if self.scratch.head is None:
            self.scratch.head = torch.empty(self._head.rows, self._head.cols, dtype=self._dtype, device=self.device)
            self._head.matrices[0].decode(0, self._head.rows, self.scratch.head)
        return self.scratch.head

    @torch.no_grad()
    def decoded_head(self) -> Tensor | None:
        """Return the decoded head ``[V, H]``, held until the next pass or ``release_head``; None if it is too large."""
        return self._decoded_head() if self._holds_head or self._head.resident is not None else None

    @torch.no_grad()
    def decode_head(self, start: int, stop: int, out_RH: Tensor) -> None:
        """Write head rows ``start`` to ``stop`` to ``out_RH``, contiguous, of the compute dtype, on the device."""
        self._head.matrices[0].decode(start, stop, out_RH)

    def release_head(self) -> None:
        """Free the decoded head, if one is held."""
        self.scratch.head = None
