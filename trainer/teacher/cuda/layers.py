"""Arranges a model's tensors on the device for the forward pass: groups of matrices, and vectors in float32."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from q4kd.trainer.formats.architecture import TeacherConfig
from q4kd.trainer.formats.recurrence import Recurrence
from q4kd.trainer.formats.rope_scaling import LONG_FACTORS, SHORT_FACTORS
from q4kd.trainer.formats.tensor_shapes import ROPE_FACTORS
from q4kd.trainer.kernels.expert_kernels import ExpertKernels
from q4kd.trainer.kernels.state_kernels import StateKernels
from q4kd.trainer.teacher.cuda.experts import Biases, Experts, build_experts
from q4kd.trainer.teacher.cuda.recurrent import DeltaNet, build_delta_net, decode_taps
from q4kd.trainer.teacher.cuda.weights import CudaMatrix, DeviceTensor, Group
from q4kd.trainer.teacher.rope import RopeFactors

if TYPE_CHECKING:
    from q4kd.trainer.kernels.teacher_kernels import Kernels


@dataclass(frozen=True)
class FeedForward:
    """The feed-forward of a dense layer."""

    gate_up: Group
    down: Group


@dataclass(frozen=True)
class DenseAndExperts:
    """A dense feed-forward and experts beside it, with norms of their own (``cpu/dense_and_experts.py``)."""

    dense: FeedForward
    experts: Experts
    dense_post_norm: Tensor
    router_scale: Tensor  # the weight of the router's norm, over the root of H
    experts_norm: Tensor
    experts_post_norm: Tensor


@dataclass(frozen=True)
class SharedExpert:
    """The expert that every token is given to, times the sigmoid of a product with float32 ``[H]``."""

    feed_forward: FeedForward
    token_gate_H: Tensor


@dataclass(frozen=True)
class Layer:
    """One transformer block: matrices by the input they share, vectors in float32; norms it has not are None."""

    attn_norm: Tensor | None
    qkv: Group  # of a recurrent layer, its gates too
    attn_output: Group
    recurrent: DeltaNet | None
    q_bias: Tensor | None
    k_bias: Tensor | None
    v_bias: Tensor | None
    output_bias: Tensor | None
    sinks: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    attn_post_norm: Tensor | None
    ffn_norm: Tensor | None
    feed_forward: FeedForward | Experts | DenseAndExperts
    shared_expert: SharedExpert | None
    ffn_post_norm: Tensor | None
    output_scale: Tensor | None  # [1], what the states behind the layer are multiplied by
    window: int  # keys that a query reads; 0 for all
    is_rotated: bool
    head_dim: int
    kv_heads: int
    shares_keys: bool  # whether values are keys: no rows of ``qkv`` are theirs

    @property
    def dense(self) -> FeedForward | None:
        """The feed-forward that every token goes through, beside experts too; None where there are experts only."""
        if self.shared_expert is not None:
            return self.shared_expert.feed_forward
        if isinstance(self.feed_forward, DenseAndExperts):
            return self.feed_forward.dense
        return self.feed_forward if isinstance(self.feed_forward, FeedForward) else None

    @property
    def experts(self) -> Experts | None:
        """The experts among which tokens are divided, by themselves or beside a dense feed-forward."""
        if isinstance(self.feed_forward, DenseAndExperts):
            return self.feed_forward.experts
        return self.feed_forward if isinstance(self.feed_forward, Experts) else None

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups in the order in which a pass uses them; experts are not among them."""
        steps = () if self.recurrent is None else (self.recurrent.steps,)
        rest = () if self.dense is None else (self.dense.gate_up, self.dense.down)
        return (self.qkv, *steps, self.attn_output, *rest)


class ModelWeights:
    """Every weight of a model; a tied head is the embedding.

    Args:
        config: the model's dimensions.
        tensors: every tensor of the file, on the device; Q6_K ones are repacked in place.
        backend: ``q4k`` keeps the blocks, ``dense`` decodes every matrix.
        kernels: kernels of the tensors' device.
        dtype: dtype of decoded matrices.
    """

    def __init__(
        self,
        config: TeacherConfig,
        tensors: Mapping[str, DeviceTensor],
        backend: str,
        kernels: "Kernels",
        dtype: torch.dtype,
    ) -> None:
        self._tensors, self._kernels, self._config, self._dtype = tensors, kernels, config, dtype
        if config.num_experts:
            self.expert_kernels = ExpertKernels(kernels.device, kernels.launcher)
        has_states = config.recurrence is not None
        self.state_kernels = StateKernels(kernels.device, kernels.launcher) if has_states else None
        self._dense = dtype if backend == "dense" else None
        self.matrices: dict[str, CudaMatrix] = {}
        self.vector_bytes: Counter[str] = Counter()
        self.embedding = self._group("token_embd.weight")
        self.layers = [self._layer(index) for index in range(config.num_layers)]
        # A scale of the logits is one of the states that the head reads.
        self.output_norm = self._vector("output_norm.weight") * config.logit_scale
        self.head = self.embedding if config.tied_head else self._group("output.weight")
        self.rope_factors = RopeFactors(*map(self._optional, (ROPE_FACTORS, SHORT_FACTORS, LONG_FACTORS)))
        del self._tensors

    def _group(self, *names: str) -> Group:
        matrices = {name: CudaMatrix(self._tensors[name], self._kernels) for name in names}
        self.matrices |= matrices
        group = Group(list(matrices.values()))
        if self._dense is not None:
            group.densify(self._dense, self._tensors[names[0]].packed.device)
        return group

    def _vector(self, name: str) -> Tensor:
        """Return a norm or bias as float32 ``[length]``, or the biases of experts as ``[E, length]``."""
        tensor = self._tensors[name]
        rows, cols = math.prod(tensor.shape[:-1]), tensor.shape[-1]
        vector = torch.empty(rows, cols, dtype=torch.float32, device=tensor.packed.device)
        self._kernels.decode(tensor.type, tensor.packed, 0, rows, cols, vector)
        self.vector_bytes["F32"] += vector.numel() * 4
        return vector.view(tensor.shape)

    def _optional(self, name: str) -> Tensor | None:
        return self._vector(name) if name in self._tensors else None

    def _layer(self, index: int) -> Layer:
        prefix, config, family = f"blk.{index}.", self._config, self._config.family
        recurrence = config.recurrence_of(index)
        qkv: tuple[str, ...] = ("attn_qkv",) if family.fused_qkv else ("attn_q", "attn_k", "attn_v")
        if config.shares_keys(index):
            qkv = qkv[:2]
        qkv = qkv if recurrence is None else ("attn_qkv", "attn_gate")
        output = "attn_output" if recurrence is None else "ssm_out"

        def norm(name: str) -> Tensor | None:
            return self._optional(f"{prefix}{name}.weight")

        return Layer(
            attn_norm=norm("attn_norm"),
            qkv=self._group(*(f"{prefix}{name}.weight" for name in qkv)),
            attn_output=self._group(f"{prefix}{output}.weight"),
            recurrent=self._recurrent(prefix, recurrence),
            q_bias=self._optional(prefix + "attn_q.bias"),
            k_bias=self._optional(prefix + "attn_k.bias"),
            v_bias=self._optional(prefix + "attn_v.bias"),
            output_bias=self._optional(prefix + "attn_output.bias"),
            sinks=norm("attn_sinks"),
            q_norm=norm("attn_q_norm"),
            k_norm=norm("attn_k_norm"),
            attn_post_norm=norm("post_attention_norm") if family.post_norms else None,
            ffn_norm=norm(family.ffn_norm),
            feed_forward=self._experts(prefix) if config.num_experts else self._feed_forward(prefix),
            shared_expert=self._shared_expert(prefix) if config.shared_ffn_size else None,
            ffn_post_norm=norm("post_ffw_norm"),
            output_scale=norm("layer_output_scale"),
            window=config.window(index),
            is_rotated=config.is_rotated(index),
            head_dim=config.head_dim_of(index),
            kv_heads=config.kv_heads_of(index),
            shares_keys=config.shares_keys(index),
        )

    def _recurrent(self, prefix: str, sizes: Recurrence | None) -> DeltaNet | None:
        if sizes is None:
            return None
        taps_XW = decode_taps(self._tensors[prefix + "ssm_conv1d.weight"], self._kernels.decode)
        self.vector_bytes["F32"] += taps_XW.nbytes
        return build_delta_net(prefix, sizes, self._group, self._vector, taps_XW)

    def _shared_expert(self, prefix: str) -> SharedExpert:
        gate_up = self._group(*(f"{prefix}ffn_{name}_shexp.weight" for name in ("gate", "up")))
        dense = FeedForward(gate_up, self._group(prefix + "ffn_down_shexp.weight"))
        return SharedExpert(dense, self._vector(prefix + "ffn_gate_inp_shexp.weight"))

    def _feed_forward(self, prefix: str) -> FeedForward:
        gate_up = ("ffn_up",) if self._config.family.fused_gate_up else ("ffn_gate", "ffn_up")
        down = self._group(prefix + "ffn_down.weight")
        return FeedForward(self._group(*(f"{prefix}{name}.weight" for name in gate_up)), down)

    def _experts(self, prefix: str) -> Experts | DenseAndExperts:
        config = self._config
        parts = ("gate_up_exps",) if config.fused_experts else ("gate_exps", "up_exps")
        names = [f"{prefix}ffn_{name}.weight" for name in ("gate_inp", *parts, "down_exps")]
        experts = build_experts(
            [self._tensors[name] for name in names],
            self._config.experts_per_token,
            self._kernels,
            self.expert_kernels,
            self._dtype,
            self._expert_biases(prefix) if self._config.family.all_biases else None,
        )
        self.vector_bytes["F32" if self._dtype == torch.float32 else "BF16"] += experts.router.nbytes
        self.matrices |= dict(zip(names[1:], experts.matrices, strict=True))
        experts = experts if self._dense is None else experts.densified(self._dense)
        if not config.family.dense_beside_experts:
            return experts
        return DenseAndExperts(
            dense=self._feed_forward(prefix),
            experts=replace(experts, scales_E=self._vector(prefix + "ffn_down_exps.scale")),
            dense_post_norm=self._vector(prefix + "post_ffw_norm_1.weight"),
            router_scale=self._vector(prefix + "ffn_gate_inp.scale") / math.sqrt(config.hidden_size),
            experts_norm=self._vector(prefix + "pre_ffw_norm_2.weight"),
            experts_post_norm=self._vector(prefix + "post_ffw_norm_2.weight"),
        )

    def _expert_biases(self, prefix: str) -> Biases:
        names = ("gate_inp", "gate_exps", "up_exps", "down_exps")
        router, gate, up, down = (self._vector(f"{prefix}ffn_{name}.bias") for name in names)
        return Biases(router, torch.cat([gate, up], dim=1), down)
